"""Products with weight matrices most of which is zero, on the CPU: only the nonzeros are multiplied.

Hybrid passes go through the same sparse matrices many times between two optimizer steps. `sparse_products` packs them
once; until it is left, their layers skip the zeros in the forward pass and in the gradient with respect to the input.
The gradient with respect to the weights is dense all the same: the optimizer decides with it which weights come back.

On other devices, in other types than float32 and float64, under autocast and under torch.compile layers stay as they
are: scripts/bench/kernels.py has the times.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, no_type_check

import numba
import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from sparse_model.sparsity.topk import in_row_chunks

LARGEST_SHARE = 1 / 16
"""Largest share of nonzeros at which skipping the others pays."""

SMALLEST_SIZE = 1 << 18
"""Smallest number of entries at which it does: below, packing and calling cost as much as the product."""

_TILE = 128
"""Tokens that go through a matrix together: their inputs stay in the cache, and vector units are kept busy."""


class PackedMatrix(NamedTuple):
    """The nonzeros of a matrix, row by row."""

    starts: Int[Tensor, " rows_and_end"]
    """Where each row begins among the nonzeros, and their number."""
    columns: Int[Tensor, " nonzero"]
    values: Float[Tensor, " nonzero"]


class SparseLinear(nn.Linear):
    """A linear layer that skips the zeros of its weight inside `sparse_products`."""

    packed: tuple[PackedMatrix, PackedMatrix] | None = None
    """The weight and its transpose."""

    def forward(self, input: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch out"]:
        """As nn.Linear."""
        if self.packed is None or torch.is_autocast_enabled(input.device.type) or input.dtype != self.weight.dtype:
            return linear(input, self.weight, self.bias)
        flat = input.reshape(-1, self.in_features)
        return _Product.apply(flat, self.weight, self.bias, *self.packed).view(*input.shape[:-1], self.out_features)


@contextmanager
def sparse_products(model: nn.Module, *, most: float = LARGEST_SHARE, least: int = SMALLEST_SIZE) -> Iterator[None]:
    """Let `SparseLinear` layers skip the zeros of weights of at least `least` entries, at most a share `most` nonzero.

    The weights must stay as they are until the context is left. Inside another such context it does nothing.
    """
    entered = []
    try:
        for layer in model.modules():
            if isinstance(layer, SparseLinear) and layer.packed is None and _suits(layer.weight, least):
                layer.packed = pack_matrix(layer.weight.detach(), most)
                entered.append(layer)
        yield
    finally:
        for layer in entered:
            layer.packed = None


def _suits(weight: Tensor, least: int) -> bool:
    return weight.numel() >= least and weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.float64)


def pack_matrix(weight: Float[Tensor, "out width"], most: float = 1.0) -> tuple[PackedMatrix, PackedMatrix] | None:
    """The nonzeros of a matrix and of its transpose; None where they are more than a share `most` of it."""
    w = weight.contiguous().numpy()
    most_nonzeros = int(most * w.size)
    starts, in_column = np.zeros(w.shape[0] + 1, np.int64), np.zeros(w.shape[1] + 1, np.int64)
    columns = np.empty(most_nonzeros, np.int32)
    if not _list_all(w, starts, columns, in_column, most_nonzeros):
        return None
    in_column, count = in_column.cumsum(), int(starts[-1])
    columns, rows = columns[:count].copy(), np.empty(count, np.int32)
    by_row, by_column = np.empty(count, w.dtype), np.empty(count, w.dtype)
    _fill(w, starts, columns, by_row, in_column.copy(), rows, by_column)
    parts = [torch.from_numpy(x) for x in (starts, columns, by_row, in_column, rows, by_column)]
    return PackedMatrix(*parts[:3]), PackedMatrix(*parts[3:])


def multiply(x: Float[Tensor, "token width"], matrix: PackedMatrix) -> Float[Tensor, "token out"]:
    """x times the transpose of a packed matrix [out, width]."""
    x = x.contiguous()
    out = torch.empty(len(x), len(matrix.starts) - 1, dtype=x.dtype)
    inputs, outputs = x.detach().numpy(), out.numpy()
    parts = [part.numpy() for part in matrix]
    # A nonzero costs about a tenth of what an entry costs the selection, by whose count threads are taken.
    in_row_chunks(lambda rows: _multiply(inputs[rows], *parts, outputs[rows]), len(x), len(matrix.values) // 8)
    return out


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor | None, matrix: PackedMatrix, transposed: PackedMatrix
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.transposed = transposed
        out = multiply(x, matrix)
        return out if bias is None else out.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (x,) = grad_outputs, ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        return (
            multiply(grad, ctx.transposed) if wants_x else None,
            grad.T @ x if wants_weight else None,
            grad.sum(0) if wants_bias else None,
            None,
            None,
        )


@numba.njit(cache=True, nogil=True)
@no_type_check
def _list_row(row, listed):
    """List the columns of a row's nonzeros; how many. Blocks of zeros are skipped after one vectorised sum."""
    k = 0
    for start in range(0, row.shape[0], 16):
        stop = min(start + 16, row.shape[0])
        some = 0
        for c in range(start, stop):
            some += row[c] != 0
        if some:
            for c in range(start, stop):
                listed[k] = c
                k += row[c] != 0
    return k


@numba.njit(cache=True, nogil=True)
@no_type_check
def _list_all(w, starts, columns, in_column, most):
    """List the columns of all nonzeros, note where rows begin, count those of each column; false for more than most."""
    listed = np.empty(w.shape[1] + 1, np.int32)
    k = 0
    for r in range(w.shape[0]):
        count = _list_row(w[r], listed)
        if k + count > most:
            return False
        for i in range(count):
            columns[k + i] = listed[i]
            in_column[listed[i] + 1] += 1
        k += count
        starts[r + 1] = k
    return True


@numba.njit(cache=True, nogil=True)
@no_type_check
def _fill(w, starts, columns, by_row, in_column, rows, by_column):
    """Copy the nonzeros row by row and column by column; in_column holds where each column begins."""
    for r in range(w.shape[0]):
        for k in range(starts[r], starts[r + 1]):
            c = columns[k]
            place = in_column[c]
            by_row[k] = by_column[place] = w[r, c]
            rows[place] = r
            in_column[c] = place + 1


# fastmath lets the sums be taken in vector registers; their order is fixed when the kernel is compiled.
@numba.njit(cache=True, nogil=True, fastmath=True)
@no_type_check
def _multiply(x, starts, columns, values, out):
    n, width = x.shape
    n_out = out.shape[1]
    turned = np.zeros((width, _TILE), x.dtype)
    sums = np.empty((16, _TILE), x.dtype)
    for first in range(0, n, _TILE):
        m = min(_TILE, n - first)
        _turn(x, first, m, turned)
        for r0 in range(0, n_out, 16):
            some = min(16, n_out - r0)
            for r in range(some):
                _row(turned, starts[r0 + r], starts[r0 + r + 1], columns, values, sums[r])
            for t in range(m):
                for r in range(some):
                    out[first + t, r0 + r] = sums[r, t]


@numba.njit(cache=True, nogil=True)
@no_type_check
def _turn(x, first, m, turned):
    """Lay m tokens side by side; sixteen channels at a time share cache lines."""
    for c0 in range(0, x.shape[1], 16):
        for t in range(m):
            for c in range(c0, min(c0 + 16, x.shape[1])):
                turned[c, t] = x[first + t, c]


@numba.njit(cache=True, nogil=True, fastmath=True)
@no_type_check
def _row(turned, start, end, columns, values, total):
    """One output channel of a tile's tokens, four nonzeros at a time."""
    total[:] = 0
    k = start
    while k + 4 <= end:
        v0, v1, v2, v3 = values[k], values[k + 1], values[k + 2], values[k + 3]
        x0, x1 = turned[columns[k]], turned[columns[k + 1]]
        x2, x3 = turned[columns[k + 2]], turned[columns[k + 3]]
        for t in range(total.shape[0]):
            total[t] += v0 * x0[t] + v1 * x1[t] + v2 * x2[t] + v3 * x3[t]
        k += 4
    while k < end:
        v, x = values[k], turned[columns[k]]
        for t in range(total.shape[0]):
            total[t] += v * x[t]
        k += 1

"""Exact selection of the largest magnitudes, shared by AbsTopK and the weight projection.

Both need "the k entries of largest magnitude, ties broken by the lower index". The magnitude order of IEEE floats is
the integer order of their bit patterns with the sign bit cleared, so the k-th largest magnitude is found exactly by
bisecting integers and counting; nothing is sorted and nothing is written until the threshold is known (paper
appendix B names library top-k, which sorts, as the cost of a naive implementation).

1. Clear the sign bit; a pattern above infinity's is NaN and is refused (on the CPU).
2. Bisect for the largest threshold t with #(pattern >= t) >= k; stop early when the count is exactly k.
3. Keep every pattern above t and, of those equal to t, the first by index until k are kept.

CPU tensors use a numba kernel that releases the GIL, split over torch's threads; CUDA tensors a Triton kernel; every
other device the same search in torch operations (`sparse_model.sparsity.topk_torch`), without a host sync. There NaN
cannot be refused without one: it counts as the largest magnitude, survives, and turns the loss into NaN, which the
trainers stop at.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparse_model.sparsity import topk_cpu as kernels
from sparse_model.sparsity import topk_torch as counting

_INT_TYPE = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
# Splitting less work than this over threads costs more than it gains.
_MIN_PER_THREAD = 1 << 19
_pool: ThreadPoolExecutor | None = None


class NotFiniteError(ValueError):
    """A value is NaN or infinite where numbers are needed."""


def select_rows(x: Float[Tensor, "row width"], k: int) -> tuple[Float[Tensor, "row width"], Bool[Tensor, "row width"]]:
    """Keep the k largest magnitudes of each row of a contiguous matrix.

    Returns (kept, mask): `kept` equals x where `mask` is true and is zero elsewhere; every row of `mask` has exactly
    k true entries. Raises NotFiniteError for NaN (CPU only), ValueError for k outside 0 .. width.
    """
    width = x.shape[-1]
    check_k(k, width)
    if k == width:
        _refuse_nan(x)
        return x.clone(), torch.ones_like(x, dtype=torch.bool)
    if k == 0:
        _refuse_nan(x)
        return torch.zeros_like(x), torch.zeros_like(x, dtype=torch.bool)
    if x.device.type != "cpu":
        triton = counting.triton_for(x)
        if triton and width <= triton.MAX_WIDTH:
            return triton.select_rows(x.detach(), k)
        mask = counting.rows_mask(magnitude_bits(x), k)
        return keep_masked(x, mask), mask
    kept, mask = torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)
    ints = _INT_TYPE[x.dtype]
    bits, out, mask_np = x.detach().view(ints).numpy(), kept.view(ints).numpy(), mask.numpy()
    sign, infinity = _bit_constants(x.dtype)
    bad = in_row_chunks(
        lambda rows: kernels.select_rows(bits[rows], k, out[rows], mask_np[rows], sign, infinity), *x.shape
    )
    if bad:
        raise NotFiniteError(f"NaN among the values given to top-k (shape {tuple(x.shape)}, k={k})")
    return kept, mask


def keep_masked(x: Float[Tensor, "row width"], mask: Bool[Tensor, "row width"]) -> Float[Tensor, "row width"]:
    """x where the mask is true, zero elsewhere (also where x is not finite)."""
    if x.device.type != "cpu":
        return torch.where(mask, x, 0)
    out, ints = torch.empty_like(x, memory_format=torch.contiguous_format), _INT_TYPE[x.dtype]
    bits = x.detach().contiguous().view(ints).numpy()
    kernels.keep_masked(bits.reshape(-1), mask.numpy().reshape(-1), out.view(ints).numpy().reshape(-1))
    return out


def top_mask_flat(x: Float[Tensor, " n"], k: int) -> Bool[Tensor, " n"]:
    """Mask of the k largest magnitudes of a flat tensor, ties to the lower index. Same errors as `select_rows`."""
    n = x.numel()
    check_k(k, n)
    if k == n or k == 0:
        _refuse_nan(x)
        return torch.full((n,), k == n, dtype=torch.bool, device=x.device)
    if x.device.type != "cpu":
        return counting.flat_masks(magnitude_bits(x)[None], k)[0]
    mask = torch.zeros(n, dtype=torch.bool)
    sign, infinity = _bit_constants(x.dtype)
    if not kernels.top_mask(x.detach().view(_INT_TYPE[x.dtype]).numpy(), k, mask.numpy(), sign, infinity):
        raise NotFiniteError(f"NaN among the {n} values given to top-k (k={k})")
    return mask


def top_mask_forced(
    x: Float[Tensor, "row column"], k: int, j: int, axis: Literal["row", "column"]
) -> Bool[Tensor, "row column"]:
    """Mask of k entries: the j largest magnitudes of every row (or column), then the largest of all others.

    Ties go to the lower index. Needs 1 <= j <= the neurons' inputs and j * neurons <= k <= entries. Raises
    NotFiniteError for NaN (CPU only).
    """
    if x.device.type != "cpu":
        return counting.forced_masks(magnitude_bits(x)[None], k, j, axis)[0]
    sign, infinity = _bit_constants(x.dtype)
    mask = torch.zeros(x.shape, dtype=torch.bool)
    bits = x.detach().contiguous().view(_INT_TYPE[x.dtype]).numpy()
    rest = np.empty(bits.shape, sign.dtype)
    force = kernels.force_rows if axis == "row" else kernels.force_columns
    if not force(bits, j, mask.numpy(), rest, sign, infinity):
        raise NotFiniteError(f"NaN among the {x.numel()} values given to top-k (k={k})")
    others = k - j * x.shape[0 if axis == "row" else 1]
    if others:
        kernels.top_mask(rest.reshape(-1), others, mask.numpy().reshape(-1), sign.dtype.type(-1), infinity)
    return mask


def magnitude_bits(x: Float[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """Bit patterns with the sign cleared: integers in the order of |x| (NaN above infinity)."""
    return x.detach().view(_INT_TYPE[x.dtype]) & int(_bit_constants(x.dtype)[0])


def check_k(k: int, width: int) -> None:
    """Raise ValueError unless 0 <= k <= width."""
    if not 0 <= k <= width:
        raise ValueError(f"k={k} is outside 0 .. {width}, the number of values to choose from")


@cache
def _bit_constants(dtype: torch.dtype) -> tuple[Any, Any]:
    """Numpy scalars of at least 32 bits: the mask that clears the sign of a pattern, and infinity's pattern."""
    ints = _INT_TYPE[dtype]
    infinity = torch.tensor(float("inf"), dtype=dtype).view(ints).item()
    wide = np.int64 if ints is torch.int64 else np.int32
    return wide(torch.iinfo(ints).max), wide(infinity)


def _refuse_nan(x: Tensor) -> None:
    if x.device.type == "cpu" and torch.isnan(x).any():
        raise NotFiniteError(f"NaN among the values given to top-k (shape {tuple(x.shape)})")


def in_row_chunks(work, n_rows: int, width: int) -> bool:
    """Run `work(slice)` over the rows, on several threads where that pays; true if any call returned true."""
    global _pool
    threads = min(torch.get_num_threads(), max(1, n_rows * width // _MIN_PER_THREAD), n_rows)
    if threads <= 1:
        return bool(work(slice(0, n_rows)))
    if _pool is None:
        _pool = ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="topk")
    edges = [n_rows * t // threads for t in range(threads + 1)]
    return any(list(_pool.map(work, [slice(a, b) for a, b in pairwise(edges)])))

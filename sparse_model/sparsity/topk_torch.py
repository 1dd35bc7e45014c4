"""Exact selection of the largest magnitudes by counting, on any device and without a host sync.

Patterns are integers in the order of the floats' magnitudes (`sparse_model.sparsity.topk`); negative ones are out of
the running. Rows are bisected bit by bit. Long flat tensors are searched digit by digit, eight bits at a time: the
counts of the 256 digits say which digit the k-th largest pattern has, and the search goes on among those with that
digit. The counts are all that parts of a tensor have to share, so a tensor may lie in shards on several processes.
"""

from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

Sum = Callable[[Int[Tensor, "*counts"]], Int[Tensor, "*counts"]]


class Shards(NamedTuple):
    """How the parts of a tensor that is cut along its first axis, in the order of their ranks, add up their counts."""

    total: Sum
    """The sum of every part's counts."""
    before: Sum
    """The sum over the parts before this one."""


def _identity(counts: Tensor) -> Tensor:
    return counts


WHOLE = Shards(_identity, torch.zeros_like)
"""A tensor in one piece."""


def rows_mask(bits: Int[Tensor, "row width"], k: int, shards: Shards = WHOLE) -> Bool[Tensor, "row width"]:
    """Mask of the k largest of every row, ties to the lower index; as many passes as a pattern has bits.

    Shards hold parts of every row, one after the other.
    """
    low = torch.zeros_like(bits[:, :1])
    for bit in reversed(range(torch.iinfo(bits.dtype).bits - 1)):
        candidate = low | (1 << bit)
        low = torch.where(shards.total((bits >= candidate).sum(-1, keepdim=True)) >= k, candidate, low)
    above, equal = bits > low, bits == low
    room = k - shards.total(above.sum(-1, keepdim=True)) - shards.before(equal.sum(-1, keepdim=True))
    return above | (equal & (equal.cumsum(-1) <= room))


def flat_mask(bits: Int[Tensor, " n"], k: int | Tensor, shards: Shards = WHOLE) -> Bool[Tensor, " n"]:
    """Mask of the k largest of a flat tensor, all shards together, ties to the lower index."""
    threshold = torch.zeros((), dtype=bits.dtype, device=bits.device)
    wanted = torch.as_tensor(k, dtype=torch.int64, device=bits.device)
    room = wanted.clone()
    for shift in reversed(range(0, torch.iinfo(bits.dtype).bits, 8)):
        counts = shards.total(count_digits(bits, threshold, shift))
        at_least = counts.flip(0).cumsum(0).flip(0)
        digit = (at_least >= room).sum() - 1
        room = room - (at_least[digit] - counts[digit])
        threshold = threshold | (digit.to(bits.dtype) << shift)
    above, equal = bits > threshold, bits == threshold
    room = room - shards.before(equal.sum()[None])[0]
    return (above | (equal & (equal.cumsum(0) <= room))) & (wanted > 0)


def forced_mask(
    bits: Int[Tensor, "row column"], k: int, j: int, axis: Literal["row", "column"], shards: Shards = WHOLE
) -> Bool[Tensor, "row column"]:
    """Mask of k entries: the j largest of every row (or column), then the largest of all others.

    Shards hold whole rows, one block of them after the other.
    """
    forced = rows_mask(bits, j) if axis == "row" else rows_mask(bits.T, j, shards).T
    others = k - shards.total(forced.sum()[None])[0]
    rest = bits.masked_fill(forced, -1).reshape(-1)
    return forced | flat_mask(rest, others, shards).view(bits.shape)


@cache
def triton_kernels() -> ModuleType | None:
    """`sparse_model.sparsity.topk_cuda`, imported when a CUDA tensor first asks; None where Triton cannot be."""
    try:
        from sparse_model.sparsity import topk_cuda as triton_kernels
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "triton":
            raise
        return None
    return triton_kernels


def count_digits(bits: Int[Tensor, " n"], prefix: Int[Tensor, ""], shift: int) -> Int[Tensor, "256"]:
    """How many patterns have each digit (pattern >> shift) & 255, among those that agree with prefix above it."""
    if bits.is_cuda and bits.element_size() <= 4 and (triton := triton_kernels()):
        return triton.count_digits(bits, prefix, shift)
    # In two steps: the highest digit leaves a shift by the whole width, which is undefined.
    agrees = (bits >> shift >> 7 >> 1) == (prefix >> shift >> 7 >> 1)
    digits = torch.where(agrees & (bits >= 0), (bits >> shift) & 255, 256).long()
    return torch.zeros(257, dtype=torch.int64, device=bits.device).index_add_(0, digits, torch.ones_like(digits))[:256]

"""Exact selection of the largest magnitudes by counting, on any device and without a host sync.

Patterns are integers in the order of the floats' magnitudes (`sparse_model.sparsity.topk`); negative ones are out of
the running. Rows are bisected bit by bit. Long flat tensors are searched digit by digit, eight bits at a time: the
counts of the 256 digits say which digit the k-th largest pattern has, and the search goes on among those with that
digit. Several tensors of one size are searched together: on a GPU launches cost more than arithmetic. The counts are
all that parts of a tensor have to share, so a tensor may lie in shards on several processes.
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


def rows_mask(
    bits: Int[Tensor, "*batch row width"], k: int, shards: Shards = WHOLE
) -> Bool[Tensor, "*batch row width"]:
    """Mask of the k largest of every row, ties to the lower index; as many passes as a pattern has bits.

    Shards hold parts of every row, one after the other.
    """
    width = bits.shape[-1]
    if shards is WHOLE and 0 < k < width and (triton := triton_for(bits)) and width <= triton.MAX_WIDTH:
        return triton.rows_mask(bits, k)
    low = torch.zeros_like(bits[..., :1])
    for bit in reversed(range(torch.iinfo(bits.dtype).bits - 1)):
        candidate = low | (1 << bit)
        low = low.where(shards.total((bits >= candidate).sum(-1, keepdim=True)) < k, candidate)
    above, equal = bits > low, bits == low
    room = k - shards.total(above.sum(-1, keepdim=True)) - shards.before(equal.sum(-1, keepdim=True))
    return above | (equal & (equal.cumsum(-1) <= room))


def flat_masks(bits: Int[Tensor, "group n"], k: int | Tensor, shards: Shards = WHOLE) -> Bool[Tensor, "group n"]:
    """Mask of the k largest of every tensor of a group, all shards together, ties to the lower index.

    A group takes as many launches as a single tensor.
    """
    threshold = torch.zeros_like(bits[:, :1])
    wanted = torch.zeros_like(threshold, dtype=torch.int64) + k
    room = wanted
    for shift in reversed(range(0, torch.iinfo(bits.dtype).bits, 8)):
        counts = shards.total(count_digits(bits, threshold, shift))
        threshold, room = narrow(counts, threshold, room, shift)
    above, equal = bits > threshold, bits == threshold
    room = room - shards.before(equal.sum(-1, keepdim=True))
    # One sum over the whole group: along rows as long and few as these the device would add up almost alone.
    ties = equal.view(-1).cumsum(0, dtype=torch.int32).view(bits.shape)
    rank = ties - (ties[:, :1] - equal[:, :1].int())
    return (above | (equal & (rank <= room))) & (wanted > 0)


def forced_masks(
    bits: Int[Tensor, "group row column"], k: int, j: int, axis: Literal["row", "column"], shards: Shards = WHOLE
) -> Bool[Tensor, "group row column"]:
    """Mask of k entries of every matrix of a group: the j largest of every row (or column), then those of all others.

    Shards hold whole rows, one block of them after the other.
    """
    forced = rows_mask(bits, j) if axis == "row" else rows_mask(bits.mT.contiguous(), j, shards).mT.contiguous()
    others = k - shards.total(forced.sum((1, 2))[:, None])
    rest = bits.masked_fill(forced, -1).flatten(1)
    return forced | flat_masks(rest, others, shards).view(bits.shape)


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


def triton_for(bits: Tensor) -> ModuleType | None:
    """The Triton kernels where they can take these patterns."""
    return triton_kernels() if bits.is_cuda and bits.element_size() <= 4 else None


def count_digits(bits: Int[Tensor, "group n"], prefix: Int[Tensor, "group 1"], shift: int) -> Int[Tensor, "group 256"]:
    """How many patterns have each digit (pattern >> shift) & 255, among those that agree with prefix above it."""
    if triton := triton_for(bits):
        return triton.count_digits(bits, prefix, shift)
    # In two steps: the highest digit leaves a shift by the whole width, which is undefined.
    agrees = (bits >> shift >> 7 >> 1) == (prefix >> shift >> 7 >> 1)
    digits = ((bits >> shift) & 255).long().masked_fill(~(agrees & (bits >= 0)), 256)
    return torch.zeros(len(bits), 257, dtype=torch.int64, device=bits.device).scatter_add_(
        1, digits, torch.ones_like(digits)
    )[:, :256]


def narrow(
    counts: Int[Tensor, "group 256"], threshold: Int[Tensor, "group 1"], room: Int[Tensor, "group 1"], shift: int
) -> tuple[Int[Tensor, "group 1"], Int[Tensor, "group 1"]]:
    """The threshold with its next digit, and how many of the patterns that agree with it are still wanted."""
    if triton := triton_for(threshold):
        return triton.narrow(counts, threshold, room, shift)
    at_least = counts.flip(-1).cumsum(-1).flip(-1)
    digit = (at_least >= room).sum(-1, keepdim=True) - 1
    # gather, because indexing with a tensor of one number would wait for the device
    above = at_least.gather(-1, digit) - counts.gather(-1, digit)
    return threshold | (digit << shift).to(threshold.dtype), room - above

"""The CUDA kernels behind `sparse_model.sparsity.topk`, in Triton; the arithmetic is that of the CPU kernels.

Triton comes with torch's CUDA builds. Where it is absent, `sparse_model.sparsity.topk_torch` does the same in torch
operations; nothing imports this module before a CUDA tensor asks for it
(`sparse_model.sparsity.topk_torch.triton_kernels`). `TRITON_INTERPRET=1`, set before this module is imported, runs the
kernels on the CPU, as the tests do.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int
from torch import Tensor

# A row is held in registers: beyond this many entries torch operations take over.
MAX_WIDTH = 32768
_DIGIT_BLOCK = 2048


@triton.jit
@no_type_check
def select_rows_kernel(
    x_ptr, out_ptr, mask_ptr, width, k, BITS: tl.constexpr, BLOCK: tl.constexpr, WRITE: tl.constexpr
):
    """One row: bisect its k-th largest magnitude bit by bit, then keep what is above and the first of what ties."""
    row = tl.program_id(0).to(tl.int64)
    offset = tl.arange(0, BLOCK)
    inside = offset < width
    x = tl.load(x_ptr + row * width + offset, mask=inside, other=0.0)
    if BITS == 16:
        bits = x.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF
    else:
        bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    bits = tl.where(inside, bits, -1)
    low = tl.max(bits, axis=0) * 0
    for step in range(BITS - 1):
        candidate = low | (1 << (BITS - 2 - step))
        enough = tl.sum((bits >= candidate).to(tl.int32), axis=0) >= k
        low = tl.where(enough, candidate, low)
    above = bits > low
    equal = (bits == low).to(tl.int32)
    room = k - tl.sum(above.to(tl.int32), axis=0)
    keep = above | ((equal != 0) & (tl.cumsum(equal, axis=0) <= room))
    if WRITE:
        tl.store(out_ptr + row * width + offset, tl.where(keep, x, 0.0), mask=inside)
    tl.store(mask_ptr + row * width + offset, keep.to(tl.int8), mask=inside)


@triton.jit
@no_type_check
def count_digits_kernel(bits_ptr, prefix_ptr, counts_ptr, n, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    """One block of one tensor: a histogram of its digits, added to the tensor's; bin 256 takes what does not agree."""
    tensor = tl.program_id(1).to(tl.int64)
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    bits = tl.load(bits_ptr + tensor * n + offset, mask=offset < n, other=-1).to(tl.int32)
    prefix = tl.load(prefix_ptr + tensor).to(tl.int32)
    # In two steps: the highest digit leaves a shift by the whole width, which is undefined.
    agrees = (bits >= 0) & ((bits >> SHIFT >> 7 >> 1) == (prefix >> SHIFT >> 7 >> 1))
    digit = tl.where(agrees, (bits >> SHIFT) & 255, 256)
    counts = tl.histogram(digit, 512)
    bins = tl.arange(0, 512)
    tl.atomic_add(counts_ptr + tensor * 256 + bins, counts, mask=(bins < 256) & (counts > 0))


@triton.jit
@no_type_check
def narrow_kernel(counts_ptr, prefix_ptr, room_ptr, next_prefix_ptr, next_room_ptr, SHIFT: tl.constexpr):
    """One tensor: the digit of the wanted pattern, and how many patterns with that digit are still wanted."""
    tensor = tl.program_id(0)
    place = tl.arange(0, 256)  # from the highest digit down
    counts = tl.load(counts_ptr + tensor * 256 + 255 - place).to(tl.int64)
    room = tl.load(room_ptr + tensor)
    skipped = (tl.cumsum(counts, axis=0) < room).to(tl.int64)
    digit = 255 - tl.sum(skipped, axis=0)
    prefix = tl.load(prefix_ptr + tensor).to(tl.int64)
    tl.store(next_prefix_ptr + tensor, prefix | (digit << SHIFT))
    tl.store(next_room_ptr + tensor, room - tl.sum(counts * skipped, axis=0))


def select_rows(x: Float[Tensor, "row width"], k: int) -> tuple[Float[Tensor, "row width"], Bool[Tensor, "row width"]]:
    """The k largest magnitudes of every row of a contiguous matrix, and their mask; 0 < k < width <= MAX_WIDTH."""
    kept, mask = torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)
    _select_rows(x, kept, mask, k, write=True)
    return kept, mask


def rows_mask(bits: Int[Tensor, "*batch row width"], k: int) -> Bool[Tensor, "*batch row width"]:
    """As `sparse_model.sparsity.topk_torch.rows_mask`, for patterns of 16 or 32 bits; 0 < k < width <= MAX_WIDTH."""
    bits = bits.contiguous()
    mask = torch.empty_like(bits, dtype=torch.bool)
    values = bits.view({2: torch.float16, 4: torch.float32}[bits.element_size()])
    _select_rows(values, values, mask, k, write=False)
    return mask


def _select_rows(x: Tensor, kept: Tensor, mask: Tensor, k: int, *, write: bool) -> None:
    width = x.shape[-1]
    if rows := x.numel() // width:
        block = triton.next_power_of_2(width)
        warps = min(16, max(1, block // 256))
        options = {"BITS": 8 * x.element_size(), "BLOCK": block, "WRITE": write, "num_warps": warps}
        select_rows_kernel[(rows,)](x, kept, mask.view(torch.int8), width, k, **options)


def count_digits(bits: Int[Tensor, "group n"], prefix: Int[Tensor, "group 1"], shift: int) -> Int[Tensor, "group 256"]:
    """As `sparse_model.sparsity.topk_torch.count_digits`, for patterns of 16 or 32 bits."""
    group, n = bits.shape
    counts = torch.zeros(group, 256, dtype=torch.int32, device=bits.device)
    if bits.numel():
        grid = (triton.cdiv(n, _DIGIT_BLOCK), group)
        count_digits_kernel[grid](bits, prefix, counts, n, SHIFT=shift, BLOCK=_DIGIT_BLOCK)
    return counts


def narrow(
    counts: Int[Tensor, "group 256"], threshold: Int[Tensor, "group 1"], room: Int[Tensor, "group 1"], shift: int
) -> tuple[Int[Tensor, "group 1"], Int[Tensor, "group 1"]]:
    """As `sparse_model.sparsity.topk_torch.narrow`."""
    out = torch.empty_like(threshold), torch.empty_like(room)
    narrow_kernel[(len(counts),)](counts, threshold, room, *out, SHIFT=shift)
    return out

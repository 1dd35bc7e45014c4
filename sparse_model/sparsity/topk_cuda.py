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
def select_rows_kernel(x_ptr, out_ptr, mask_ptr, width, k, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """One row: bisect its k-th largest magnitude bit by bit, then keep what is above and the first of what ties."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    x = tl.load(x_ptr + row * width + at, mask=inside, other=0.0)
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
    tl.store(out_ptr + row * width + at, tl.where(keep, x, 0.0), mask=inside)
    tl.store(mask_ptr + row * width + at, keep.to(tl.int8), mask=inside)


@triton.jit
@no_type_check
def count_digits_kernel(bits_ptr, prefix_ptr, counts_ptr, n, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    """One block: a histogram of its digits, added to the common one; bin 256 takes what does not agree."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    bits = tl.load(bits_ptr + at, mask=at < n, other=-1).to(tl.int32)
    prefix = tl.load(prefix_ptr).to(tl.int32)
    # In two steps: the highest digit leaves a shift by the whole width, which is undefined.
    agrees = (bits >= 0) & ((bits >> SHIFT >> 7 >> 1) == (prefix >> SHIFT >> 7 >> 1))
    digit = tl.where(agrees, (bits >> SHIFT) & 255, 256)
    counts = tl.histogram(digit, 512)
    bins = tl.arange(0, 512)
    tl.atomic_add(counts_ptr + bins, counts, mask=bins < 256)


def select_rows(x: Float[Tensor, "row width"], k: int) -> tuple[Float[Tensor, "row width"], Bool[Tensor, "row width"]]:
    """The k largest magnitudes of every row of a contiguous matrix, and their mask; 0 < k < width <= MAX_WIDTH."""
    kept, mask = torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)
    rows, width = x.shape
    if rows:
        block = triton.next_power_of_2(width)
        warps = min(16, max(1, block // 256))
        select_rows_kernel[(rows,)](
            x, kept, mask.view(torch.int8), width, k, BITS=8 * x.element_size(), BLOCK=block, num_warps=warps
        )
    return kept, mask


def count_digits(bits: Int[Tensor, " n"], prefix: Int[Tensor, ""], shift: int) -> Int[Tensor, "256"]:
    """As `sparse_model.sparsity.topk_torch.count_digits`, for patterns of 16 or 32 bits."""
    counts = torch.zeros(256, dtype=torch.int32, device=bits.device)
    if len(bits):
        grid = (triton.cdiv(len(bits), _DIGIT_BLOCK),)
        count_digits_kernel[grid](bits, prefix, counts, len(bits), SHIFT=shift, BLOCK=_DIGIT_BLOCK)
    return counts.long()

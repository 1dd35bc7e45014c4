"""Tensors stored in half the bytes or a quarter of them, where that loses nothing; and rounding that makes it so.

A float32 tensor whose values are all float16 numbers is stored as float16. A matrix whose rows are 8-bit integers times
a number for each row is stored as `NAME.int8` and `NAME.row_scale`. Others are stored as they are. Reading gives back
float32, bit for bit.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from sparse_model.io.tensors import read_tensors

_INT8, _SCALE = ".int8", ".row_scale"
_LARGEST = 127


def rounded_half(t: Tensor) -> Tensor:
    """The nearest float16 numbers, in float32. Raises ValueError for finite numbers that are too large for float16."""
    half = t.half()
    if bool((half.isinf() & t.isfinite()).any()):
        raise ValueError(f"{float(t[t.isfinite()].abs().max()):.3g} is larger than half precision holds (65504)")
    return half.float()


def rounded_rows(t: Float[Tensor, "row column"]) -> Float[Tensor, "row column"]:
    """Rows of 8-bit integers times a number for each row, in float32: off by at most a 127th of the row's largest."""
    largest, where = t.abs().max(dim=1, keepdim=True)
    # Eight digits of the scale and seven of the integer are exact in float32. The largest stays an end of the grid, by
    # which reading a matrix shows its scales.
    scale = (largest / _LARGEST).bfloat16().float()
    steps = (t / scale.clamp(min=torch.finfo(torch.float32).tiny)).round().clamp(-_LARGEST, _LARGEST)
    steps.scatter_(1, where, t.gather(1, where).sign() * _LARGEST)
    return (steps + 0.0) * scale  # no -0.0, which integers do not have


def narrowed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor in the smallest form that loses nothing."""
    narrow: dict[str, Tensor] = {}
    for name, t in tensors.items():
        rows = _as_rows(t)
        if rows is not None:
            narrow[name + _INT8], narrow[name + _SCALE] = rows
        else:
            narrow[name] = t.half() if t.dtype == torch.float32 and _same(t.half().float(), t) else t
    return narrow


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file that `narrowed` may have made smaller, as float32; raises as `read_tensors`."""
    wide = {}
    tensors = read_tensors(path)
    for name, t in tensors.items():
        base = name.removesuffix(_INT8)
        if name.endswith(_SCALE) and name.removesuffix(_SCALE) + _INT8 in tensors:
            continue
        if base == name or base + _SCALE not in tensors:
            wide[name] = t.float() if t.dtype == torch.float16 else t
            continue
        scale = tensors[base + _SCALE]
        if t.dtype != torch.int8 or t.dim() != 2 or scale.shape != (len(t), 1) or not scale.is_floating_point():
            raise ValueError(f"{path}: the parts of {base} do not fit each other: copy the file again")
        wide[base] = t.float() * scale.float()
    return wide


def _as_rows(t: Tensor) -> tuple[Tensor, Tensor] | None:
    if t.dtype != torch.float32 or t.dim() != 2 or t.numel() == 0 or not bool(t.isfinite().all()):
        return None
    scale = t.abs().amax(dim=1, keepdim=True) / _LARGEST
    steps = (t / torch.where(scale > 0, scale, 1.0)).round().to(torch.int8)
    return (steps, scale) if _same(steps.float() * scale, t) else None


def _same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit: -0.0 and NaN are values that must come back."""
    return torch.equal(a.view(torch.int32), b.view(torch.int32))

"""AbsTopK: keep the k entries of largest magnitude along the last axis (paper sections 2.1 and A.1)."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparse_model.selection import keep_masked, select_rows


def abs_topk(x: Float[Tensor, "*batch width"], k: int) -> Float[Tensor, "*batch width"]:
    """Zero all but the k entries of largest magnitude of each last-axis row.

    Exactly k survive, also among ties (the lower index wins) and zeros; the gradient passes through the survivors
    and nowhere else. Any leading shape, memory layout, and floating dtype. k = width returns x unchanged.

    Raises ValueError when k is outside 0 .. width, or for NaN on the CPU (see `sparse_model.selection` for other
    devices).
    """
    return _AbsTopK.apply(x, k)


class _AbsTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, k: int) -> Tensor:
        width = x.shape[-1]
        kept, mask = select_rows(x.reshape(-1, width).contiguous(), k)
        ctx.save_for_backward(mask)
        return kept.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (grad,) = grad_outputs
        (mask,) = ctx.saved_tensors
        return keep_masked(grad.reshape(mask.shape), mask).view(grad.shape), None

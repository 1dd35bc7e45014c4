"""AbsTopK: keep the k entries of largest magnitude along the last axis (paper sections 2.1 and A.1)."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparse_model.sparsity.topk import keep_masked, select_rows


def abs_topk(x: Float[Tensor, "*batch width"], k: int) -> Float[Tensor, "*batch width"]:
    """Zero all but the k entries of largest magnitude of each last-axis row.

    Exactly k survive, also among ties (the lower index wins) and zeros; the gradient passes through the survivors
    and nowhere else. Any leading shape, memory layout, and floating dtype. k = width returns x unchanged.

    Raises ValueError when k is outside 0 .. width, NotFiniteError for NaN on the CPU (see `sparse_model.sparsity.topk`
    for other devices).
    """
    if torch.compiler.is_compiling():
        return _compiled(x, k)[0]
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


# The same as an operator that torch.compile takes as it is; outside of it the operator's dispatch costs too much.
@torch.library.custom_op("sparse_model::abs_topk", mutates_args=())
def _compiled(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    kept, mask = select_rows(x.reshape(-1, x.shape[-1]).contiguous(), k)
    return kept.view(x.shape), mask.view(x.shape)


@_compiled.register_fake
def _(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty(
        x.shape, dtype=torch.bool, device=x.device
    )


def _save_mask(ctx, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(output[1])


def _through_mask(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor, None]:
    return torch.where(ctx.saved_tensors[0], grad, 0), None


_compiled.register_autograd(_through_mask, setup_context=_save_mask)

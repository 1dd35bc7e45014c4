"""The pure losses of bridge training (paper 3.3). All in nats or without unit, all means over tokens."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable


def nmse(
    prediction: Float[Tensor, "*batch d"], target: Float[Tensor, "*batch d"], *, through_target: bool = False
) -> Float[Tensor, ""]:
    """Normalised mean squared error: a ratio of sums over all tokens and channels.

        sum |prediction - target|^2  /  sum |target - mean over tokens of target|^2

    Predicting the target's mean scores exactly 1. The target is detached in numerator and denominator, or, with
    `through_target`, in neither: a ratio of the whole does not care about scale, but with a gradient into the
    numerator's target alone the sparse residual stream shrinks to make itself easy to predict.
    Two cheaper-looking variants flatter bad bridges and are not used: a mean of per-token ratios, and a variance
    about zero.
    """
    if not through_target:
        target = target.detach()
    target = target.reshape(-1, target.shape[-1])
    error = prediction.reshape(target.shape) - target
    return error.square().sum() / (target - target.mean(0)).square().sum()


def nmse_backward(
    predict: Callable[[int], Tensor],
    targets: list[Tensor],
    *,
    scale: float | Tensor = 1.0,
    through_target: bool = False,
    total: Callable[[Tensor], Tensor] | None = None,
) -> Float[Tensor, " site"]:
    """Backward of `scale` times the sum over sites of `nmse`, one site's graph at a time; returns each, detached.

    `predict(i)` makes site i's prediction. Over several processes `total` sums a tensor over them, and errors, means
    and variances are those of the whole batch. As the quotient E / D of two sums is no sum over processes, each
    contributes E_r / D - (E / D^2) D_r with E and D constant, times their number because gradients are averaged: the
    same gradient as on one process.
    """
    rows = [x.reshape(-1, x.shape[-1]) for x in targets]
    if not through_target:
        rows = [x.detach() for x in rows]

    def sums(i: int) -> Float[Tensor, "2"]:
        return torch.stack([(predict(i).reshape(rows[i].shape) - rows[i]).square().sum(), _spread(rows[i], means[i])])

    means, whole = [x.detach().mean(0) for x in rows], None
    processes: Tensor | float = 1.0
    if total is not None:
        summed = total(torch.cat([*means, torch.ones_like(means[0][:1])]))
        processes = summed[-1]
        means = list((summed[:-1] / processes).split([len(mean) for mean in means]))
        with torch.no_grad():
            whole = total(torch.stack([sums(i) for i in range(len(rows))]))
    losses = []
    for i in range(len(rows)):
        local = sums(i)
        error, variance = local.detach() if whole is None else whole[i]
        part = local[0] / variance
        if through_target:
            part = part - (error / variance.square()) * local[1]
        (scale * processes * part).backward()
        losses.append(error / variance)
    return torch.stack(losses)


def nmse_backward_together(
    predictions: Float[Tensor, "site batch pos d"],
    targets: list[Tensor],
    *,
    scale: float | Tensor = 1.0,
    through_target: bool = False,
    total: Callable[[Tensor], Tensor] | None = None,
) -> Float[Tensor, " site"]:
    """As `nmse_backward`, from all sites' predictions at once: one backward pass, and more memory."""
    target = torch.stack(targets).flatten(1, 2)
    if not through_target:
        target = target.detach()
    mean = target.detach().mean(1, keepdim=True)
    processes: Tensor | float = 1.0
    if total is not None:
        processes = total(torch.ones_like(mean[0, 0, :1]))
        mean = total(mean) / processes
    local = torch.stack(
        [(x - y).square().sum((1, 2)) for x, y in ((predictions.flatten(1, 2), target), (target, mean))]
    )
    error, variance = local.detach() if total is None else total(local.detach())
    part = local[0] / variance
    if through_target:
        part = part - (error / variance.square()) * local[1]
    (scale * processes * part.sum()).backward()
    return error / variance


def _spread(rows: Float[Tensor, "token d"], mean: Float[Tensor, " d"]) -> Float[Tensor, ""]:
    return (rows - mean).square().sum()


def kl(target_logits: Float[Tensor, "*batch vocab"], logits: Float[Tensor, "*batch vocab"]) -> Float[Tensor, ""]:
    """KL(target || prediction) in nats, exact over the vocabulary, mean over tokens; no gradient into the target.

    sum_v p_v (log p_v - log q_v) with p = softmax(target_logits), q = softmax(logits), computed in float32 or wider.
    The gradient, (q - p) / tokens, is made together with the value, a few rows at a time: with a large vocabulary
    passes over memory cost more than the arithmetic.
    """
    vocab = logits.shape[-1]
    return _KL.apply(target_logits.detach().reshape(-1, vocab), logits.reshape(-1, vocab))


# Entries of a block of rows that stays in a CPU core's cache.
_BLOCK = 1 << 18


class _KL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, target: Tensor, logits: Tensor) -> Tensor:
        n, vocab = logits.shape
        wide = torch.promote_types(logits.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=logits.device)
        grad = torch.empty_like(logits) if ctx.needs_input_grad[1] else None
        rows = max(1, _BLOCK // vocab) if logits.device.type == "cpu" else n
        for start in range(0, n, rows):
            part = slice(start, start + rows)
            t, x = target[part], logits[part]
            t, x = t.to(wide), x.to(wide)
            norm_t, norm_x = t.logsumexp(-1, keepdim=True), x.logsumexp(-1, keepdim=True)
            p = (t - norm_t).exp_()
            # sum_v p_v = 1, so the two norms may stand outside the sum.
            total += torch.linalg.vecdot(p, t - x).sum() + (norm_x - norm_t).sum()
            if grad is not None:
                grad[part] = (x - norm_x).exp_().sub_(p)
        if grad is not None:
            ctx.save_for_backward(grad)
        return total / n

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs: Tensor) -> tuple[None, Tensor]:
        (grad,) = ctx.saved_tensors
        return None, grad * (grad_outputs[0] / len(grad)).to(grad.dtype)

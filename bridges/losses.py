"""The pure losses of bridge training (paper 3.3). All in nats or without unit, all means over tokens."""

import torch
from jaxtyping import Float
from torch import Tensor


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


def kl(target_logits: Float[Tensor, "*batch vocab"], logits: Float[Tensor, "*batch vocab"]) -> Float[Tensor, ""]:
    """KL(target || prediction) in nats, exact over the vocabulary, mean over tokens; no gradient into the target.

    sum_v p_v (log p_v - log q_v) with p = softmax(target_logits), q = softmax(logits), computed in float32 or wider.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    log_p = target_logits.detach().to(wide).log_softmax(-1)
    log_q = logits.to(wide).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()

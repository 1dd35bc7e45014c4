"""The language-model loss."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def next_token_loss(logits: Float[Tensor, "batch pos vocab"], tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, ""]:
    """Cross-entropy of each next token in nats, mean over tokens (the last position predicts nothing)."""
    return token_loss(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def token_loss(logits: Float[Tensor, "token vocab"], following: Int[Tensor, " token"]) -> Float[Tensor, ""]:
    """Cross-entropy in nats of the tokens that follow, computed in float32 or wider, mean over tokens."""
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), following)

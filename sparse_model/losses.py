"""The language-model loss."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def next_token_loss(logits: Float[Tensor, "batch pos vocab"], tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, ""]:
    """Cross-entropy of each next token in nats, mean over tokens (the last position predicts nothing)."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits[:, :-1].to(wide).flatten(0, 1), tokens[:, 1:].flatten())

"""A sparse model's matrices under TransformerLens' names and in its shapes: views, nothing is copied but the stacks."""

from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor


class LensWeights:
    """`W_E`, `W_U`, `W_Q` and so on of a `SparseTransformer`.

    A read that positions are concatenated to has their rows behind those of the stream. Biases of a model without any
    are zeros.
    """

    # What the class that uses this has.
    cfg: Any
    blocks: Any
    token_embed: Any
    pos_embed: Any
    unembedding: Any
    logits_bias: Tensor

    W_E = property(lambda self: self.token_embed.weight)
    """Embedding [d_vocab, d_model]."""
    W_U = property(lambda self: self.unembedding.weight.T)
    """Unembedding [d_model, d_vocab]."""
    b_U = property(lambda self: self.logits_bias)
    """Bias of the logits [d_vocab]."""

    @property
    def W_pos(self) -> Float[Tensor, "n_ctx width"]:
        """Positions, added or concatenated. Raises ValueError for a model without learned ones."""
        if self.cfg.positions not in ("learned", "concat_learned"):
            raise ValueError(f"positions={self.cfg.positions!r}: the model has no W_pos")
        return self.pos_embed.weight

    W_Q = property(lambda self: self._qkv()[0])
    """Queries [layer, head, read, d_head]."""
    W_K = property(lambda self: self._qkv()[1])
    W_V = property(lambda self: self._qkv()[2])
    b_Q = property(lambda self: self._qkv_bias()[0])
    """Biases of the queries [layer, head, d_head]."""
    b_K = property(lambda self: self._qkv_bias()[1])
    b_V = property(lambda self: self._qkv_bias()[2])

    @property
    def W_O(self) -> Float[Tensor, "layer head d_head d_model"]:
        """What heads write."""
        return torch.stack([rearrange(b.attn.out.weight, "m (h d) -> h d m", h=self.cfg.n_heads) for b in self.blocks])

    W_in = property(lambda self: torch.stack([b.mlp.fc.weight.T for b in self.blocks]))
    """Into the neurons [layer, read, d_mlp]."""
    W_out = property(lambda self: torch.stack([b.mlp.out.weight.T for b in self.blocks]))
    """Out of them [layer, d_mlp, d_model]."""
    b_O = property(lambda self: torch.stack([_bias(b.attn.out) for b in self.blocks]))
    b_in = property(lambda self: torch.stack([_bias(b.mlp.fc) for b in self.blocks]))
    b_out = property(lambda self: torch.stack([_bias(b.mlp.out) for b in self.blocks]))

    def _qkv(self) -> Float[Tensor, "part layer head read d_head"]:
        weights = torch.stack([block.attn.qkv.weight for block in self.blocks])
        return rearrange(weights, "layer (part h d) r -> part layer h r d", part=3, h=self.cfg.n_heads)

    def _qkv_bias(self) -> Float[Tensor, "part layer head d_head"]:
        biases = torch.stack([_bias(block.attn.qkv) for block in self.blocks])
        return rearrange(biases, "layer (part h d) -> part layer h d", part=3, h=self.cfg.n_heads)


def _bias(linear: Any) -> Float[Tensor, " out"]:
    return linear.weight.new_zeros(len(linear.weight)) if linear.bias is None else linear.bias

"""What the dense model's sublayers read: the norm of a site, and its response to a change of the stream."""

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from bridges.sites import Site


def norm_at(hf: GPT2LMHeadModel, site: Site) -> nn.LayerNorm:
    """The dense norm that reads at a site."""
    body: Any = hf.transformer
    if site.is_final:
        return body.ln_f
    block = body.h[site.layer]
    return block.ln_2 if site.reader == "mlp" else block.ln_1


def read_std(norm: nn.LayerNorm, stream: Float[Tensor, "*batch_pos d_dense"]) -> Float[Tensor, "*batch_pos 1"]:
    """What a norm divides each token's stream by, its epsilon included."""
    return (stream.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()


def read_change(
    gain: Float[Tensor, " d_dense"],
    std: Float[Tensor, ""] | Float[Tensor, "*#batch_pos 1"],
    vector: Float[Tensor, "*#batch_pos d_dense"],
) -> Float[Tensor, "*#batch_pos d_dense"]:
    """A norm's response to a small change of the stream: gain * (v - mean(v)) / std."""
    return gain.to(vector) * (vector - vector.mean(-1, keepdim=True)) / std

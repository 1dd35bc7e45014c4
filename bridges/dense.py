"""A frozen Hugging Face language model, evaluated sublayer by sublayer: the dense side of a bridge."""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from bridges.families import Anatomy, Resid
from sparse_model.config import SparseConfig, require
from sparse_model.model.lengths import check_length


@runtime_checkable
class Sublayered(Protocol):
    """What hybrids and evaluation need of a model; `DenseModel` and `SparseTransformer` both have it."""

    @property
    def n_layers(self) -> int: ...
    @property
    def d_model(self) -> int: ...
    def embed(self, tokens: Int[Tensor, "batch pos"]) -> Resid: ...
    def sublayer(self, i: int, resid: Resid) -> Resid: ...
    def unembed(self, resid: Resid, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_vocab"]: ...


class DenseModel(nn.Module):
    """A frozen language model as embed, 2L sublayers and unembed, each called on the HF modules directly.

    Always in eval mode (GPT-2's dropout would move the logits by 2.0) and without parameter gradients; gradients
    with respect to activations flow. Attention is forced to sdpa: eager attention without a mask is not causal.
    A model in bfloat16 or float16 computes its sublayers in that type and adds them up in float32.

    Raises ValueError, with the reason, for a model that is of none of the known families (`bridges.families`).
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.anatomy = Anatomy(model)
        self.hf = model
        self.hf.requires_grad_(False)
        if self.anatomy.family.sdpa:
            self.hf.set_attn_implementation("sdpa")
        self.eval()

    def train(self, mode: bool = True) -> "DenseModel":
        """Stays in eval mode whatever is asked."""
        return super().train(False)

    n_layers = property(lambda self: self.anatomy.n_layers)
    d_model = property(lambda self: self.anatomy.d_model)
    n_ctx = property(lambda self: self.anatomy.n_ctx)
    d_vocab = property(lambda self: self.anatomy.d_vocab)

    dtype = property(lambda self: self.hf.get_input_embeddings().weight.dtype)

    def embed(self, tokens: Int[Tensor, "batch pos"]) -> Resid:
        """Residual stream at site 0: token plus position embedding. Raises ValueError beyond the context."""
        check_length(tokens.shape[1], self.n_ctx)
        return self.anatomy.embed(tokens).to(torch.promote_types(self.dtype, torch.float32))

    def sublayer(self, i: int, resid: Resid) -> Resid:
        """Sublayer i with its residual add: site i to site i + 1."""
        read = self.anatomy.norm(i)(resid.to(self.dtype))
        return resid + (self.anatomy.mlp if i % 2 else self.anatomy.attend)(i // 2, read)

    def unembed(
        self, resid: Resid, tokens: Int[Tensor, "batch pos"] | None = None
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits from the residual stream at site 2L. The tokens are not needed; they keep the interface equal."""
        return self.anatomy.head(self.anatomy.norm(2 * self.n_layers)(resid.to(self.dtype)))

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits of every position."""
        resid = self.embed(tokens)
        for i in range(2 * self.n_layers):
            resid = self.sublayer(i, resid)
        return self.unembed(resid)


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Bring a model's parameters to a type. Its buffers stay: rotary frequencies lose positions in bfloat16."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def check_fit(dense: DenseModel, sparse: SparseConfig) -> None:
    """Raise ValueError unless a dense and a sparse model have the same depth and vocabulary and a context that fits."""
    require(
        dense.n_layers == sparse.n_layers,
        "sparse.n_layers",
        sparse.n_layers,
        f"the dense model has {dense.n_layers} layers and each sublayer needs its partner: use {dense.n_layers}",
    )
    require(
        dense.d_vocab == sparse.d_vocab,
        "sparse.d_vocab",
        sparse.d_vocab,
        f"the dense model's vocabulary has {dense.d_vocab} tokens: use {dense.d_vocab}",
    )
    require(
        dense.n_ctx >= sparse.n_ctx,
        "sparse.n_ctx",
        sparse.n_ctx,
        f"the dense model's context holds {dense.n_ctx} tokens: use at most that",
    )

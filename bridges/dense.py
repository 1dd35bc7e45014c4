"""Any HF GPT-2, frozen, evaluated sublayer by sublayer: the dense side of a bridge."""

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from sparse_model.config import SparseConfig, require
from sparse_model.io.local import local_path
from sparse_model.model.transformer import check_length

Resid = Float[Tensor, "batch pos d_model"]


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
    """A frozen GPT2LMHeadModel as embed, 2L sublayers and unembed, each called on the HF modules directly.

    Always in eval mode (GPT-2's dropout would move the logits by 2.0) and without parameter gradients; gradients
    with respect to activations flow. Attention is forced to sdpa: eager attention without a mask is not causal.
    A model in bfloat16 or float16 computes its sublayers in that type and adds them up in float32.
    """

    def __init__(self, model: GPT2LMHeadModel) -> None:
        super().__init__()
        self.hf = model
        self.hf.requires_grad_(False)
        self.hf.set_attn_implementation("sdpa")
        self.eval()

    def train(self, mode: bool = True) -> "DenseModel":
        """Stays in eval mode whatever is asked."""
        return super().train(False)

    n_layers = property(lambda self: self.hf.config.n_layer)
    d_model = property(lambda self: self.hf.config.n_embd)
    n_ctx = property(lambda self: self.hf.config.n_positions)
    d_vocab = property(lambda self: self.hf.config.vocab_size)

    dtype = property(lambda self: self.hf.transformer.wte.weight.dtype)

    def embed(self, tokens: Int[Tensor, "batch pos"]) -> Resid:
        """Residual stream at site 0: token plus position embedding. Raises ValueError beyond the context."""
        check_length(tokens.shape[1], self.n_ctx)
        body = self.hf.transformer
        resid = body.wte(tokens) + body.wpe.weight[: tokens.shape[1]]
        return resid.to(torch.promote_types(self.dtype, torch.float32))

    def sublayer(self, i: int, resid: Resid) -> Resid:
        """Sublayer i with its residual add: site i to site i + 1."""
        block: Any = self.hf.transformer.h[i // 2]
        if i % 2 == 0:
            return resid + block.attn(block.ln_1(resid.to(self.dtype)))[0]
        return resid + block.mlp(block.ln_2(resid.to(self.dtype)))

    def unembed(
        self, resid: Resid, tokens: Int[Tensor, "batch pos"] | None = None
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits from the residual stream at site 2L. The tokens are not needed; they keep the interface equal."""
        return self.hf.lm_head(self.hf.transformer.ln_f(resid.to(self.dtype)))

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits of every position."""
        resid = self.embed(tokens)
        for i in range(2 * self.n_layers):
            resid = self.sublayer(i, resid)
        return self.unembed(resid)


def load_gpt2(name_or_folder: str | Path, dtype: torch.dtype = torch.float32) -> GPT2LMHeadModel:
    """A GPT-2 from a local folder or by hub name.

    Raises FileNotFoundError for a path without a model, ValueError for another architecture or a name that cannot
    be fetched, each naming what was asked for.
    """
    name = str(name_or_folder)
    path = local_path(name_or_folder)
    if path is not None:
        if not (path / "config.json").is_file():
            raise FileNotFoundError(
                f"no model at {path}: the folder needs config.json and model.safetensors, as save_pretrained writes"
            )
        name = str(path)
    try:
        model = GPT2LMHeadModel.from_pretrained(name, dtype=dtype, use_safetensors=True)
    except Exception as error:  # transformers, the hub client and safetensors raise many kinds
        raise ValueError(f"could not load a GPT-2 from {name!r}: {error}") from error
    if model.config.model_type != "gpt2":
        raise ValueError(f"{name!r} is a {model.config.model_type!r} model; only GPT-2 can be the dense model")
    return model


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

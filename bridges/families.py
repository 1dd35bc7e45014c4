"""Where things are in a Hugging Face language model: one row for each family whose blocks are sequential and pre-norm.

Such a block adds attention(norm(x)) to the residual stream x, and then mlp(norm(x)): the stream between them is a site
of its own. `Anatomy` finds a model's parts by its family's row; everything else in this library asks it.
"""

from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.masking_utils import create_sliding_window_causal_mask

Resid = Float[Tensor, "batch pos d_model"]


@dataclass(frozen=True, kw_only=True)
class Family:
    """Names of a family's parts."""

    body: str
    """The stack of blocks, below the model with its head. Embeddings, blocks and the final norm lie below it."""
    embedding: str
    positions: str | None = None
    """The table of learned positions; unset: rotary ones, which each attention is given."""
    blocks: str
    norms: tuple[str, str]
    """Below a block: what attention reads through, and what the MLP does."""
    attention: str
    mlp: tuple[str, ...]
    """One after the other."""
    final_norm: str
    gain_offset: float = 0.0
    """What a norm adds to its weight before it multiplies by it."""
    sdpa: bool = True
    """Whether attention masks by itself under sdpa; otherwise its eager form does."""


_GPT2 = Family(
    body="transformer",
    embedding="wte",
    positions="wpe",
    blocks="h",
    norms=("ln_1", "ln_2"),
    attention="attn",
    mlp=("mlp",),
    final_norm="ln_f",
)
_GPT_NEO = replace(_GPT2, sdpa=False)
_OPT = Family(
    body="model.decoder",
    embedding="embed_tokens",
    positions="embed_positions",
    blocks="layers",
    norms=("self_attn_layer_norm", "final_layer_norm"),
    attention="self_attn",
    mlp=("fc1", "activation_fn", "fc2"),
    final_norm="final_layer_norm",
)
_LLAMA = Family(
    body="model",
    embedding="embed_tokens",
    blocks="layers",
    norms=("input_layernorm", "post_attention_layernorm"),
    attention="self_attn",
    mlp=("mlp",),
    final_norm="norm",
)
_GEMMA = replace(_LLAMA, gain_offset=1.0)

FAMILIES = {
    "gpt2": _GPT2,
    "gpt_neo": _GPT_NEO,
    "opt": _OPT,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _GEMMA,
    "phi3": _LLAMA,
    "smollm3": _LLAMA,
    "starcoder2": _LLAMA,
    "stablelm": _LLAMA,
}
"""By `model_type` of a model's config."""

_PARALLEL = ("gptj", "gpt_neox", "phi", "codegen", "cohere", "cohere2", "falcon")


def refusal(config: PretrainedConfig) -> str | None:
    """Why a model of this config cannot be the dense model, as the end of a sentence; None where it can."""
    kind = config.model_type
    if getattr(config, "quantization_config", None) is not None:
        return "is quantised, and gradients have to pass through its layers: give the unquantised model"
    if kind in _PARALLEL or getattr(config, "use_parallel_residual", False):
        return (
            f"is a {kind!r} model whose attention and MLP read the stream side by side, with no site between them to "
            f"bridge: give a model with sequential blocks ({', '.join(FAMILIES)})"
        )
    if kind not in FAMILIES:
        named = ", ".join(getattr(config, "architectures", None) or ["no class"])
        return (
            f"is a {kind!r} model (its config names {named}); the dense model must be a causal language model with "
            f"sequential pre-norm blocks, of one of these types: {', '.join(FAMILIES)}"
        )
    if kind == "opt" and not (config.do_layer_norm_before and config.word_embed_proj_dim == config.hidden_size):
        return "is an OPT that norms behind its sublayers (as opt-350m does): give a pre-norm one, such as opt-125m"
    return None


class ReadNorm(NamedTuple):
    """What a norm does, as arithmetic: gain * (x - mean(x)) / std(x), or gain * x / rms(x) for an RMSNorm."""

    gain: Float[Tensor, " d_model"]
    eps: float
    centred: bool
    """Whether it takes the mean away, as LayerNorm does."""

    def centre(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """x as far as the norm sees it."""
        return x - x.mean(-1, keepdim=True) if self.centred else x

    def scale(self, stream: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch 1"]:
        """What a stream is divided by: its standard deviation or RMS, epsilon included."""
        square = stream.var(-1, correction=0, keepdim=True) if self.centred else stream.square().mean(-1, keepdim=True)
        return (square + self.eps).sqrt()

    def response(self, change: Float[Tensor, "*#batch d_model"], scale: Tensor) -> Float[Tensor, "*tokens d_model"]:
        """How the output moves for a small change of a stream of that scale."""
        return self.gain.to(change) * self.centre(change) / scale


def _in_memory(norm: nn.Module) -> Tensor:
    """A norm's weight, also where accelerate has offloaded it."""
    weight: Any = norm.weight
    if not weight.is_meta:
        return weight.detach()
    from accelerate.utils import align_module_device

    with align_module_device(norm):
        loaded: Any = norm.weight
        return loaded.detach().clone()


class Anatomy:
    """The parts of a model of a known family. Raises ValueError, with the reason, for any other model."""

    def __init__(self, model: PreTrainedModel) -> None:
        reason = refusal(model.config)
        if reason:
            raise ValueError(f"this {type(model).__name__} {reason}")
        self.model, self.family = model, FAMILIES[model.config.model_type]

    n_layers = property(lambda self: self.model.config.num_hidden_layers)
    d_model = property(lambda self: self.model.config.hidden_size)
    n_ctx = property(lambda self: self.model.config.max_position_embeddings)
    d_vocab = property(lambda self: self.model.config.vocab_size)
    n_heads = property(lambda self: self.model.config.num_attention_heads)

    @property
    def d_mlp(self) -> int:
        """MLP neurons per layer."""
        names = ("n_inner", "intermediate_size", "ffn_dim")
        given = (getattr(self.model.config, name, None) for name in names)
        return next((width for width in given if width), 4 * self.d_model)

    @property
    def body(self) -> Any:
        """The module through which every pass goes, from tokens to what the head reads."""
        return attrgetter(self.family.body)(self.model)

    @property
    def blocks(self) -> Any:
        """The blocks in order."""
        return getattr(self.body, self.family.blocks)

    @property
    def head(self) -> nn.Linear:
        """From the final norm's output to the logits."""
        return self.model.get_output_embeddings()

    def attention(self, layer: int) -> nn.Module:
        """A layer's attention; the first entry of its output is what it adds to the stream."""
        return getattr(self.blocks[layer], self.family.attention)

    def norm(self, site: int) -> nn.Module:
        """The norm that reads at a site: before attention (even), before the MLP (odd), before the head (2L)."""
        if site == 2 * self.n_layers:
            return getattr(self.body, self.family.final_norm)
        return getattr(self.blocks[site // 2], self.family.norms[site % 2])

    def read_norm(self, site: int) -> ReadNorm:
        """That norm as arithmetic."""
        norm: Any = self.norm(site)
        eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
        gain = torch.ones(self.d_model) if norm.weight is None else _in_memory(norm) + self.family.gain_offset
        return ReadNorm(gain, eps, isinstance(norm, nn.LayerNorm))

    def embed(self, tokens: Int[Tensor, "batch pos"]) -> Resid:
        """Token embeddings, with learned positions where the family has them."""
        embedded = getattr(self.body, self.family.embedding)(tokens)
        if self.family.positions is None:
            return embedded
        table = getattr(self.body, self.family.positions)
        first = getattr(table, "offset", 0)  # OPT's
        return embedded + table.weight[first : first + tokens.shape[1]]

    def attend(self, layer: int, read: Resid) -> Resid:
        """A layer's attention on what it reads, the first position being 0; nothing is padding."""
        attention = self.attention(layer)
        if self.family.positions is not None:
            return attention(read)[0]
        ids = torch.arange(read.shape[1], device=read.device)[None]
        mask = None  # sdpa is causal without one
        if self._slides(layer):
            mask = create_sliding_window_causal_mask(
                self.model.config, read, attention_mask=None, past_key_values=None, position_ids=ids
            )
        return attention(read, position_embeddings=self.body.rotary_emb(read, ids), attention_mask=mask)[0]

    def mlp(self, layer: int, read: Resid) -> Resid:
        """A layer's MLP on what it reads."""
        for part in self.family.mlp:
            read = getattr(self.blocks[layer], part)(read)
        return read

    def _slides(self, layer: int) -> bool:
        """Whether a layer's attention sees a window only."""
        kinds = getattr(self.model.config, "layer_types", None)
        if kinds:
            return kinds[layer] == "sliding_attention"
        return getattr(self.model.config, "sliding_window", None) is not None

"""Configuration of the weight-sparse model and its training: frozen, keyword-only, validated."""

import dataclasses
import json
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from sparse_model.io.atomic import write_text
from sparse_model.io.reading import NOTHING_ELSE, read_typed

TOPK_LOCATIONS = ("attn_in", "attn_q", "attn_k", "attn_v", "attn_out", "mlp_in", "mlp_neuron", "mlp_out")
"""The paper's eight AbsTopK locations: residual reads, q, k, v, residual writes, MLP neurons."""

_LARGEST_SIZE = 2**24
"""Of a width or a count; the product of two is still a number of weights that torch can name."""

T = TypeVar("T")


class InvalidOption(ValueError):
    """A value that an option cannot have; the message names option, value and remedy."""


def require(condition: bool, name: str, value: Any, remedy: str) -> None:
    """Raise InvalidOption, a ValueError, unless the condition holds."""
    if not condition:
        raise InvalidOption(f"{name}={value!r}: {remedy}")


def check_choices(config: Any) -> None:
    """Raise ValueError for a field whose annotation lists its values and which has another one."""
    for name, hint in typing.get_type_hints(type(config)).items():
        if typing.get_origin(hint) is Literal:
            choices = typing.get_args(hint)
            require(getattr(config, name) in choices, name, getattr(config, name), f"use one of {', '.join(choices)}")


@dataclass(frozen=True, kw_only=True)
class SparseConfig:
    """Architecture of the weight-sparse transformer (paper 2.1, A.1)."""

    __pydantic_config__ = NOTHING_ELSE

    n_layers: int = 2
    """Transformer layers; a bridged model has as many as its dense model."""
    d_model: int = 128
    """Width of the residual stream."""
    d_mlp: int = 512
    """MLP neurons per layer."""
    n_heads: int = 8
    """Attention heads per layer."""
    d_head: int = 16
    """Width of a head; the paper's is 16."""
    n_ctx: int = 64
    """Longest sequence, in tokens."""
    d_vocab: int = 512
    """Vocabulary size."""
    positions: Literal["none", "learned", "concat_learned", "concat_sinusoidal"] = "none"
    """Position information: none, added to the embedding, or concatenated to every residual read, read-only."""
    d_pos: int = 0
    """Width of concatenated positions."""
    sink: bool = False
    """One learned logit per head that enters only the softmax denominator."""
    bigram: Literal["none", "learned", "fixed"] = "learned"
    """Dense d_vocab x d_vocab table whose row of the current token is added to the logits."""
    act_fn: Literal["gelu", "relu"] = "gelu"
    """MLP non-linearity (exact GELU)."""
    topk_fraction: float = 0.25
    """Share of each location's width that AbsTopK keeps (rounded down)."""
    topk_locations: tuple[str, ...] = TOPK_LOCATIONS
    """Where AbsTopK acts."""
    bias: bool = True
    """Whether linear maps have biases."""
    tied: bool = False
    """Whether the unembedding is the embedding."""
    embed_std: float = 0.1
    """Standard deviation of the initial embedding."""

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("n_layers", "d_model", "d_mlp", "n_heads", "d_head", "n_ctx", "d_vocab"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
            require(getattr(self, name) <= _LARGEST_SIZE, name, getattr(self, name), "no model is that large")
        require(self.n_heads * self.d_head <= _LARGEST_SIZE, "n_heads", self.n_heads, "no model is that large")
        require(self.n_ctx * self.d_pos <= 2**28, "d_pos", self.d_pos, "no model is that large")
        require(0 < self.topk_fraction <= 1, "topk_fraction", self.topk_fraction, "must lie in (0, 1]")
        known = (*TOPK_LOCATIONS, "resid_post_attn", "resid_post_mlp")
        for location in self.topk_locations:
            require(location in known, "topk_locations", location, f"use any of {', '.join(known)}")
        concat = self.positions.startswith("concat")
        require(
            self.d_pos >= 0 and concat == (self.d_pos > 0),
            "d_pos",
            self.d_pos,
            "positive for concatenated positions, else 0",
        )
        require(
            int(self.topk_fraction * min(self.d_model, self.n_heads * self.d_head, self.d_mlp)) >= 1,
            "topk_fraction",
            self.topk_fraction,
            "keeps no entry at all of the narrowest location",
        )

    @property
    def n_sites(self) -> int:
        """Residual sites: before each sublayer and after the last (paper 3.3)."""
        return 2 * self.n_layers + 1


@dataclass(frozen=True, kw_only=True)
class SparsityConfig:
    """Weight sparsity and its annealing (paper A.2)."""

    __pydantic_config__ = NOTHING_ELSE

    nonzero_fraction: float = 1 / 64
    """Share of each matrix's entries that stay nonzero at the end."""
    embed_fraction: float | None = None
    """The same for embedding and unembedding; nonzero_fraction where unset."""
    bias_fraction: float | None = None
    """The same for biases; nonzero_fraction where unset."""
    min_per_neuron: int = 1
    """j: the fewest nonzeros of any neuron or attention channel."""
    anneal: Literal["linear", "log"] = "log"
    """Course of the kept fraction from 1 to its target: linear, or linear in the logarithm."""
    anneal_start: float = 0.0
    """Share of the steps after which annealing starts."""
    anneal_stop: float = 0.35
    """Share of the steps after which the target is reached."""
    topk_anneal_stop: float = 0.0
    """Share of the steps over which the share that AbsTopK keeps falls, evenly in its logarithm, from 1 to
    sparse.topk_fraction (and that of the encoders to bridge.encoder_topk); 0: it is there from the first step."""

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("nonzero_fraction", "embed_fraction", "bias_fraction"):
            value = getattr(self, name)
            require(value is None or 0 < value <= 1, name, value, "must lie in (0, 1]")
        require(self.min_per_neuron >= 0, "min_per_neuron", self.min_per_neuron, "must not be negative")
        require(
            0 <= self.anneal_start <= self.anneal_stop <= 1,
            "anneal_start, anneal_stop",
            (self.anneal_start, self.anneal_stop),
            "need 0 <= start <= stop <= 1",
        )
        require(0 <= self.topk_anneal_stop <= 1, "topk_anneal_stop", self.topk_anneal_stop, "must lie in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW as the paper runs it for sparse parameters (A.2)."""

    __pydantic_config__ = NOTHING_ELSE

    lr: float = 4e-3
    """Learning rate at a kept fraction of 1."""
    sharkfin: bool = True
    """Multiply the rate by 1/sqrt(kept fraction)."""
    warmup: float = 0.01
    """Share of the steps over which the rate rises linearly; it then falls linearly to zero."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 0.1
    """Large on purpose: with the gradient's RMS near 1, entries of small gradient hardly move."""
    weight_decay: float = 0.1
    """Decoupled, on matrices only."""
    grad_rms: Literal["always", "clip"] = "always"
    """Divide the gradient by its RMS over all sparse parameters: always, or only where that exceeds 1."""

    def __post_init__(self) -> None:
        check_choices(self)
        require(self.lr > 0, "lr", self.lr, "must be positive")
        require(0 <= self.warmup < 1, "warmup", self.warmup, "must lie in [0, 1)")
        require(self.eps > 0, "eps", self.eps, "must be positive")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What training a sparse model takes, alone or beside a dense one."""

    __pydantic_config__ = NOTHING_ELSE

    tokenizer: str | None = None
    """Local folder or hub name; unset: the dense model's own where there is one, or a BPE trained on the corpus."""
    corpus: str = "generated"
    """Sources and token shares: generated, stdlib, packages (all that is installed) or packages=numpy+scipy, a path, a
    hub dataset, or self (sampled from the model of --dense); e.g. stdlib:0.5,packages:0.5."""
    corpus_tokens: int = 1_000_000
    """Training tokens taken from the corpus."""
    text_field: str | None = None
    """Field that holds the text in .jsonl files and hub datasets; unset: text, content or code."""
    special_tokens: Literal["text", "ids"] = "text"
    """What a special token of the tokenizer, such as <|endoftext|>, is where a text spells it out: text like any
    other, or the one id that it names."""
    documents: Literal["joined", "apart"] = "joined"
    """How documents become blocks of n_ctx tokens. joined: one behind the other, each behind end-of-text, the stream
    cut into blocks. apart: every block is the head of one document, behind beginning-of-text where the tokenizer has
    that token; shorter documents are left out."""
    seed: int = 0
    """Seeds initial weights, batch order and everything else that is drawn."""
    steps: int = 6000
    """Optimizer steps."""
    batch_size: int = 4
    """Blocks of n_ctx tokens per batch and process."""
    accumulate: int = 1
    """Batches whose gradients add up to one step."""
    compile: bool = False
    """Run the sparse model's sublayers through torch.compile; the first steps take longer. Needs a C++ compiler."""
    tf32: bool = False
    """On a CUDA device in fp32: matrix products in TF32 and attention in bfloat16."""
    log_every: int = 50
    """Steps between lines of metrics.jsonl."""
    checkpoint_every: int = 1000
    """Steps between checkpoints."""
    bigram_init: Literal["zeros", "counts"] = "zeros"
    """Where a learned bigram table begins: at zero, or at what counting pairs of tokens in the training text gives."""
    eval_tokens: int = 32_768
    """Held-out tokens of the evaluation."""
    sparse: SparseConfig = field(default_factory=SparseConfig)
    """Architecture of the sparse model."""
    sparsity: SparsityConfig = field(default_factory=SparsityConfig)
    """Weight sparsity."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer of the sparse model."""

    def __post_init__(self) -> None:
        for name in (
            "corpus_tokens",
            "steps",
            "batch_size",
            "accumulate",
            "log_every",
            "checkpoint_every",
            "eval_tokens",
        ):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        check_choices(self)
        require(
            not (self.compile and self.sparsity.topk_anneal_stop),
            "compile",
            self.compile,
            "every share of AbsTopK would be compiled anew: leave it out, or topk_anneal_stop",
        )


def differing(a: Any, b: Any) -> list[str]:
    """Names of the fields in which two configurations of one class differ."""
    return [f.name for f in dataclasses.fields(a) if getattr(a, f.name) != getattr(b, f.name)]


def to_json(config: Any, path: Path) -> None:
    """Write a config dataclass as JSON, by way of a temporary name."""
    write_text(path, json.dumps(dataclasses.asdict(config), indent=2) + "\n")


def from_json(cls: type[T], path: Path) -> T:
    """Read a config back, strictly.

    Raises FileNotFoundError for a missing file and ValueError, naming file, key and value, for anything unknown, of
    another type or out of range.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: is {path.parent} a run or model folder?")
    return read_typed(cls, path, "correct it, or copy it again from where the folder came")


def check_folder(config: TrainConfig, folder: Path, resume: bool) -> None:
    """Raise where a folder holds a run that one of this configuration must not overwrite.

    FileExistsError for a folder in use without `resume` or for a file of that name, ValueError for other settings.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file: name another folder with --run")
    path = folder / "config.json"
    if path.exists():
        if not resume:
            raise FileExistsError(
                f"{folder} already holds a run: add --resume to go on with it, or name another folder with --run"
            )
        different = differing(from_json(type(config), path), config)
        if different:
            raise ValueError(
                f"{path} has other settings ({', '.join(different)}): resume with the same ones, or name neither "
                "preset nor options, which are then taken from there"
            )


def claim_folder(config: TrainConfig, folder: Path, resume: bool) -> None:
    """Write config.json into a run folder, once everything that can be checked has been. Raises as `check_folder`."""
    check_folder(config, folder, resume)
    if not (folder / "config.json").exists():
        to_json(config, folder / "config.json")

"""Configuration of a run, and its presets."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Literal

from sparse_model.config import OptimConfig, SparseConfig, SparsityConfig, TrainConfig, check_choices, require
from sparse_model.io.reading import NOTHING_ELSE


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Weights of the joint loss' terms, each a sum over all sites (paper 3.3 gives none)."""

    __pydantic_config__ = NOTHING_ELSE

    ce: float = 1.0
    """Cross-entropy of the sparse model."""
    nmse_encode: float = 1.0
    """NMSE of the encoders."""
    nmse_through_target: bool = True
    """Let the encoders' NMSE also move the sparse stream that they predict (numerator and denominator)."""
    nmse_decode: float = 1.0
    """NMSE of the decoders."""
    kl_dense_to_sparse: float = 1 / 3
    """KL of the hybrids that start dense and end sparse."""
    kl_sparse_to_dense: float = 1 / 3
    """KL of the hybrids that start sparse and end dense."""

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            require(value >= 0, f"weights.{name}", value, "must not be negative")


@dataclass(frozen=True, kw_only=True)
class BridgeConfig:
    """Bridges and the hybrid losses."""

    __pydantic_config__ = NOTHING_ELSE

    encoder_topk: float = 0.25
    """Share of the sparse width that an encoder's AbsTopK keeps."""
    lr: float = 1e-2
    """Peak learning rate of bridges and bigram table."""
    eps: float = 1e-8
    """Adam's epsilon for them."""
    clip: float = 1.0
    """Clip their gradient norm to this."""
    sites: Literal["all"] | int = 1
    """Sites whose hybrids run each step, per direction: all, or this many drawn at random and re-weighted."""
    paths: int = 0
    """Where positive, this many random mixed paths per step, with any number of crossings, instead of those sites."""
    kl_positions: float = 0.25
    """Share of the positions at which the hybrid KLs are evaluated, drawn anew each step."""
    logits_at_once: int = 6 * 2**20
    """Logits in memory at a time (tokens x vocabulary); more is faster on a GPU."""
    hybrid_batch: int | None = None
    """Sequences of a batch that go through a hybrid pass at a time; fewer take less memory. Unset: all."""
    checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them: a third slower, memory flat in depth."""
    weights: LossWeights = field(default_factory=LossWeights)
    """Weights of the loss terms."""

    def __post_init__(self) -> None:
        require(0 < self.encoder_topk <= 1, "bridge.encoder_topk", self.encoder_topk, "must lie in (0, 1]")
        require(0 < self.kl_positions <= 1, "bridge.kl_positions", self.kl_positions, "must lie in (0, 1]")
        require(self.sites == "all" or self.sites >= 1, "bridge.sites", self.sites, "'all' or at least 1")
        require(self.paths >= 0, "bridge.paths", self.paths, "must not be negative")
        require(self.logits_at_once >= 1, "bridge.logits_at_once", self.logits_at_once, "must be at least 1")
        require(
            self.hybrid_batch is None or self.hybrid_batch >= 1, "bridge.hybrid_batch", self.hybrid_batch, "at least 1"
        )
        require(self.lr > 0, "bridge.lr", self.lr, "must be positive")


@dataclass(frozen=True, kw_only=True)
class DenseTrainConfig:
    """The small GPT-2 trained where no dense model is named; depth, context and vocabulary are the sparse model's."""

    __pydantic_config__ = NOTHING_ELSE

    d_model: int = 64
    """Width of the residual stream."""
    n_heads: int = 4
    """Attention heads per layer."""
    steps: int = 800
    """Optimizer steps."""
    batch_size: int = 32
    """Blocks of n_ctx tokens per step."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """AdamW for all, or Muon for the blocks' matrices and AdamW at 3e-3 for the rest; Muon's lr lies near 4e-3."""
    lr: float = 3e-3
    """Peak learning rate of AdamW, or of Muon (2 % warm-up, cosine decay to a tenth)."""
    bf16_on_cpu: bool = False
    """Products in bfloat16, as on GPUs, on CPUs that have instructions for them (AVX512-BF16, AMX)."""
    positions: bool = False
    """Learned position embeddings; without, they are zero, as in the paper's models and in the sparse one."""
    seed: int = 0
    """Seeds initial weights and batch order of the dense model."""

    def __post_init__(self) -> None:
        check_choices(self)
        require(self.d_model % self.n_heads == 0, "dense_train.n_heads", self.n_heads, "must divide d_model")
        require(self.steps >= 1, "dense_train.steps", self.steps, "must be at least 1")
        require(self.lr > 0, "dense_train.lr", self.lr, "must be positive")


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How the corpus source `self` draws documents from the dense model."""

    __pydantic_config__ = NOTHING_ELSE

    temperature: float = 1.0
    """What the dense model's logits are divided by; 1 samples from what it learned."""
    prompts: str | None = None
    """Text file whose lines the documents begin with, in turn; unset: they begin with the beginning-of-text token."""
    longest: int | None = None
    """Tokens after which a document is cut; unset: the dense model's context, at most 1,024."""
    batch_size: int = 32
    """Documents sampled at a time."""
    seed: int = 0
    """Seeds the samples."""

    def __post_init__(self) -> None:
        require(0 < self.temperature < math.inf, "samples.temperature", self.temperature, "must be positive")
        require(self.longest is None or self.longest >= 2, "samples.longest", self.longest, "must be at least 2")
        require(self.batch_size >= 1, "samples.batch_size", self.batch_size, "must be at least 1")


@dataclass(frozen=True, kw_only=True)
class RunConfig(TrainConfig):
    """Everything that shapes a run; saved as config.json in its folder."""

    dense: str | None = None
    """Local folder or hub name of the model to bridge (GPT-2, Llama, ...), from which on the command line the sparse
    model's shape follows, or the name of a bundle in the package; unset: a small GPT-2 is trained on the corpus."""
    start_from: str | None = None
    """Where the sparse model's weights begin: unset: random; dense: as the dense model's own (a GPT-2), bridges too, in
    a basis that AbsTopK hurts little; or the run of one trained alone (train-sparse), or the name of a bundle in the
    package, of this shape and tokenizer."""
    dense_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type in which the frozen dense model's sublayers run during training."""
    samples: SampleConfig = field(default_factory=SampleConfig)
    """Text from the dense model, where `self` is in the corpus."""
    bridge: BridgeConfig = field(default_factory=BridgeConfig)
    """Bridges and hybrid losses."""
    dense_train: DenseTrainConfig = field(default_factory=DenseTrainConfig)
    """The small dense model, where one is trained."""


KEPT = ("config.json", "dense-config.json")
"""Where a run folder keeps the configuration that it was begun with; the second is that of train-dense."""

PRESETS: dict[str, tuple[str, RunConfig]] = {
    "demo": (
        "2 layers on generated Python; minutes on two CPU cores",
        # Of the dense seeds tried (0, 1, 2, 4, 5, 6) the one where a single read decides the quote most surely, on
        # selection prompts; in others two sublayers share the work, and no read-only edit can flip the answer.
        RunConfig(dense_train=DenseTrainConfig(seed=4)),
    ),
    "tiny": (
        "trains in ten seconds, for tests; too short to steer",
        RunConfig(
            corpus_tokens=60_000,
            steps=60,
            batch_size=8,
            log_every=10,
            checkpoint_every=25,
            eval_tokens=2048,
            sparse=SparseConfig(d_model=64, d_mlp=128, n_heads=4, n_ctx=48, d_vocab=384),
            sparsity=SparsityConfig(nonzero_fraction=1 / 16),
            dense_train=DenseTrainConfig(d_model=32, n_heads=2, steps=60, batch_size=16),
        ),
    ),
    "stdlib": (
        "4 layers on real code, more than half of it the standard library's; about 55 minutes on one CPU core",
        RunConfig(
            corpus="generated:0.45,stdlib:0.55",
            corpus_tokens=6_000_000,
            steps=5000,
            sparse=SparseConfig(n_layers=4, d_model=256, d_mlp=1024, n_heads=16, n_ctx=128, d_vocab=2048),
            dense_train=DenseTrainConfig(d_model=128, n_heads=4, steps=3000, batch_size=16),
        ),
    ),
    "code": (
        "4 layers on real code, the sparse model begun as the dense one; a night on one CPU core, minutes on one GPU",
        RunConfig(
            start_from="dense",
            corpus="packages:0.85,stdlib:0.15",
            corpus_tokens=33_000_000,
            steps=8000,
            batch_size=4,
            tf32=True,
            checkpoint_every=250,
            sparse=SparseConfig(
                n_layers=4,
                d_model=256,
                d_mlp=1024,
                n_heads=4,
                d_head=64,
                n_ctx=256,
                d_vocab=2048,
                bigram="none",
                positions="learned",
                topk_fraction=0.5,
            ),
            sparsity=SparsityConfig(nonzero_fraction=1 / 4, bias_fraction=1.0, anneal_stop=0.5, topk_anneal_stop=0.3),
            optim=OptimConfig(lr=1e-3),
            bridge=BridgeConfig(encoder_topk=0.5, lr=5e-4),
            dense_train=DenseTrainConfig(
                d_model=256,
                n_heads=4,
                steps=8000,
                batch_size=16,
                optimizer="muon",
                lr=4e-3,
                bf16_on_cpu=True,
                positions=True,  # held-out loss 1.750 nats, 1.843 without
            ),
        ),
    ),
    "gpt2": (
        "bridges into GPT-2 small on a GPU node",
        RunConfig(
            dense="gpt2",
            corpus="codeparrot/codeparrot-clean",
            corpus_tokens=100_000_000,
            steps=100_000,
            batch_size=32,
            checkpoint_every=1000,
            eval_tokens=131_072,
            sparse=SparseConfig(
                n_layers=12,
                d_model=1536,
                d_mlp=6144,
                n_heads=96,
                n_ctx=256,
                d_vocab=50257,
                bigram="none",
                positions="learned",
            ),
            sparsity=SparsityConfig(nonzero_fraction=1 / 128, min_per_neuron=4, anneal="linear", anneal_stop=0.5),
            optim=OptimConfig(lr=1.28e-3),
            tf32=True,
            dense_dtype="bfloat16",
            bridge=BridgeConfig(lr=1e-3, logits_at_once=2**27),
        ),
    ),
}
"""Named configurations with a line that says what each is for."""

"""The settings of pruning. Nothing heavy is imported here: the command line reads them to print its help."""

from dataclasses import dataclass
from typing import Literal

from sparse_model.config import check_choices, require

AblationKind = Literal["mean", "zero", "resample"]
OutsideKind = Literal["all", "random", "adversary"]


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """Node pruning; the defaults are the centres of the paper's search where it gives them (A.5)."""

    steps: int = 300
    """Optimizer steps."""
    pairs: int = 64
    """Task pairs per step."""
    pool: int = 512
    """Training pairs that the steps draw from."""
    selection_pairs: int = 64
    """Selection pairs on which the smallest circuit is chosen and calibrated."""
    target_loss: float = 0.15
    """Two-way task loss that the circuit must reach, nats."""
    k_coef: float = 1e-3
    """Price of a kept node, nats (the paper's centre is 1e-4)."""
    init_noise_scale: float = 1e-2
    """Standard deviation of the initial tau."""
    init_noise_bias: float = 1e-1
    """Mean of the initial tau."""
    heaviside_temp: float = 1.0
    """Temperature of the sigmoid whose derivative is the gate's; far below 1, deleted nodes hardly come back (ours)."""
    lr: float = 1e-2
    """Peak learning rate (the paper's centre is 3e-3)."""
    weight_decay: float = 1e-3
    """Decoupled weight decay of tau."""
    beta1: float = 0.9
    """Decay of AdamW's first moment (ours)."""
    beta2: float = 0.95
    """Decay of its second moment."""
    warmup: float = 0.05
    """Share of the steps over which the rate rises."""
    grad_clip: float = 1.0
    """Largest norm of tau's gradient (ours)."""
    ablation: AblationKind = "mean"
    """What deleted nodes are replaced by."""
    outside: OutsideKind = "all"
    """Which nodes outside the circuit are ablated while it is sought: all (the paper); each at a random rate, prompt by
    prompt; or so for every other pair, for the rest the subset that an adversary finds worst (ours)."""
    tied_qk: bool = False
    """Whether a q and a k channel of the same index share a gate and count as one node."""
    eliminate: bool = True
    """Delete nodes one by one as long as the target stays reached, after the bisection (ours)."""
    reference_tokens: int = 16_384
    """Held-out tokens from which ablated values are taken."""
    resample_tokens: int = 1024
    """Tokens of them whose values are kept for `resample`."""
    lbfgs_steps: int = 16
    """Steps of the calibration."""
    seed: int = 0
    """Seeds the initial tau, the batches, and what is resampled."""

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("steps", "pairs", "pool", "selection_pairs", "reference_tokens", "resample_tokens", "lbfgs_steps"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        for name in ("target_loss", "heaviside_temp", "lr", "grad_clip"):
            require(getattr(self, name) > 0, name, getattr(self, name), "must be positive")
        for name in ("k_coef", "init_noise_scale", "weight_decay"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "must not be negative")
        for name in ("beta1", "beta2", "warmup"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "must lie in [0, 1)")
        require(-1 <= self.init_noise_bias <= 1, "init_noise_bias", self.init_noise_bias, "must lie in [-1, 1]")
        require(self.pairs <= self.pool, "pairs", self.pairs, f"must not exceed the pool of {self.pool} training pairs")

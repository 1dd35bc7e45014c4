"""The optimizer rules of weight-sparse training: gradient RMS, sharkfin schedule, decay on matrices only (A.2)."""

import math
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sparse_model.config import OptimConfig


def adamw(parameters: Iterable[nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW with decoupled decay on matrices only. Vectors (biases, gains, sinks) are not decayed."""
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for p in parameters:
        if p.requires_grad:
            (matrices if p.ndim > 1 else vectors).append(p)
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def schedule(progress: float, config: OptimConfig, kept_fraction: float = 1.0) -> float:
    """Factor on the learning rate at `progress` (share of all steps done): warm-up, linear decay, sharkfin.

    The sharkfin factor 1/sqrt(kept fraction) grows while annealing removes weights (A.2: annealing brings nothing
    without it).
    """
    rise = min(1.0, progress / config.warmup) if config.warmup > 0 else 1.0
    fall = max(0.0, 1 - progress) / (1 - config.warmup) if progress > config.warmup else 1.0
    return rise * fall * (1 / math.sqrt(kept_fraction) if config.sharkfin else 1.0)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


@torch.no_grad()
def normalize_grad_rms_(parameters: list[nn.Parameter], rule: str) -> Float[Tensor, ""]:
    """Divide all gradients by their joint root mean square, "always" or only where it exceeds 1 ("clip").

    Returns the RMS before the division, on the device. An unknown rule is a ValueError.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(grads))
    rms = norms.norm() / math.sqrt(sum(g.numel() for g in grads))
    if rule == "always":
        scale = 1 / (rms + 1e-5)
    elif rule == "clip":
        scale = 1 / rms.clamp(min=1.0)
    else:
        raise ValueError(f"grad_rms={rule!r}: must be 'always' or 'clip'")
    torch._foreach_mul_(grads, scale)
    return rms

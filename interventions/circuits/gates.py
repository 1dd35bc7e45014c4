"""Gates on a model's nodes and their optimisation: steps 1 and 2 of `pruning`."""

from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from interventions.circuits.ablation import Ablation
from interventions.circuits.node_model import Kept, Location, NodeModel, device_of, locations
from interventions.circuits.prune_config import PruneConfig
from interventions.tasks.base import TaskBatch, task_loss


class _Heaviside(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tau: Tensor, temp: float) -> Tensor:
        ctx.save_for_backward(tau)
        ctx.temp = temp
        return (tau > 0).to(tau.dtype)

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (tau,) = ctx.saved_tensors
        s = torch.sigmoid(tau / ctx.temp)
        return grad_outputs[0] * s * (1 - s) / ctx.temp, None


def heaviside(tau: Float[Tensor, "*shape"], temp: int | float) -> Float[Tensor, "*shape"]:
    """1 where tau > 0, else 0; its gradient is that of sigmoid(tau / temp) (straight-through, paper A.5)."""
    return _Heaviside.apply(tau, float(temp))


class GateLayout:
    """Where each location's gates lie in one flat vector; with `tied_qk`, k's are q's."""

    def __init__(self, places: list[Location], *, tied_qk: bool = False) -> None:
        self.slices: dict[str, slice] = {}
        self.n_gates = 0
        for location in places:
            if tied_qk and location.place == "attn.k":
                self.slices[location.name] = self.slices[location.name.removesuffix("k") + "q"]
                continue
            self.slices[location.name] = slice(self.n_gates, self.n_gates + location.width)
            self.n_gates += location.width

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """A vector over gates as one vector per location."""
        return {name: flat[where] for name, where in self.slices.items()}

    def join(self, kept: Kept) -> Bool[Tensor, " gate"]:
        """The inverse of `split`: one mask over gates. A shared gate is open if either of its nodes is."""
        flat = torch.zeros(self.n_gates, dtype=torch.bool)
        for name, where in self.slices.items():
            flat[where] |= kept[name].cpu()
        return flat


def answer_logits(
    model: NodeModel,
    gates: dict[str, Tensor],
    ablation: Ablation,
    batch: TaskBatch,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "pair 2 1 d_vocab"]:
    """Logits of the masked model at the last prompt token of both members; score them with `at_answer(batch)`."""
    device = device_of(model)
    tokens = batch.tokens[..., : int(batch.last.max()) + 1].flatten(0, 1).to(device)
    edit = ablation.edit(gates, ablation.draw(len(tokens), tokens.shape[1], generator))
    logits = model.logits(tokens, edit, batch.last.repeat_interleave(2).to(device))
    return rearrange(logits, "(pair member) pos v -> pair member pos v", member=2)


def at_answer(batch: TaskBatch) -> TaskBatch:
    """The batch as `task_loss` and its kin score logits of the last prompt token alone."""
    return batch._replace(last=torch.zeros_like(batch.last))


class Fitted(NamedTuple):
    """Gates after optimisation."""

    tau: Float[Tensor, " gate"]
    history: list[tuple[float, int]]
    """Task loss and number of kept nodes at each step."""


def fit_gates(
    model: NodeModel,
    train: TaskBatch,
    ablation: Ablation,
    config: PruneConfig,
    *,
    start: Kept | None = None,
    progress: bool = False,
) -> Fitted:
    """Step 2 of `pruning`'s docstring on a pool of training pairs.

    `start` is a warm start: the nodes of an earlier circuit begin as far above 0 as its config's init_noise_bias says,
    all others as far below, from where they can still come back. Raises ValueError for a pool below config.pairs.
    """
    if len(train.last) < config.pairs:
        raise ValueError(f"{len(train.last)} training pairs are too few for batches of {config.pairs}: give more")
    layout = GateLayout(locations(model.shape), tied_qk=config.tied_qk)
    generator = torch.Generator().manual_seed(config.seed)
    noise = torch.randn(layout.n_gates, generator=generator)
    sign = 1.0 if start is None else layout.join(start).float() * 2 - 1
    tau = (config.init_noise_bias * sign + config.init_noise_scale * noise).clamp(-1, 1).to(device_of(model))
    tau = nn.Parameter(tau)
    adam = torch.optim.AdamW([tau], lr=config.lr, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: rate(step, config))
    history = []
    with tqdm(total=config.steps, desc="pruning", unit="step", leave=False, disable=not progress) as bar:
        for _ in range(config.steps):
            batch = take(train, torch.randperm(len(train.last), generator=generator)[: config.pairs])
            gates = heaviside(tau, config.heaviside_temp)
            logits = answer_logits(model, layout.split(gates), ablation, batch, generator)
            loss = task_loss(logits, at_answer(batch.to(logits.device)))
            # grad() of tau alone: the model's weights get none, which also saves computing them.
            (tau.grad,) = torch.autograd.grad(loss + config.k_coef * gates.sum(), tau)
            nn.utils.clip_grad_norm_([tau], config.grad_clip)
            adam.step()
            schedule.step()
            tau.data.clamp_(-1, 1)
            history.append((float(loss.detach()), int(gates.detach().sum())))
            bar.set_postfix(loss=f"{history[-1][0]:.3f}", nodes=history[-1][1], refresh=False)
            bar.update()
    return Fitted(tau.detach(), history)


def rate(step: int, config: PruneConfig) -> float:
    """Share of the peak learning rate at a step: up over the warm-up, then linearly down to 0."""
    warm = max(1, round(config.warmup * config.steps))
    return min((step + 1) / warm, (config.steps - step) / max(1, config.steps - warm), 1.0)


def take(batch: TaskBatch, pairs: Int[Tensor, " pair"]) -> TaskBatch:
    """Some pairs of a batch."""
    prompts = [batch.prompts[int(i)] for i in pairs]
    return TaskBatch(batch.tokens[pairs], batch.answers[pairs], batch.last[pairs], prompts)

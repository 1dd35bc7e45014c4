"""Gates on a model's nodes and their optimisation: steps 1 and 2 of `pruning`."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from interventions.circuits.ablation import Ablation
from interventions.circuits.node_model import Kept, Location, NodeEdit, NodeModel, device_of, locations
from interventions.circuits.prune_config import PruneConfig
from interventions.tasks.base import TaskBatch, task_loss
from sparse_model.io.progress import Bar, progress_bar
from sparse_model.sparsity.sparse_linear import sparse_products

ATTACK_STEP = 0.25
"""How far the adversary's shares move at each step of the optimisation."""


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
        """A vector over gates (or rows of them) as one vector per location."""
        return {name: flat[..., where] for name, where in self.slices.items()}

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
    then: NodeEdit | None = None,
) -> Float[Tensor, "pair 2 1 d_vocab"]:
    """Logits of the masked model at the last prompt token of both members; score them with `at_answer(batch)`.

    `then` sees every location's values after the mask and may change them again.
    """
    device = device_of(model)
    tokens = batch.tokens[..., : int(batch.last.max()) + 1].flatten(0, 1).to(device)
    last = batch.last.repeat_interleave(2).to(device)
    mask = ablation.edit(gates, ablation.draw(len(tokens), tokens.shape[1], generator), last)
    edit = mask if then is None else lambda name, values: then(name, mask(name, values))
    logits = model.logits(tokens, edit, last)
    return rearrange(logits, "(pair member) pos v -> pair member pos v", member=2)


def at_answer(batch: TaskBatch) -> TaskBatch:
    """The batch as `task_loss` and its kin score logits of the last prompt token alone."""
    return batch._replace(last=torch.zeros_like(batch.last))


class Fitted(NamedTuple):
    """Gates after optimisation."""

    tau: Float[Tensor, " gate"]
    history: list[tuple[float, int]]
    """Task loss and number of kept nodes at each step."""
    attack: Float[Tensor, " gate"] | None = None
    """The adversary's shares of ablation where there was one."""


def fit_gates(
    model: NodeModel,
    train: TaskBatch,
    ablation: Ablation,
    config: PruneConfig,
    *,
    start: Kept | None = None,
    progress: bool = False,
    bar: Bar | None = None,
) -> Fitted:
    """Step 2 of `pruning`'s docstring on a pool of training pairs.

    `bar` is a progress bar of more than this pruning, to be moved by a step at a time.

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
    outside = OutsideMasks(layout.n_gates, config, generator, tau.device)
    history = []
    own_bar = progress_bar(
        total=config.steps, desc="pruning", unit="step", leave=False, disable=not progress or bar is not None
    )
    with own_bar, sparse_products(model.module):
        for _ in range(config.steps):
            batch = take(train, torch.randperm(len(train.last), generator=generator)[: config.pairs])
            gates = heaviside(tau, config.heaviside_temp)
            logits = answer_logits(model, layout.split(outside.shut(gates)), ablation, batch, generator)
            loss = task_loss(logits, at_answer(batch.to(logits.device)))
            # grad() of these alone: the model's weights get none, which also saves computing them.
            tau.grad, *rise = torch.autograd.grad(loss + config.k_coef * gates.sum(), [tau, *outside.moved])
            outside.move(rise)
            nn.utils.clip_grad_norm_([tau], config.grad_clip)
            adam.step()
            schedule.step()
            tau.data.clamp_(-1, 1)
            history.append((float(loss.detach()), int(gates.detach().sum())))
            shown = own_bar if bar is None else bar
            shown.set_postfix(loss=f"{history[-1][0]:.3f}", nodes=history[-1][1], refresh=False)
            shown.update()
    return Fitted(tau.detach(), history, outside.attack)


class OutsideMasks:
    """Which nodes outside the circuit are ablated at each step, as `PruneConfig.outside` asks for.

    The adversary goes along with the optimisation: the step that lowers the loss by the gates gives the gradient by
    which it raises the loss, so it costs nothing besides.
    """

    def __init__(self, n_gates: int, config: PruneConfig, generator: torch.Generator, device: torch.device) -> None:
        self.config, self.generator = config, generator
        self.attack = torch.full((n_gates,), 0.5, device=device) if config.outside == "adversary" else None

    @property
    def moved(self) -> list[Tensor]:
        """What the adversary moves."""
        return [] if self.attack is None else [self.attack.requires_grad_()]

    def shut(self, gates: Float[Tensor, " gate"]) -> Tensor:
        """The gates with only the step's nodes outside ablated: for every prompt its own where rates are random."""
        if self.config.outside == "all":
            return gates
        rows = 2 * self.config.pairs
        ablated = rows_at_random_rates(rows, len(gates), self.generator).to(gates)
        if self.attack is not None:  # every other pair is the adversary's
            self.attack.requires_grad_()
            pair = torch.arange(rows, device=gates.device) // 2
            ablated = torch.where((pair % 2 == 0)[:, None, None], self.attack, ablated)
        return open_gates(gates, ablated)

    def move(self, rise: Sequence[Tensor]) -> None:
        """Move the adversary up the loss."""
        if self.attack is not None:
            self.attack = (self.attack.detach() + ATTACK_STEP * rise[0].sign()).clamp(0, 1)


def open_gates(kept: Tensor, ablated: Tensor) -> Tensor:
    """Gates of a circuit's nodes and of all others but the ablated ones; shares between 0 and 1 are taken as such."""
    return 1 - (1 - kept.float()) * ablated.float()


def rows_at_random_rates(
    rows: int, n_gates: int, generator: torch.Generator, *, full: float = 0.25
) -> Float[Tensor, "row 1 gate"]:
    """Which nodes are ablated in each row: each with a probability drawn per row, which is 1 in a share `full`."""
    rates = (torch.rand(rows, 1, 1, generator=generator) / (1 - full)).clamp(max=1)
    return (torch.rand(rows, 1, n_gates, generator=generator) < rates).float()


def rate(step: int, config: PruneConfig) -> float:
    """Share of the peak learning rate at a step: up over the warm-up, then linearly down to 0."""
    warm = max(1, round(config.warmup * config.steps))
    return min((step + 1) / warm, (config.steps - step) / max(1, config.steps - warm), 1.0)


def take(batch: TaskBatch, pairs: Int[Tensor, " pair"]) -> TaskBatch:
    """Some pairs of a batch."""
    prompts = [batch.prompts[int(i)] for i in pairs]
    return TaskBatch(batch.tokens[pairs], batch.answers[pairs], batch.last[pairs], prompts)

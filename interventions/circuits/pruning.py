"""Node pruning: the few channels of a model with which it still does a task (paper 2.2, A.5).

1. Every node (see `graph`) has a parameter tau in [-1, 1] and a gate Heaviside(tau): 1 keeps the node's value,
   0 puts an ablated value in its place, at all tokens. Ablated values come from held-out pretraining text: the node's
   mean, zero, or its value at a random token ("resample").
2. tau starts at init_noise_bias + init_noise_scale * N(0, 1), or warm, from an earlier circuit. AdamW minimises the
   two-way task loss over both members of every pair, plus k_coef * (number of kept nodes). Backward, the gate has a
   sigmoid's derivative at temperature heaviside_temp. The gradient's norm is clipped; the rate warms up, then falls
   linearly to 0; after each step tau is clamped.
3. Nodes are ordered by tau. Bisection finds the smallest k whose first k nodes reach the target task loss on selection
   prompts, on templates that step 2 has not seen.
4. Every loss of step 3 is taken after calibration: logits times a scale, plus a shift per answer token, fitted on the
   same prompts by 16 L-BFGS steps. One shift for all tokens would do nothing: cross-entropy cannot see it.
5. With `eliminate` (ours, not the paper's): nodes are deleted one by one, from the lowest tau up and again until none
   is left whose deletion keeps the target reached. Order by tau alone leaves some that do nothing.

The model's own weights never change, and receive no gradients.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from interventions.circuits.ablation import Ablation, Calibration, fit_calibration, measure_ablation
from interventions.circuits.gates import Fitted, GateLayout, answer_logits, at_answer, fit_gates
from interventions.circuits.node_model import Kept, NodeModel, as_nodes, device_of, locations
from interventions.circuits.prune_config import PruneConfig
from interventions.tasks.base import Task, TaskBatch, task_loss


def everything(model: NodeModel) -> Kept:
    """All nodes kept."""
    device = device_of(model)
    return {
        location.name: torch.ones(location.width, dtype=torch.bool, device=device)
        for location in locations(model.shape)
    }


def reference_ablation(model: NodeModel | nn.Module, blocks: Int[Tensor, "block pos"], config: PruneConfig) -> Ablation:
    """Ablated values of every node from the first `reference_tokens` of held-out blocks, as the config asks for."""
    blocks = blocks[: -(-config.reference_tokens // blocks.shape[1])]
    return measure_ablation(model, blocks, config.ablation, resample_tokens=config.resample_tokens, seed=config.seed)


def splits(task: Task, config: PruneConfig) -> tuple[TaskBatch, TaskBatch]:
    """The training and selection pairs that a configuration asks for."""
    train = task.sample(config.pool, split="train", seed=config.seed)
    return train, task.sample(config.selection_pairs, split="selection", seed=config.seed)


class Scored(NamedTuple):
    """A set of kept nodes on some prompts."""

    loss: float
    """Task loss after calibration, nats."""
    calibration: Calibration


@torch.no_grad()
def score(model: NodeModel, kept: Kept, ablation: Ablation, batch: TaskBatch, config: PruneConfig) -> Scored:
    """Calibrate a set of kept nodes on a batch and give its loss there."""
    generator = torch.Generator().manual_seed(config.seed)
    logits = answer_logits(model, dict(kept), ablation, batch, generator)
    calibration = fit_calibration(logits, batch, steps=config.lbfgs_steps)
    return Scored(float(task_loss(calibration.apply(logits), at_answer(batch.to(logits.device)))), calibration)


def smallest_k(loss: Callable[[int], float], target: int | float, n: int, start: int) -> int | None:
    """The smallest k in 0 .. n with loss(k) <= target, by bisection; exact where loss does not rise with k.

    Elsewhere it is a k that reaches the target while k - 1 does not. The search begins at `start`: below it if that
    reaches the target, else above. None where neither `start` nor n does.
    """
    low, high = -1, start
    if loss(start) > target:
        low, high = start, n
        if start == n or loss(n) > target:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if loss(middle) <= target else (middle, high)
    return high


class Pruned(NamedTuple):
    """A circuit's nodes, and how they were found."""

    kept: Kept
    k: int
    """Number of nodes; a tied pair of q and k counts once."""
    loss: float
    """Calibrated task loss on the selection prompts, nats."""
    unpruned_loss: float
    """The same of the whole model."""
    calibration: Calibration
    tau: dict[str, Float[Tensor, " width"]]
    history: list[tuple[float, int]]
    """Task loss and number of kept nodes at each step."""


class Ranking:
    """Nodes in the order of their tau, and the loss of the first k of them."""

    def __init__(
        self, model: NodeModel, fitted: Fitted, ablation: Ablation, selection: TaskBatch, config: PruneConfig
    ) -> None:
        self.config = config
        self.layout = GateLayout(locations(model.shape), tied_qk=config.tied_qk)
        self.order = fitted.tau.argsort(descending=True, stable=True)
        self.n_open = int((fitted.tau > 0).sum())
        self._score = lambda kept: score(model, kept, ablation, selection, config)

    def first(self, k: int) -> Bool[Tensor, " gate"]:
        """The first k nodes."""
        mask = torch.zeros(self.layout.n_gates, dtype=torch.bool, device=self.order.device)
        mask[self.order[:k]] = True
        return mask

    def scored(self, mask: Bool[Tensor, " gate"]) -> Scored:
        """Calibrated loss of some nodes on the selection prompts."""
        return self._score(self.layout.split(mask))

    def smallest(self, target: int | float, start: int) -> int | None:
        """As `smallest_k` over the ranking."""
        return smallest_k(lambda k: self.scored(self.first(k)).loss, target, self.layout.n_gates, start)

    def eliminate(self, mask: Bool[Tensor, " gate"], target: int | float) -> Bool[Tensor, " gate"]:
        """What is left of some nodes, once no single one can be deleted without missing the target."""
        mask, before = mask.clone(), -1
        while before != int(mask.sum()):
            before = int(mask.sum())
            for gate in self.order.flip(0)[mask[self.order.flip(0)]].tolist():
                mask[gate] = False
                mask[gate] = self.scored(mask).loss > target
        return mask

    def circuit(self, target: int | float, *starts: int) -> Bool[Tensor, " gate"] | None:
        """Steps 3 and 5 of the module's docstring; the bisection begins at the open gates, then at other `starts`.

        None where neither those sizes nor all nodes reach the target.
        """
        for start in (self.n_open, *starts):
            k = self.smallest(target, start)
            if k is not None:
                return self.eliminate(self.first(k), target) if self.config.eliminate else self.first(k)
        return None


def prune(
    model: NodeModel | nn.Module,
    train: TaskBatch,
    selection: TaskBatch,
    ablation: Ablation,
    config: PruneConfig,
    *,
    start: Kept | None = None,
    progress: bool = False,
) -> Pruned:
    """The smallest circuit found for a task: the module's docstring, on pairs of the train and selection splits.

    `start` is a warm start from the nodes of an earlier circuit, see `fit_gates`.

    Raises:
        ValueError: the whole model does not reach the target loss on the selection prompts (both numbers are named);
            or fewer training pairs than a batch takes.
    """
    nodes = as_nodes(model)
    whole = score(nodes, everything(nodes), ablation, selection, config).loss
    if whole > config.target_loss:
        raise ValueError(
            f"target_loss={config.target_loss:g} is below the whole model's own task loss of {whole:.4g} on the "
            "selection prompts: no circuit can be asked for that; raise the target or take a task that the model solves"
        )
    fitted = fit_gates(nodes, train, ablation, config, start=start, progress=progress)
    ranking = Ranking(nodes, fitted, ablation, selection, config)
    mask = ranking.circuit(config.target_loss)
    if mask is None:  # all nodes together reach it, as was just seen
        raise AssertionError(f"{ranking.layout.n_gates} nodes miss a target of {config.target_loss} that they reached")
    loss, calibration = ranking.scored(mask)
    return Pruned(
        kept=ranking.layout.split(mask),
        k=int(mask.sum()),
        loss=loss,
        unpruned_loss=whole,
        calibration=calibration,
        tau=ranking.layout.split(fitted.tau),
        history=fitted.history,
    )

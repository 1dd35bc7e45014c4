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
5. Where `outside` is not "all" (ours), the target must be reached in other ways too, without calibration: with every
   prompt's outside nodes ablated at a random rate, and with the subsets that an adversary finds against the circuits on
   the way (see `partial_ablation`). Step 2 then ablates as `gates.OutsideMasks` says.
6. With `eliminate` (ours, not the paper's): nodes are deleted one by one, from the lowest tau up and again until none
   is left whose deletion keeps the target reached. Order by tau alone leaves some that do nothing.

The model's own weights never change, and receive no gradients.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from interventions.circuits.ablation import Ablation, Calibration, fit_calibration, measure_ablation
from interventions.circuits.gates import (
    Fitted,
    GateLayout,
    answer_logits,
    at_answer,
    fit_gates,
    open_gates,
    rows_at_random_rates,
)
from interventions.circuits.node_model import Kept, NodeEdit, NodeModel, as_nodes, device_of, locations
from interventions.circuits.partial_ablation import Adversary
from interventions.circuits.prune_config import PruneConfig
from interventions.circuits.task_scores import SOLVED, solves
from interventions.tasks.base import Task, TaskBatch, pair_accuracy, task_loss
from sparse_model.io.progress import Bar
from sparse_model.sparsity.sparse_linear import sparse_products


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
def score(
    model: NodeModel,
    kept: dict[str, Tensor],
    ablation: Ablation,
    batch: TaskBatch,
    config: PruneConfig,
    then: NodeEdit | None = None,
) -> Scored:
    """Calibrate a set of kept nodes (or gates, for each prompt its own) on a batch and give its loss there.

    `then` is a further edit, see `answer_logits`.
    """
    generator = torch.Generator().manual_seed(config.seed)
    logits = answer_logits(model, dict(kept), ablation, batch, generator, then)
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


MOST_ATTACKS = 3
"""Attacks that a circuit found with an adversary must withstand besides the one met during the optimisation."""


class Ranking:
    """Nodes in the order of their tau, and the loss of the first k of them."""

    def __init__(
        self, model: NodeModel, fitted: Fitted, ablation: Ablation, selection: TaskBatch, config: PruneConfig
    ) -> None:
        self.config = config
        self.layout = GateLayout(locations(model.shape), tied_qk=config.tied_qk)
        self.order = fitted.tau.argsort(descending=True, stable=True)
        self.n_open = int((fitted.tau > 0).sum())
        self._model, self._ablation, self._selection = model, ablation, selection
        self._random: Tensor | None = None
        if config.outside != "all":
            generator = torch.Generator().manual_seed(config.seed)
            rows = 2 * len(selection.last)
            self._random = rows_at_random_rates(rows, self.layout.n_gates, generator).to(self.order.device)
        self._whole = 0.0 if config.outside == "all" else self._plain_loss(everything(model))
        self._attacks = [] if fitted.attack is None else [fitted.attack > 0.5]

    def first(self, k: int) -> Bool[Tensor, " gate"]:
        """The first k nodes."""
        mask = torch.zeros(self.layout.n_gates, dtype=torch.bool, device=self.order.device)
        mask[self.order[:k]] = True
        return mask

    def scored(self, mask: Bool[Tensor, " gate"]) -> Scored:
        """Calibrated loss of some nodes on the selection prompts, all others ablated."""
        return score(self._model, self.layout.split(mask), self._ablation, self._selection, self.config)

    def worst(self, mask: Bool[Tensor, " gate"], target: int | float) -> float:
        """The highest loss of the ways in which others are to be ablated; the first one over `target`.

        With all others ablated it is calibrated. In the other ways it is as it is, less what the whole model is over
        the target as it is: what no circuit can reach is not asked for.
        """
        loss = self.scored(mask).loss
        ways = self._attacks if self._random is None else [self._random, *self._attacks]
        excess = max(0.0, self._whole - target) if ways else 0.0
        for ablated in ways:
            if loss > target:
                break
            loss = max(loss, self._plain_loss(self.layout.split(open_gates(mask, ablated))) - excess)
        return loss

    @torch.no_grad()
    def _plain_loss(self, gates: Mapping[str, Tensor]) -> float:
        generator = torch.Generator().manual_seed(self.config.seed)
        logits = answer_logits(self._model, dict(gates), self._ablation, self._selection, generator)
        return float(task_loss(logits, at_answer(self._selection.to(logits.device))))

    def smallest(self, target: int | float, start: int) -> int | None:
        """As `smallest_k` over the ranking."""
        return smallest_k(lambda k: self.worst(self.first(k), target), target, self.layout.n_gates, start)

    def eliminate(self, mask: Bool[Tensor, " gate"], target: int | float) -> Bool[Tensor, " gate"]:
        """What is left of some nodes, once no single one can be deleted without missing the target."""
        mask, before = mask.clone(), -1
        while before != int(mask.sum()):
            before = int(mask.sum())
            for gate in self.order.flip(0)[mask[self.order.flip(0)]].tolist():
                mask[gate] = False
                mask[gate] = self.worst(mask, target) > target
        return mask

    def circuit(self, target: int | float, *starts: int) -> Bool[Tensor, " gate"] | None:
        """Steps 3, 5 and 6 of the module's docstring; the bisection begins at the open gates, then at other `starts`.

        None where neither those sizes nor all nodes reach the target.
        """
        with sparse_products(self._model.module):
            k = self._cut(target, starts)
            for _ in range(MOST_ATTACKS if self.config.outside == "adversary" else 0):
                if k is None or not self._attacked(self.first(k), target):
                    break
                k = self._cut(target, (k, *starts))
            if k is None:
                return None
            return self.eliminate(self.first(k), target) if self.config.eliminate else self.first(k)

    def _cut(self, target: int | float, starts: Sequence[int]) -> int | None:
        sizes = (self.smallest(target, start) for start in (self.n_open, *starts))
        return next((k for k in sizes if k is not None), None)

    def _attacked(self, mask: Bool[Tensor, " gate"], target: int | float) -> bool:
        """Whether an adversary takes some nodes over the target; if so, its subset counts from now on."""
        adversary = Adversary(self._model, self.layout, self._ablation, self._selection, self.config.seed)
        # A node that leaves the circuit later is one of those that are ablated.
        self._attacks.append(adversary.attack(self.layout.split(mask)).ablated | mask)
        return self.worst(mask, target) > target


def prune(
    model: NodeModel | nn.Module,
    train: TaskBatch,
    selection: TaskBatch,
    ablation: Ablation,
    config: PruneConfig,
    *,
    start: Kept | None = None,
    progress: bool = False,
    bar: Bar | None = None,
) -> Pruned:
    """The smallest circuit found for a task: the module's docstring, on pairs of the train and selection splits.

    `start` is a warm start from the nodes of an earlier circuit, see `fit_gates`, as for `bar`.

    Raises:
        ValueError: the whole model does not reach the target loss on the selection prompts (both numbers are named, and
            whether it solves the task at all); or fewer training pairs than a batch takes.
    """
    nodes = as_nodes(model)
    whole = score(nodes, everything(nodes), ablation, selection, config).loss
    if whole > config.target_loss:
        raise ValueError(_missed(nodes, ablation, selection, config, whole))
    fitted = fit_gates(nodes, train, ablation, config, start=start, progress=progress, bar=bar)
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


def _missed(model: NodeModel, ablation: Ablation, selection: TaskBatch, config: PruneConfig, whole: float) -> str:
    """Why no circuit can be asked for, in a sentence."""
    with torch.no_grad():
        logits = answer_logits(model, dict(everything(model)), ablation, selection)
    accuracy = float(pair_accuracy(logits, at_answer(selection.to(logits.device))))
    if not solves(accuracy):
        return (
            f"the model does not solve the task: it gets both prompts of {accuracy:.0%} of the selection pairs right "
            f"({SOLVED:.0%} are needed; its task loss is {whole:.4g}, the target {config.target_loss:g}): take a task "
            "that it solves, as sparse-bridges solved-tasks lists them"
        )
    return (
        f"target_loss={config.target_loss:g} is below the whole model's own task loss of {whole:.4g} on the "
        "selection prompts: no circuit can be asked for that; raise --target-loss"
    )

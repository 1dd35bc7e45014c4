"""Several prunings of one model for one task, with other seeds: which circuit is taken, and how far they agree.

1. Each seed draws its own training and selection prompts, and its own initial gates.
2. The circuits are compared on further selection prompts that none of them was cut out on, with their own calibration.
   Of those that reach the target there the one with the fewest edges is taken; where none does, the one nearest to it.
3. The consensus: nodes are ordered by how many of the prunings keep them, then by their mean tau, and the smallest
   circuit is cut out of that order like any other.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from interventions.circuits.ablation import Ablation
from interventions.circuits.gates import Fitted, GateLayout, answer_logits, at_answer
from interventions.circuits.node_model import Kept, NodeModel, count_edges, device_of, locations
from interventions.circuits.prune_config import PruneConfig
from interventions.circuits.pruning import Pruned, Ranking, prune, splits
from interventions.tasks.base import Task, TaskBatch, task_loss
from sparse_model.io.progress import Bar, progress_bar

_FRESH_SEED = 10_000
"""Added to the seed: the prompts that choose between circuits are not those that any was cut out on."""
_RANKING_SHARE = 0.25
"""Time of cutting a circuit out, over that of the optimisation before it; for the time left only."""


class SeededPruning(NamedTuple):
    """One of the prunings."""

    config: PruneConfig
    pruned: Pruned
    edges: int
    fresh_loss: float
    """Task loss with its own calibration on selection prompts that none of the prunings has seen, nats."""


class SeedSummary(NamedTuple):
    """What is kept of one of the prunings beside the circuit that was taken."""

    seed: int | None
    """None: the consensus."""
    nodes: int
    edges: int
    loss: float
    """Calibrated task loss on the selection prompts that it was cut out on, nats."""
    fresh_loss: float
    """On those that none has seen, with its own calibration."""
    overlap: float
    """Nodes shared with the circuit that was taken, over the nodes of either (1: the same nodes)."""
    taken: bool
    """Whether it is that circuit."""


def pruning_steps(config: PruneConfig) -> int:
    """A pruning in steps of a progress bar: those of the gates, and what cutting out takes."""
    return config.steps + max(1, round(_RANKING_SHARE * config.steps))


def prune_seeds(
    model: NodeModel,
    task: Task,
    ablation: Ablation,
    config: PruneConfig,
    seeds: int,
    *,
    start: Kept | None = None,
    progress: bool = False,
    bar: Bar | None = None,
) -> list[SeededPruning]:
    """Prune with the config's seed and those that follow it. Raises ValueError for fewer than one seed, and as `prune`.

    The progress bar shows the time left of all of them together; `bar` is one of more than these prunings.
    """
    if seeds < 1:
        raise ValueError(f"seeds={seeds}: prune with at least one seed")
    fresh = task.sample(config.selection_pairs, split="selection", seed=config.seed + _FRESH_SEED)
    prunings = []
    total = seeds * pruning_steps(config)
    own_bar = progress_bar(total=total, unit="step", leave=False, disable=bar is not None or not progress)
    shown = own_bar if bar is None else bar
    with own_bar:
        for i in range(seeds):
            shown.set_description(f"pruning {i + 1} of {seeds}")
            seeded = replace(config, seed=config.seed + i)
            pruned = prune(model, *splits(task, seeded), ablation, seeded, start=start, bar=shown)
            shown.update(pruning_steps(config) - config.steps)
            edges = count_edges(model, pruned.kept)
            prunings.append(SeededPruning(seeded, pruned, edges, fresh_loss(model, pruned, ablation, fresh)))
    return prunings


@torch.no_grad()
def fresh_loss(model: NodeModel, pruned: Pruned, ablation: Ablation, batch: TaskBatch) -> float:
    """Task loss of a circuit with its own calibration on other prompts than it was cut out on, nats."""
    logits = answer_logits(model, dict(pruned.kept), ablation, batch, torch.Generator().manual_seed(0))
    return float(task_loss(pruned.calibration.apply(logits), at_answer(batch.to(logits.device))))


def choose(prunings: Sequence[SeededPruning]) -> SeededPruning:
    """The one to take: step 2 of the module's docstring."""
    reaching = [pruning for pruning in prunings if pruning.fresh_loss <= pruning.config.target_loss]
    if reaching:
        return min(reaching, key=lambda pruning: (pruning.edges, pruning.pruned.k, pruning.fresh_loss))
    return min(prunings, key=lambda pruning: pruning.fresh_loss)


def consensus(
    model: NodeModel, task: Task, ablation: Ablation, prunings: Sequence[SeededPruning]
) -> SeededPruning | None:
    """The circuit of the nodes that most prunings keep: step 3 of the module's docstring. None for a single pruning.

    Its config is the first pruning's, on whose selection prompts it is cut out.
    """
    if len(prunings) < 2:
        return None
    config = prunings[0].config
    layout = GateLayout(locations(model.shape), tied_qk=config.tied_qk)
    votes = torch.stack([layout.join(pruning.pruned.kept).float() for pruning in prunings]).mean(0)
    tau = torch.stack([_joined(layout, pruning.pruned.tau) for pruning in prunings]).mean(0)
    # tau lies in [-1, 1]: it only decides between nodes with as many votes, and half of them open a gate.
    merit = (votes - 0.5 + tau.cpu() / (4 * len(prunings))).to(device_of(model))
    selection = splits(task, config)[1]
    ranking = Ranking(model, Fitted(merit, []), ablation, selection, config)
    mask = ranking.circuit(config.target_loss)
    assert mask is not None  # all nodes together reach the target, or no pruning would have been made
    loss, calibration = ranking.scored(mask)
    kept = ranking.layout.split(mask)
    first = prunings[0].pruned
    pruned = first._replace(kept=kept, k=int(mask.sum()), loss=loss, calibration=calibration, tau=layout.split(merit))
    fresh = task.sample(config.selection_pairs, split="selection", seed=config.seed + _FRESH_SEED)
    return SeededPruning(config, pruned, count_edges(model, kept), fresh_loss(model, pruned, ablation, fresh))


def _joined(layout: GateLayout, tau: dict[str, Tensor]) -> Tensor:
    flat = torch.zeros(layout.n_gates)
    for name, where in layout.slices.items():
        flat[where] = tau[name].cpu()
    return flat


def overlap(first: Kept, second: Kept) -> float:
    """Nodes that both keep over those that either does; 1 where neither keeps any."""
    both = sum(int((first[name].cpu() & second[name].cpu()).sum()) for name in first)
    either = sum(int((first[name].cpu() | second[name].cpu()).sum()) for name in first)
    return both / either if either else 1.0


def summaries(
    prunings: Sequence[SeededPruning], agreed: SeededPruning | None, taken: SeededPruning
) -> tuple[SeedSummary, ...]:
    """All prunings and the consensus beside the circuit that was taken."""
    rows = [(pruning.config.seed, pruning) for pruning in prunings]
    return tuple(
        SeedSummary(
            seed=seed,
            nodes=pruning.pruned.k,
            edges=pruning.edges,
            loss=pruning.pruned.loss,
            fresh_loss=pruning.fresh_loss,
            overlap=overlap(pruning.pruned.kept, taken.pruned.kept),
            taken=pruning is taken,
        )
        for seed, pruning in [*rows, *([(None, agreed)] if agreed else [])]
    )

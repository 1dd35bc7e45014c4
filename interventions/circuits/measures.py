"""Single measurements on a circuit: sufficiency, necessity, effects of nodes and edges, repruning."""

import math
from collections import defaultdict
from collections.abc import Iterable, Set
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from interventions.circuits.ablation import Ablation, fit_calibration
from interventions.circuits.circuit import Circuit
from interventions.circuits.gates import answer_logits, at_answer, fit_gates
from interventions.circuits.node_model import Edge, Kept, NodeModel, Values, count_edges, find_node
from interventions.circuits.prune_config import PruneConfig
from interventions.circuits.pruning import Ranking, everything, score
from interventions.circuits.rivals import random_nodes
from interventions.tasks.base import TaskBatch, pair_accuracy, task_loss
from sparse_model.io.progress import Bar


class Sufficiency(NamedTuple):
    """A circuit alone, with its own calibration."""

    whole_loss: float
    """Task loss of the whole model, uncalibrated, nats."""
    loss: float
    """That of the circuit."""
    accuracy: float
    """Share of pairs both of whose members the circuit gets right."""


@torch.no_grad()
def sufficiency(model: NodeModel, circuit: Circuit, kept: Kept, batch: TaskBatch, config: PruneConfig) -> Sufficiency:
    """The circuit, whose nodes are `kept`, on a batch of pairs."""
    generator = torch.Generator().manual_seed(config.seed)
    whole = answer_logits(model, dict(everything(model)), circuit.ablation, batch)
    logits = circuit.calibration.apply(answer_logits(model, dict(kept), circuit.ablation, batch, generator))
    batch = at_answer(batch.to(logits.device))
    return Sufficiency(
        float(task_loss(whole, batch)), float(task_loss(logits, batch)), float(pair_accuracy(logits, batch))
    )


class Necessity(NamedTuple):
    """Losses of a model without a circuit's nodes, and without others; nats.

    As it is, the model has lost the task where its answers are wrong. Calibrated anew, only where the answer cannot be
    told from its logits by any scale and shift: what is left then is another way round the circuit.
    """

    loss: float
    """Without the circuit, as it is."""
    random: list[float]
    """Without as many other nodes, draw by draw."""
    calibrated: float
    """Without the circuit, calibrated anew."""
    calibrated_random: list[float]

    @property
    def limit(self) -> float:
        """What `loss` must exceed: every random removal, and half of ln 2."""
        return max(*self.random, math.log(2) / 2)

    @property
    def calibrated_limit(self) -> float:
        """The same of `calibrated`."""
        return max(*self.calibrated_random, math.log(2) / 2)


def necessity(
    model: NodeModel, kept: Kept, ablation: Ablation, batch: TaskBatch, config: PruneConfig, draws: int
) -> Necessity:
    """Remove the kept nodes, and `draws` times as many others at the same locations."""
    removed = [kept, *random_nodes(model, kept, batch, draws, seed=config.seed)]
    losses = [_losses(model, {n: ~m for n, m in nodes.items()}, ablation, batch, config) for nodes in removed]
    plain, calibrated = ([pair[i] for pair in losses] for i in (0, 1))
    return Necessity(plain[0], plain[1:], calibrated[0], calibrated[1:])


@torch.no_grad()
def _losses(
    model: NodeModel, kept: Kept, ablation: Ablation, batch: TaskBatch, config: PruneConfig
) -> tuple[float, float]:
    """Task loss as it is, and calibrated."""
    logits = answer_logits(model, dict(kept), ablation, batch, torch.Generator().manual_seed(config.seed))
    calibrated = fit_calibration(logits, batch, steps=config.lbfgs_steps).apply(logits)
    batch = at_answer(batch.to(logits.device))
    return float(task_loss(logits, batch)), float(task_loss(calibrated, batch))


def node_effects(
    model: NodeModel, circuit: Circuit, kept: Kept, batch: TaskBatch, config: PruneConfig
) -> dict[str, float]:
    """Rise of the circuit's loss, calibrated anew, when each node alone is deleted too; by the node's name, nats."""
    base = score(model, kept, circuit.ablation, batch, config).loss
    effects = {}
    for name in circuit.names:
        effects[name] = score(model, _without(circuit, kept, name), circuit.ablation, batch, config).loss - base
    return effects


def _without(circuit: Circuit, kept: Kept, name: str) -> Kept:
    fewer = {place: mask.clone() for place, mask in kept.items()}
    for place, channel in find_node(circuit.shape, name):
        fewer[place][channel] = False
    return fewer


def edge_effects(
    model: NodeModel, circuit: Circuit, edges: Iterable[Edge], batch: TaskBatch, config: PruneConfig
) -> dict[Edge, float]:
    """Rise of the circuit's loss, calibrated anew, when one edge alone is cut; nats.

    Cut, an edge's target takes the value that it has while the edge's source is ablated too; everything else goes on
    with the source as it is. So an edge that is its source's only one has the source's effect.
    """
    base = score(model, circuit.kept, circuit.ablation, batch, config).loss
    by_source: dict[str, list[Edge]] = defaultdict(list)
    for edge in edges:
        by_source[edge.source].append(edge)
    effects = {}
    for source, of_source in by_source.items():
        targets = {edge: _target(circuit, edge) for edge in of_source}
        values = _values_without(model, circuit, source, {place for place, _ in targets.values()}, batch, config)
        for edge, (place, channel) in targets.items():
            cut = partial(_put, place, channel, values[place][..., channel])
            effects[edge] = score(model, circuit.kept, circuit.ablation, batch, config, cut).loss - base
    return effects


def _target(circuit: Circuit, edge: Edge) -> tuple[str, int]:
    """Location and channel that an edge ends in: of a tied attn.qk node the one that its matrix makes."""
    places = find_node(circuit.shape, edge.target)
    return places[0] if len(places) == 1 else places["qk".index(edge.matrix)]


@torch.no_grad()
def _values_without(
    model: NodeModel, circuit: Circuit, source: str, places: Set[str], batch: TaskBatch, config: PruneConfig
) -> dict[str, Values]:
    """Values at some locations of the circuit while one more node is ablated."""
    found = {}

    def note(name: str, values: Values) -> Values:
        if name in places:
            found[name] = values
        return values

    generator = torch.Generator().manual_seed(config.seed)
    answer_logits(model, dict(_without(circuit, circuit.kept, source)), circuit.ablation, batch, generator, note)
    return found


def _put(place: str, channel: int, instead: Tensor, name: str, values: Values) -> Values:
    if name == place:
        values = values.clone()
        values[..., channel] = instead
    return values


class Repruned(NamedTuple):
    """The same pruning under changed conditions."""

    whole_loss: float
    """Calibrated loss of all nodes on the selection prompts, nats."""
    k: int | None
    """Nodes of the smallest circuit that reaches the target; None where none does."""
    edges: int | None
    """Its edges."""
    loss_at_k: float
    """Loss of the best-ranked nodes, as many as the real circuit has."""


def reprune(
    model: NodeModel,
    train: TaskBatch,
    selection: TaskBatch,
    ablation: Ablation,
    config: PruneConfig,
    k: int,
    *,
    progress: bool = False,
    bar: Bar | None = None,
) -> Repruned:
    """`prune` without its demand that the whole model reach the target, beside a circuit of k nodes."""
    fitted = fit_gates(model, train, ablation, config, progress=progress, bar=bar)
    ranking = Ranking(model, fitted, ablation, selection, config)
    whole = score(model, everything(model), ablation, selection, config).loss
    loss_at_k = ranking.scored(ranking.first(k)).loss
    mask = ranking.circuit(config.target_loss, k)
    if mask is None:
        return Repruned(whole, None, None, loss_at_k)
    return Repruned(whole, int(mask.sum()), count_edges(model, ranking.layout.split(mask)), loss_at_k)

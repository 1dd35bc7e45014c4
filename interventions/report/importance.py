"""Which nodes of a circuit matter most, and the task loss of the first k of them.

1. Effect of a node: the rise of the circuit's loss when it alone is deleted too, as in the controls. Those are taken
   where the circuit has them; for an uncontrolled circuit of moderate size they are measured here in the same way.
2. Nodes are ordered by effect; where none is known, by the sum of their weights' magnitudes.
3. Effect of an edge: the same when it alone is cut (`measures.edge_effects`).
4. At some sizes k the first k nodes are kept and the rest ablated. The loss is that of evaluation prompts, calibrated
   anew at each k. It is not a search for the best k nodes: a chain of nodes does nothing before its last link is there.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from interventions.charts import finite
from interventions.circuits.circuit import Circuit
from interventions.circuits.gates import take
from interventions.circuits.measures import edge_effects, node_effects
from interventions.circuits.node_model import Edge, NodeModel, find_node
from interventions.circuits.prune_config import PruneConfig
from interventions.circuits.pruning import score
from interventions.tasks.base import TaskBatch

MOST_SIZES = 16
"""Steps of a size curve."""
MOST_MEASURED = 200
"""Nodes of an uncontrolled circuit whose effects are measured for the report; each takes a run over the prompts."""
EDGE_PAIRS = 32
"""Pairs on which the effects of edges are measured: one run for each of most edges."""


def effects_of(model: NodeModel, circuit: Circuit, batch: TaskBatch | None) -> dict[str, float]:
    """Effects by node, nats; none where they are not known and would take too long, or there are no prompts."""
    if circuit.controls is not None and "node_effects" in circuit.controls:
        return circuit.controls["node_effects"]
    if batch is None or circuit.n_nodes > MOST_MEASURED:
        return {}
    return node_effects(model, circuit, circuit.kept, batch, _config(circuit))


def by_importance(circuit: Circuit, effects: dict[str, float]) -> list[str]:
    """The names of all nodes, the most important first."""
    merit = dict(effects) or dict.fromkeys(circuit.names, 0.0)
    for edge in () if effects else circuit.edges:
        merit[edge.source] += abs(edge.weight)
        merit[edge.target] += abs(edge.weight)
    return sorted(circuit.names, key=lambda name: -merit.get(name, 0.0))


def effects_of_edges(
    model: NodeModel, circuit: Circuit, edges: Sequence[Edge], node_effects: dict[str, float], batch: TaskBatch | None
) -> dict[Edge, float]:
    """Effects of edges, nats; without prompts only of those that have their source's effect, being its only one."""
    out = Counter(edge.source for edge in circuit.edges)
    known = {e: node_effects[e.source] for e in edges if out[e.source] == 1 and e.source in node_effects}
    rest = [edge for edge in edges if edge not in known]
    if batch is None or not rest:
        return known
    some = take(batch, torch.arange(min(EDGE_PAIRS, len(batch.last))))
    return known | edge_effects(model, circuit, rest, some, _config(circuit))


def size_curve(
    model: NodeModel, circuit: Circuit, ranked: list[str], batch: TaskBatch
) -> list[tuple[int, float | None]]:
    """(number of nodes, loss in nats) from no node to all of them."""
    steps = min(len(ranked), MOST_SIZES) + 1
    curve = []
    for k in np.unique(np.linspace(0, len(ranked), steps).round().astype(int)).tolist():
        kept = {at: torch.zeros_like(mask) for at, mask in circuit.kept.items()}
        for name in ranked[:k]:
            for at, channel in find_node(circuit.shape, name):
                kept[at][channel] = True
        curve.append((k, finite(score(model, kept, circuit.ablation, batch, _config(circuit)).loss)))
    return curve


def _config(circuit: Circuit) -> PruneConfig:
    known = PruneConfig.__dataclass_fields__
    return PruneConfig(**{name: value for name, value in circuit.config.items() if name in known})

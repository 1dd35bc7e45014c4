"""Where a circuit's nodes stand in a picture of it: a column per place and layer, a row per residual channel.

1. Columns follow the computation, six to a layer: attention read, q k v, attention write, MLP read, neurons, MLP write.
   Columns without nodes are left out.
2. Every read and write of one residual channel stands in one row, so that a channel runs straight through the picture.
   The other nodes (q, k, v, neurons) are one unit each.
3. Rows are ordered by barycentres: units move to the weighted mean of their neighbours, channels are ranked again, and
   the order with the least weighted edge length of all rounds is kept. Deterministic.
4. Nodes of a column that would come closer than a row are moved apart, as little as possible (isotonic regression).
"""

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import networkx as nx

LINKS = ("residual", "qk")
"""Kinds of connections of `Circuit.to_networkx(links=True)` that are no weights."""
_ROUNDS = 40
_STAGES = {
    "attn.act_in": 0,
    "attn.q": 1,
    "attn.k": 1,
    "attn.v": 1,
    "attn.resid_delta": 2,
    "mlp.act_in": 3,
    "mlp.post_act": 4,
    "mlp.resid_delta": 5,
}
_TITLES = ("attn read", "q k v", "attn write", "mlp read", "neurons", "mlp write")


class Column(NamedTuple):
    """One place of one layer."""

    layer: int
    title: str


class Spot(NamedTuple):
    """Where a node stands."""

    column: int
    row: float


class Layout(NamedTuple):
    """Where all nodes stand."""

    columns: list[Column]
    spots: dict[str, Spot]
    """By the node's published name."""
    rows: int
    """Rows needed: every spot's row is in [0, rows - 1]."""


def place_nodes(graph: nx.MultiDiGraph) -> Layout:
    """Place the nodes of `Circuit.to_networkx()`; links, where the graph has them, do not count."""
    stages = {name: (data["layer"], _STAGES[data["place"]]) for name, data in graph.nodes(data=True)}
    used = sorted(set(stages.values()))
    column = {stage: index for index, stage in enumerate(used)}
    rows = _spread(stages, _heights(graph))
    top = min(rows.values(), default=0.0)
    spots = {name: Spot(column[stage], rows[name] - top) for name, stage in stages.items()}
    height = max((spot.row for spot in spots.values()), default=0.0)
    return Layout([Column(layer, _TITLES[stage]) for layer, stage in used], spots, int(height + 1.999))


def _unit(graph: nx.MultiDiGraph, name: str) -> Hashable:
    """What moves as one: a residual channel, or a single node."""
    node = graph.nodes[name]
    return node["channel"] if _in_stream(node["place"]) else name


def _in_stream(place: str) -> bool:
    return place.endswith(("act_in", "resid_delta"))


def _heights(graph: nx.MultiDiGraph) -> dict[str, float]:
    """The height that each node would like: a channel's rank, and the mean of their neighbours for the rest."""
    pulls: dict[Hashable, dict[Hashable, float]] = defaultdict(lambda: defaultdict(float))
    for source, target, data in graph.edges(data=True):
        if data["matrix"] in LINKS:
            continue
        a, b = _unit(graph, source), _unit(graph, target)
        pulls[a][b] += abs(data["weight"])
        pulls[b][a] += abs(data["weight"])
    units = {name: _unit(graph, name) for name in graph}
    channels = sorted({unit for unit in units.values() if isinstance(unit, int)})
    single = [unit for unit in units.values() if not isinstance(unit, int)]
    place: dict[Hashable, float] = {channel: float(index) for index, channel in enumerate(channels)}
    place |= dict.fromkeys(single, (len(channels) - 1) / 2)
    best, least = dict(place), float("inf")
    for _ in range(_ROUNDS):
        place |= {unit: _mean(pulls[unit], place, place[unit]) for unit in single}
        length = sum(w * abs(place[a] - place[b]) for a, near in pulls.items() for b, w in near.items())
        if length < least:
            best, least = dict(place), length
        wanted = {channel: _mean(pulls[channel], place, place[channel]) for channel in channels}
        ranked = sorted(channels, key=lambda c: (wanted[c], c))
        place |= {channel: float(index) for index, channel in enumerate(ranked)}
    return {name: best[unit] for name, unit in units.items()}


def _mean(near: Mapping[Hashable, float], place: Mapping[Hashable, float], alone: float) -> float:
    total = sum(near.values())
    return sum(w * place[other] for other, w in near.items()) / total if total else alone


def _spread(stages: Mapping[str, tuple[int, int]], heights: Mapping[str, float]) -> dict[str, float]:
    """Heights at least 1 apart within each column, in the order that the nodes would like."""
    columns: dict[tuple[int, int], list[str]] = defaultdict(list)
    for name, stage in stages.items():
        columns[stage].append(name)
    positions: dict[str, float] = {}
    for names in columns.values():
        ordered = sorted(names, key=lambda name: heights[name])
        apart = isotonic([heights[name] - index for index, name in enumerate(ordered)])
        positions |= {name: value + index for index, (name, value) in enumerate(zip(ordered, apart, strict=True))}
    return positions


def isotonic(values: Sequence[int | float]) -> list[float]:
    """The non-decreasing sequence nearest to `values` in squares (pool adjacent violators)."""
    blocks: list[tuple[float, int]] = []
    for value in values:
        mean, count = float(value), 1
        while blocks and blocks[-1][0] > mean:
            before, n = blocks.pop()
            mean, count = (before * n + mean * count) / (n + count), n + count
        blocks.append((mean, count))
    return [mean for mean, count in blocks for _ in range(count)]

"""A circuit as a matplotlib figure, for notebooks and papers; the report draws it interactively.

The figure leaves global state alone: a notebook shows it, `.savefig` keeps it.
"""

from collections.abc import Mapping
from typing import Any

import networkx as nx
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from interventions.circuits.picture_layout import LINKS, Layout, place_nodes
from interventions.figures import GREY
from sparse_model.config import SparseConfig
from sparse_model.model.node_names import parse_node

PLUS, MINUS, INK = "#c8691a", "#2f6db5", "#1f2429"
MOST_LABELS = 150
"""Nodes of a circuit beyond which they are drawn without their names."""


def draw_circuit(graph: nx.MultiDiGraph, shape: SparseConfig, title: str, effects: Mapping[str, int | float]) -> Figure:
    """A circuit's graph with links: layers left to right, a row per residual channel.

    Edges are coloured by sign and as wide as their weight. Filled nodes compute (q, k, v, neurons), open ones read and
    write the stream; grey lines join a residual write with the later reads of its channel. A node's area is its effect,
    where `effects` has it.
    """
    layout = place_nodes(graph)
    columns, rows = max(1, len(layout.columns)), max(1, layout.rows)
    figure = Figure(figsize=(1.0 + 0.95 * columns, 1.3 + min(0.34 * rows, 14)), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(-0.6, columns - 0.4), ylim=(rows - 0.4, -1.4))
    axes.set_axis_off()
    axes.set_title(title, fontsize=10)
    _draw_layers(axes, layout)
    _draw_lines(axes, graph, layout)
    _draw_nodes(axes, list(graph), shape, effects, layout)
    return figure


def _draw_layers(axes: Axes, layout: Layout) -> None:
    for layer in sorted({column.layer for column in layout.columns}):
        columns = [index for index, column in enumerate(layout.columns) if column.layer == layer]
        corner = (columns[0] - 0.47, -1.35)
        axes.add_patch(
            Rectangle(corner, len(columns) - 0.06, layout.rows + 0.85, color=GREY, alpha=0.09, lw=0, zorder=0)
        )
        axes.text(columns[0] - 0.38, -1.0, f"layer {layer}", fontsize=8, fontweight="bold", color=GREY)
    for index, column in enumerate(layout.columns):
        axes.text(index, -0.68, column.title, fontsize=6.5, ha="center", color=GREY)


def _draw_lines(axes: Axes, graph: nx.MultiDiGraph, layout: Layout) -> None:
    largest = max((abs(w) for _, _, w, kind in _weights(graph) if kind not in LINKS), default=1.0)
    lines, colours, widths, orders = [], [], [], []
    for source, target, weight, kind in _weights(graph):
        ends = layout.spots[source], layout.spots[target]
        points = np.array([(spot.column, spot.row) for spot in ends], dtype=float)
        link = kind in LINKS
        lines.append(points if link else _curve(points))
        colours.append(GREY if link else PLUS if weight > 0 else MINUS)
        widths.append(1.2 if link else 0.6 + 2.4 * abs(weight) / largest)
        orders.append(not link)
    for above in (False, True):
        chosen = [index for index, order in enumerate(orders) if order == above]
        axes.add_collection(
            LineCollection(
                [lines[index] for index in chosen],
                colors=[colours[index] for index in chosen],
                linewidths=[widths[index] for index in chosen],
                alpha=0.85 if above else 0.5,
                zorder=1 + above,
            )
        )


def _weights(graph: nx.MultiDiGraph) -> list[tuple[str, str, float, str]]:
    return [(a, b, data["weight"], data["matrix"]) for a, b, data in graph.edges(data=True)]


def _curve(ends: Float[np.ndarray, "2 2"]) -> Float[np.ndarray, "point 2"]:
    """From one node to another, level at both ends."""
    t = np.linspace(0, 1, 24)
    rise = t * t * (3 - 2 * t)
    return np.stack([ends[0, 0] + t * (ends[1, 0] - ends[0, 0]), ends[0, 1] + rise * (ends[1, 1] - ends[0, 1])], 1)


def _draw_nodes(
    axes: Axes, names: list[str], shape: SparseConfig, effects: Mapping[str, int | float], layout: Layout
) -> None:
    largest = max([*effects.values(), 1e-9])
    for name in names:
        node, spot = parse_node(name, shape), layout.spots[name]
        area = 18 + 70 * max(effects.get(name, 0.0), 0) / largest
        face = INK if node.head is not None or node.place == "mlp.post_act" else "white"
        axes.scatter(spot.column, spot.row, s=area, c=face, edgecolors=INK, linewidths=1.2, zorder=3)
        if len(names) <= MOST_LABELS:
            head = "" if node.head is None else f"{node.place.removeprefix('attn.')}{node.head}."
            label: Any = axes.annotate(f"{head}{node.channel}", (spot.column, spot.row), (0, 6), fontsize=6, zorder=4)
            label.set(ha="center", anncoords="offset points")

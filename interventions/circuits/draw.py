"""Circuits as matplotlib figures, for notebooks and papers; the report draws them interactively.

A function returns a `matplotlib.figure.Figure` and leaves global state alone: a notebook shows it, `.savefig` keeps it.
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

from interventions.circuits.circuit import Circuit
from interventions.circuits.controls import IDLE
from interventions.circuits.picture_layout import LINKS, Layout, place_nodes
from interventions.steering.plot import GREY, draw_steering
from interventions.steering.result import Steering
from sparse_model.model.node_names import parse_node

PLUS, MINUS, INK = "#c8691a", "#2f6db5", "#1f2429"
MOST_LABELS = 150
"""Nodes of a circuit beyond which they are drawn without their names."""


def plot_circuit(circuit: Circuit) -> Figure:
    """A circuit: layers left to right, a row per residual channel, edges coloured by sign and as wide as their weight.

    Filled nodes compute (q, k, v, neurons), open ones read and write the stream; grey lines join a residual write with
    the later reads of its channel. A node's area is its effect, where the circuit has controls.
    """
    graph = circuit.to_networkx(links=True)
    layout = place_nodes(graph)
    columns, rows = max(1, len(layout.columns)), max(1, layout.rows)
    figure = Figure(figsize=(1.0 + 0.95 * columns, 1.3 + min(0.34 * rows, 14)), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(-0.6, columns - 0.4), ylim=(rows - 0.4, -1.4))
    axes.set_axis_off()
    controlled = "" if circuit.controls is not None else ", UNCONTROLLED"
    axes.set_title(
        f"{circuit.task}, {circuit.model} model: {circuit.n_nodes} nodes, {circuit.n_edges} edges, "
        f"task loss {circuit.loss:.3f}{controlled}",
        fontsize=10,
    )
    _draw_layers(axes, layout)
    _draw_lines(axes, graph, layout)
    _draw_nodes(axes, circuit, layout)
    return figure


def _draw_layers(axes: Axes, layout: Layout) -> None:
    for layer in sorted({column.layer for column in layout.columns}):
        own = [at for at, column in enumerate(layout.columns) if column.layer == layer]
        corner = (own[0] - 0.47, -1.35)
        axes.add_patch(Rectangle(corner, len(own) - 0.06, layout.rows + 0.85, color=GREY, alpha=0.09, lw=0, zorder=0))
        axes.text(own[0] - 0.38, -1.0, f"layer {layer}", fontsize=8, fontweight="bold", color=GREY)
    for at, column in enumerate(layout.columns):
        axes.text(at, -0.68, column.title, fontsize=6.5, ha="center", color=GREY)


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
        chosen = [at for at, order in enumerate(orders) if order == above]
        axes.add_collection(
            LineCollection(
                [lines[at] for at in chosen],
                colors=[colours[at] for at in chosen],
                linewidths=[widths[at] for at in chosen],
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


def _draw_nodes(axes: Axes, circuit: Circuit, layout: Layout) -> None:
    effects = (circuit.controls or {}).get("node_effects", {})
    largest = max([*effects.values(), 1e-9])
    for name in circuit.names:
        node, spot = parse_node(name, circuit.shape), layout.spots[name]
        area = 18 + 70 * max(effects.get(name, 0.0), 0) / largest
        face = INK if node.head is not None or node.place == "mlp.post_act" else "white"
        axes.scatter(spot.column, spot.row, s=area, c=face, edgecolors=INK, linewidths=1.2, zorder=3)
        if len(circuit.names) <= MOST_LABELS:
            head = "" if node.head is None else f"{node.place.removeprefix('attn.')}{node.head}."
            label: Any = axes.annotate(f"{head}{node.channel}", (spot.column, spot.row), (0, 6), fontsize=6, zorder=4)
            label.set(ha="center", anncoords="offset points")


def plot_effects(effects: Mapping[str, int | float], *, most: int = 40) -> Figure:
    """Necessity node by node: the rise of the circuit's loss when each is deleted, largest first.

    `effects` are those of a circuit's controls, `circuit.controls["node_effects"]`, or of `checks.node_effects`; at
    most `most` bars. Below the dashed line a node does nothing. Raises ValueError for no effects.
    """
    if not effects:
        raise ValueError("there are no effects to plot: run sparse-bridges find-circuit with --controls")
    ranked = sorted(effects.items(), key=lambda entry: -entry[1])[:most]
    figure = Figure(figsize=(6.4, 0.8 + 0.2 * len(ranked)), layout="constrained")
    axes = figure.subplots()
    names, values = zip(*ranked, strict=True)
    axes.barh(range(len(ranked)), values, color=[MINUS if value >= IDLE else GREY for value in values], height=0.7)
    axes.axvline(IDLE, color=GREY, ls="--", lw=1)
    axes.set_yticks(range(len(ranked)), names, fontsize=7, family="monospace")
    axes.invert_yaxis()
    axes.set_xlabel("rise of the task loss without the node, nats")
    axes.spines[["top", "right"]].set_visible(False)
    left_out = len(effects) - len(ranked)
    axes.set_title(f"effect of each node{f' ({left_out} smaller ones left out)' if left_out else ''}", fontsize=10)
    return figure


def plot_strengths(result: Steering) -> Figure:
    """One task's steering: P(counterfactual answer) against strength, with the controls."""
    figure = Figure(figsize=(7.4, 4.2), layout="constrained")
    axes = figure.subplots()
    draw_steering(axes, result)
    axes.grid(alpha=0.25)
    axes.set_title(f"{result.task}: site {result.site}, where={result.where}, {result.prompts} prompts", fontsize=10)
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    return figure

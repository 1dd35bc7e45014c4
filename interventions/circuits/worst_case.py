"""Edges against what is left of the answer when an adversary ablates other nodes: a curve for a model, and its plot.

The gates are optimised once; the first k nodes of their order are kept, for growing k. Nothing is cut out for a target:
a size is judged by what happens outside it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from interventions.circuits.ablation import Ablation
from interventions.circuits.faithfulness import measure_faithfulness
from interventions.circuits.gates import fit_gates
from interventions.circuits.node_model import NodeModel, count_edges
from interventions.circuits.prune_config import PruneConfig
from interventions.circuits.pruning import Ranking, splits
from interventions.figures import GREY, save_figure
from interventions.tasks.base import Task

COLOURS = {"sparse": "#1fa09a", "dense": "#d0527f"}


class CurvePoint(NamedTuple):
    """The first nodes of an order, on evaluation prompts; losses in nats."""

    nodes: int
    edges: int
    loss: float
    """All others ablated, with the calibration fitted on selection prompts: the paper's."""
    alone: float
    """All others ablated, as it is."""
    random: float
    """Each other with p = .25, mean over draws, as it is."""
    worst: float
    """The worst subset found, as it is."""


def worst_case_curve(
    model: NodeModel,
    task: Task,
    ablation: Ablation,
    config: PruneConfig,
    *,
    pairs: int = 64,
    progress: bool = False,
) -> list[CurvePoint]:
    """Points at 0, 8, 16, 32, ... nodes up to all of them; `pairs` of the evaluation templates."""
    train, selection = splits(task, config)
    evaluation = task.sample(pairs, split="evaluation", seed=config.seed)
    fitted = fit_gates(model, train, ablation, config, progress=progress)
    ranking = Ranking(model, fitted, ablation, selection, config)
    n_gates, points = ranking.layout.n_gates, []
    for k in [0, *(2**i for i in range(3, n_gates.bit_length()) if 2**i < n_gates), n_gates]:
        mask = ranking.first(k)
        kept = ranking.layout.split(mask)
        scores = measure_faithfulness(model, kept, ablation, ranking.scored(mask).calibration, evaluation, config)
        random = next(drawn.mean.loss for drawn in scores.random if drawn.rate == 0.25)
        points.append(
            CurvePoint(k, count_edges(model, kept), scores.loss, scores.alone.loss, random, scores.worst.loss)
        )
    return points


def plot_worst_case(curves: Mapping[str, Sequence[CurvePoint]], target: float, path: Path) -> Path:
    """Draw the curves of several models (sparse, dense) as a PNG by way of a temporary name; returns its path.

    Solid: the worst subset. Dashed: all others ablated, calibrated, as the paper scores.
    """
    figure = Figure(figsize=(5.5, 3.8), layout="constrained")
    axes = figure.subplots()
    for label, points in curves.items():
        colour = COLOURS.get(label, GREY)
        edges = [max(1, point.edges) for point in points]
        axes.plot(edges, [point.worst for point in points], "o-", ms=4, color=colour, label=f"{label}, worst case")
        axes.plot(edges, [point.loss for point in points], "--", color=colour, label=f"{label}, all others ablated")
    axes.axhline(target, color=GREY, lw=0.8, ls=":")
    axes.set(xscale="log", xlabel="edges (none drawn as 1)", ylabel="task loss on evaluation prompts, nats")
    axes.set_yscale("symlog", linthresh=0.1)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    return save_figure(figure, path)

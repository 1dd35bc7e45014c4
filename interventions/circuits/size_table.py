"""Circuit sizes of several tasks and pruning seeds put together: a table, the figures for metrics.json, a plot."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from interventions.circuits.size import LABELS, Contest, Label, Measured
from interventions.figures import save_figure

Sizes = Mapping[str, Mapping[Label, Sequence[Measured]]]
"""By task and model, one measurement per seed."""
COLOURS: dict[Label, str] = {"sparse": "#1fa09a", "dense": "#d0527f"}


def geometric_mean(edges: Sequence[int]) -> float:
    """Of edge counts; none counts as one. Raises ValueError for no counts."""
    if not edges:
        raise ValueError("no task to average over: both models must solve at least one")
    return math.exp(sum(math.log(max(1, n)) for n in edges) / len(edges))


def edges_at(sizes: Sizes, label: Label, target: float, seed: int) -> list[int] | None:
    """Every task's edges at a target loss with the seed of that index; None where a task does not reach it."""
    sizes_there = [measured[label][seed].size_at(target) for measured in sizes.values()]
    return (
        None if any(size is None for size in sizes_there) else [size.edges for size in sizes_there if size is not None]
    )


def with_edges(sizes: Sizes, target: float) -> dict[str, Mapping[Label, Sequence[Measured]]]:
    """The tasks for which both models need an edge with every seed.

    The others can be done by the frame alone: embedding, unembedding, and the bigram table, which GPT-2 has not. They
    say nothing about circuits.
    """

    def has_edges(measured: Measured) -> bool:
        size = measured.size_at(target)
        return size is not None and size.edges > 0

    return {
        task: by for task, by in sizes.items() if all(has_edges(measured) for label in LABELS for measured in by[label])
    }


def contest_summary(
    contest: Contest, sizes: Sizes, target: float, seeds: Sequence[int], left_out: Mapping[str, str]
) -> dict:
    """The figures of one contest as plain numbers: edges by task, their geometric means and the ratio by seed.

    Raises ValueError where there is no task to average over.
    """
    needing = with_edges(sizes, target)
    return {
        "target_loss": target,
        "seeds": list(seeds),
        "ce": {side.label: side.ce for side in contest.sides},
        "all": _averages(sizes, target, len(seeds)),
        "with_edges": {"tasks": list(needing)} | (_averages(needing, target, len(seeds)) if needing else {}),
        "curve": {label: curve(needing or sizes, label, len(seeds)) for label in LABELS},
        "tasks": {
            task: {label: [_figures(of_seed, target) for of_seed in measured[label]] for label in LABELS}
            for task, measured in sizes.items()
        },
        "left_out": dict(left_out),
    }


def _averages(sizes: Sizes, target: float, seeds: int) -> dict[str, Any]:
    means = {label: _means(sizes, label, target, seeds) for label in LABELS}
    ratio = [dense / sparse for sparse, dense in zip(means["sparse"], means["dense"], strict=True)]
    return {"geometric_mean_edges": means, "ratio": ratio}


def curve(sizes: Sizes, label: Label, seeds: int) -> list[tuple[float, float]]:
    """(target loss, geometric mean of edges, median over seeds) where every task and both models reach the target."""
    targets = sorted(
        {size.target for measured in sizes.values() for of_seed in measured[label] for size in of_seed.sizes}
    )
    points = []
    for target in targets:
        if all(edges_at(sizes, other, target, i) is not None for other in LABELS for i in range(seeds)):
            points.append((target, statistics.median(_means(sizes, label, target, seeds))))
    return points


def _means(sizes: Sizes, label: Label, target: float, seeds: int) -> list[float]:
    return [geometric_mean(edges_at(sizes, label, target, i) or []) for i in range(seeds)]


def _figures(measured: Measured, target: float) -> dict[str, Any]:
    size, needed, control = measured.size_at(target), measured.necessity, measured.redrawn
    assert size is not None
    assert needed is not None
    return {
        "nodes": size.nodes,
        "edges": size.edges,
        "necessary": needed.loss > needed.limit,
        "necessary_calibrated": needed.calibrated > needed.calibrated_limit,
        "redrawn_edges": control.edges if control else None,
        "redrawn_reached": control.k is not None if control else None,
    }


def contest_table(figures: Mapping[str, Any]) -> str:
    """A summary as Markdown; several seeds as median (lowest to highest)."""
    heads = ["task"] + [
        f"{label} {what}" for label in LABELS for what in ("nodes", "edges", "necessary", "redrawn edges")
    ]
    lines = [[*heads, "dense / sparse edges"], ["---"] * (len(heads) + 1)]
    for task, by_label in figures["tasks"].items():
        cells = [cell for label in LABELS for cell in _cells(by_label[label])]
        pairs = zip(by_label["dense"], by_label["sparse"], strict=True)
        ratios = [max(1, dense["edges"]) / max(1, sparse["edges"]) for dense, sparse in pairs]
        lines.append([task, *cells, _range(ratios, ".1f")])
    named = {"geometric mean": figures["all"], "of those with edges in both": figures["with_edges"]}
    for name, averages in named.items():
        if "ratio" in averages:
            means = [_range(averages["geometric_mean_edges"][label], ".1f") for label in LABELS]
            lines.append([name, "", means[0], "", "", "", means[1], "", "", _range(averages["ratio"], ".1f")])
    rows = [f"| {' | '.join(line)} |" for line in lines]
    ce = figures["ce"]
    rows.append(
        f"\ntask loss {figures['target_loss']:g} or less; held-out cross-entropy sparse {ce['sparse']:.4f}, dense "
        f"{ce['dense']:.4f} nats (the comparison is fair only where they are about equal)"
    )
    rows += [f"left out, {task}: {reason}" for task, reason in figures["left_out"].items()]
    return "\n".join(rows)


def overview(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """Several summaries as Markdown, a line each: losses, edges and ratio over the tasks that need edges; medians."""
    heads = ["", "tasks", "sparse loss", "dense loss", "sparse edges", "dense edges", "dense / sparse"]
    lines, columns = [heads, ["---"] * len(heads)], []
    for name, of in figures.items():
        averages = of["with_edges"]
        if "ratio" not in averages:
            lines.append([name, "0", *(f"{of['ce'][label]:.4f}" for label in LABELS), "", "", ""])
            continue
        edges = [statistics.median(averages["geometric_mean_edges"][label]) for label in LABELS]
        columns.append([*edges, statistics.median(averages["ratio"])])
        losses = [f"{of['ce'][label]:.4f}" for label in LABELS]
        lines.append([name, str(len(averages["tasks"])), *losses, *(f"{value:.1f}" for value in columns[-1])])
    if columns:
        lines.append(["median", "", "", "", *(_range(values, ".1f") for values in zip(*columns, strict=True))])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(seeds: Sequence[Mapping[str, Any]]) -> list[str]:
    redrawn = [of_seed["redrawn_edges"] for of_seed in seeds if of_seed["redrawn_edges"] is not None]
    tried = any(of_seed["redrawn_reached"] is not None for of_seed in seeds)
    necessary = sum(of_seed["necessary"] for of_seed in seeds)
    return [
        _range([of_seed["nodes"] for of_seed in seeds], "g"),
        _range([of_seed["edges"] for of_seed in seeds], "g"),
        "yes" if necessary == len(seeds) else f"{necessary} of {len(seeds)}" if necessary else "no",
        (_range(redrawn, "g") + " where reached" * (len(redrawn) < len(seeds))) if redrawn else "not reached" * tried,
    ]


def _range(values: Sequence[int | float], form: str) -> str:
    middle = format(statistics.median(values), form)
    if len(values) == 1:
        return middle
    return f"{middle} ({format(min(values), form)} to {format(max(values), form)})"


def plot(figures: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Draw summaries as a PNG by way of a temporary name; returns its path.

    Left: target loss against the geometric mean of edges. Right: edges of every task in both models, with medians.
    """
    tasks = list(dict.fromkeys(task for summary in figures for task in summary["tasks"]))
    figure = Figure(figsize=(10.5, 1.8 + 0.24 * max(8, len(tasks))), layout="constrained")
    left, right = figure.subplots(1, 2)
    for label in LABELS:
        for index, summary in enumerate(figures):
            points = summary["curve"][label]
            left.plot(
                [edges for _, edges in points],
                [target for target, _ in points],
                "o-",
                ms=4,
                color=COLOURS[label],
                label=label if not index else None,
            )
    left.axhline(figures[0]["target_loss"], color="grey", lw=0.8, ls=":")
    left.set(
        xscale="log",
        xlabel="edges, geometric mean over tasks that need some",
        ylabel="target task loss, nats",
        ylim=(0, None),
    )
    _dots(right, figures, tasks)
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    left.legend(frameon=False)
    return save_figure(figure, path)


def _dots(axes: Axes, figures: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> None:
    def edges_of(task: str, label: str) -> list[int]:
        return [
            max(1, of_seed["edges"]) for summary in figures for of_seed in summary["tasks"].get(task, {}).get(label, ())
        ]

    middle = {task: {label: statistics.median(edges_of(task, label)) for label in LABELS} for task in tasks}
    order = sorted(tasks, key=lambda task: middle[task]["dense"])
    for row, task in enumerate(order):
        axes.plot([middle[task][label] for label in LABELS], [row, row], color="grey", lw=0.8, zorder=1)
        for label in LABELS:
            edges = edges_of(task, label)
            axes.plot(edges, [row] * len(edges), "o", ms=3, color=COLOURS[label], alpha=0.5, mew=0)
            axes.plot([middle[task][label]], [row], "o", ms=6, color=COLOURS[label])
    axes.set(
        xscale="log",
        xlabel=f"edges at a task loss of {figures[0]['target_loss']:g} (none drawn as 1)",
        yticks=range(len(order)),
    )
    axes.set_yticklabels(order)

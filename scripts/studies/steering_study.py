"""Steering over several runs (training seeds, sparsities, widths): a Markdown table and a figure.

Runs that differ in depth, width, kept fraction or place of the edit stand in columns of their own. A cell is the median
over a column's runs and their range; of n runs the range holds the median of all seeds with probability 1 - 2^(1-n).
Each set is shown at the strength that was chosen for it on selection prompts (1 where none was); the controls at their
set's.

Example:
    python scripts/studies/steering_study.py runs/demo runs/demo-1 runs/demo-2 runs/demo-3 runs/demo-4
"""

import statistics
from dataclasses import dataclass
from pathlib import Path

import tyro
from matplotlib.figure import Figure
from summary import read_steering, steering_figures

from interventions.charts import GREY, depth_colour
from interventions.cli.options import report_errors
from interventions.figures import save_figure
from interventions.steering.result import Steering, at_strength, set_name, strength_of, value_at
from sparse_model.config import require
from sparse_model.io.atomic import check_writable_file


@dataclass(frozen=True, kw_only=True)
class Options:
    """Steering over several runs (training seeds, sparsities, widths): a Markdown table and a figure."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Run folders, or folders given to sparse-bridges steer as --out."""
    task: str = "single_double_quote"
    """Task that was steered."""
    strength: float | None = None
    """Steering strength of the table and the figure; unset: for each set its chosen one."""
    plot: str | None = None
    """Where the figure goes; unset: steering_study-TASK.png beside the first run."""


def group_of(result: Steering) -> str:
    """The column of a run: everything about it but the seed."""
    m = result.model
    return f"{m['layers']} layers, {m['d_sparse']} wide, 1/{1 / m['nonzero_fraction']:g} nonzero, where={result.where}"


def read_groups(options: Options) -> dict[str, list[Steering]]:
    """The runs' results by group. Raises what `read_steering` raises, and ValueError for a strength not measured."""
    groups: dict[str, list[Steering]] = {}
    for folder in options.runs:
        _, result = read_steering(Path(folder), options.task)
        for name in result.channels:
            at_strength(result, strength_of(result, set_name(name), options.strength), folder)
        groups.setdefault(group_of(result), []).append(result)
    return groups


def print_table(groups: dict[str, list[Steering]], strength: float | None) -> None:
    """Medians with ranges, a column for each group."""
    columns = [[steering_figures(r, strength) for r in runs] for runs in groups.values()]
    heads = [f"{name} ({len(runs)} run{'s' * (len(runs) != 1)})" for name, runs in groups.items()]
    where = "at chosen strengths" if strength is None else f"strength {strength:g}"
    print(f"| {where} | {' | '.join(heads)} |")
    print("|---" * (len(heads) + 1) + "|")
    print(f"| sites | {' | '.join(', '.join(str(r.site) for r in runs) for runs in groups.values())} |")
    for name in dict.fromkeys(name for column in columns for row in column for name in row):
        cells = []
        for column in columns:
            values = [row[name] for row in column if name in row]
            range_ = f" ({min(values):.3g} to {max(values):.3g})" if len(values) > 1 else ""
            cells.append(f"{statistics.median(values):.3g}{range_}" if values else "-")
        print(f"| {name} | {' | '.join(cells)} |")


def draw(groups: dict[str, list[Steering]], options: Options, path: Path) -> Path:
    """Effect against number of channels: a thin line for each run, a thick one for the median of its group."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for number, (name, runs) in enumerate(groups.items()):
        colour = depth_colour(number, len(groups))
        by_size: dict[int, list[float]] = {}
        for result in runs:
            points = sorted((int(n), value_at(result, set_name(n), options.strength)) for n in result.channels)
            axes.plot(*zip(*points, strict=True), color=colour, lw=0.8, alpha=0.5)
            for n, p in points:
                by_size.setdefault(n, []).append(p)
        sizes = sorted(by_size)
        axes.plot(sizes, [statistics.median(by_size[n]) for n in sizes], "o-", ms=4, lw=2.2, color=colour, label=name)
        if len(groups) == 1:
            styles = {"exact patch": "-", "difference of means": "--", "random directions, 95th percentile": ":"}
            for control, style in styles.items():
                levels = [steering_figures(r, options.strength).get(control) for r in runs]
                measured = [level for level in levels if level is not None]
                if measured:
                    level = statistics.median(measured)
                    axes.axhline(level, color=GREY, ls=style, lw=1.2, label=f"{control}, median")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="sparse channels moved", ylabel="P(counterfactual answer)")
    axes.set(ylim=(-0.02, 1.02), title=options.task)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7, frameon=False)
    return save_figure(figure, path)


def main(options: Options) -> None:
    require(len(options.runs) > 0, "runs", options.runs, "name at least one run folder")
    if options.plot:
        check_writable_file(Path(options.plot))
    if not options.runs:
        raise ValueError("runs=(): name at least one")
    groups = read_groups(options)
    print_table(groups, options.strength)
    default = Path(options.runs[0]).parent / f"steering_study-{options.task}.png"
    print(f"\nplot: {draw(groups, options, Path(options.plot) if options.plot else default)}")


if __name__ == "__main__":
    with report_errors():
        main(tyro.cli(Options, description=__doc__))

"""Train grids of small weight-sparse models: loss against width at equal nonzeros, and ablations of the training rules.

`grid` draws loss against width at equal nonzeros, activation kurtosis against sparsity, and dead neurons; `ablations`
changes one rule of training at a time. Both compare learning rates at the first seed, go on with the best, and resume
after a kill. On two cores, `grid` takes about an hour and a half and `ablations` an hour.

Examples:
    python scripts/studies/frontier.py grid
    python scripts/studies/frontier.py ablations --plot docs/ablations.png
"""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from matplotlib.figure import Figure

from interventions.cli.options import report_errors
from interventions.figures import save_figure
from sparse_model.config import require
from sparse_model.io.atomic import check_writable_file
from sparse_model.training.pretrain import PretrainConfig
from sparse_model.training.sweep import Outcome, ablations, grid, run_sweep


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train grids of small weight-sparse models and compare them."""

    what: tyro.conf.Positional[Literal["grid", "ablations"]]
    """grid: nonzeros x width x seeds. ablations: one rule of training at a time."""
    out: str | None = None
    """Folder of the trained models; unset: runs/frontier-grid or runs/frontier-ablations."""
    plot: str | None = None
    """Where the figure goes; unset: frontier.png in that folder."""
    nonzeros: tuple[int, ...] = (8192, 16384, 32768, 65536)
    """Nonzero weights of a model, all sparse parameters together (grid)."""
    widths: tuple[int, ...] = (64, 128, 256)
    """d_model; d_mlp is four times it, heads have 16 channels (grid)."""
    rates: tuple[float, ...] = (4e-3, 8e-3, 1.6e-2)
    """Learning rates compared at the first seed."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of weights, batches and text."""
    steps: int = 2000
    """Optimizer steps of 4 blocks of 64 tokens."""
    jobs: int = 2
    """Trainings side by side, one thread each."""


def medians(outcomes: dict[str, list[Outcome]], field: str) -> dict[str, float]:
    """Median over the seeds of one figure, by label."""
    return {label: statistics.median(getattr(o, field) for o in runs) for label, runs in outcomes.items()}


def print_table(outcomes: dict[str, list[Outcome]]) -> None:
    """All outcomes as a Markdown table: medians over the seeds, the loss also with its range."""
    print("| | loss | lowest to highest | best rate | nonzeros | kept | kurtosis | dead neurons |")
    print("|---|---|---|---|---|---|---|---|")
    columns = {field: medians(outcomes, field) for field in ("loss", "nonzeros", "kurtosis", "dead_neurons")}
    for label, runs in outcomes.items():
        losses, outcome = [o.loss for o in runs], runs[0]
        kept = f"1/{outcome.entries / outcome.nonzeros:.1f}" if outcome.nonzeros else "-"
        print(
            f"| {label} | {columns['loss'][label]:.3f} | {min(losses):.3f} to {max(losses):.3f} | {outcome.lr:g} "
            f"| {columns['nonzeros'][label]:.0f} | {kept} | {columns['kurtosis'][label]:.1f} "
            f"| {columns['dead_neurons'][label]:.0f} of {outcome.neurons} |"
        )


def plot_grid(outcomes: dict[str, list[Outcome]], options: Options, path: Path) -> None:
    """Three panels: loss against width by nonzeros, kurtosis and dead neurons against the kept fraction by width."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    loss, kurt, dead = figure.subplots(1, 3)
    series = [*(f"nonzeros {n}" for n in options.nonzeros), "dense"]
    for index, name in enumerate(series):
        colour = "black" if name == "dense" else f"C{index}"
        rows = [[o.loss for o in outcomes[f"width {width} {name}"]] for width in options.widths]
        loss.plot(options.widths, [statistics.median(r) for r in rows], "o-", ms=3, color=colour, label=name)
        loss.fill_between(options.widths, [min(r) for r in rows], [max(r) for r in rows], color=colour, alpha=0.15)
    for index, width in enumerate(options.widths):
        rows = [outcomes[f"width {width} {name}"] for name in series]
        kept = [row[0].nonzeros / row[0].entries for row in rows]
        kurtosis = [statistics.median(o.kurtosis for o in row) for row in rows]
        share = [statistics.median(o.dead_neurons / o.neurons for o in row) for row in rows]
        kurt.plot(kept, kurtosis, "o-", ms=3, color=f"C{index}", label=f"width {width}")
        dead.plot(kept, share, "o-", ms=3, color=f"C{index}", label=f"width {width}")
    loss.set(xlabel="d_model", ylabel="held-out loss, nats", xscale="log", xticks=options.widths)
    loss.set_xticklabels([str(w) for w in options.widths])
    loss.minorticks_off()
    kurt.set(xlabel="kept fraction of the weights", ylabel="kurtosis of the final residual", xscale="log", yscale="log")
    dead.set(xlabel="kept fraction of the weights", ylabel="dead MLP neurons, share", xscale="log")
    for axes in (loss, kurt, dead):
        axes.grid(alpha=0.25)
        axes.legend(fontsize=7)
    print(f"drawn: {save_figure(figure, path)}")


def plot_ablations(outcomes: dict[str, list[Outcome]], path: Path) -> None:
    """The loss of every variant, one dot per seed, against that of the rules as they are."""
    figure = Figure(figsize=(7.4, 0.3 * len(outcomes) + 1), layout="constrained")
    axes = figure.subplots()
    labels = list(outcomes)
    for index, label in enumerate(labels):
        losses = [o.loss for o in outcomes[label]]
        axes.plot(losses, [index] * len(losses), "o", ms=4, color="C0")
        axes.plot([statistics.median(losses)], [index], "|", ms=12, color="black")
    axes.axvline(statistics.median(o.loss for o in outcomes[labels[0]]), color="grey", lw=0.8)
    axes.set(xlabel="held-out loss, nats (dots: seeds, bar: median)", yticks=range(len(labels)))
    axes.set_yticklabels(labels)
    axes.invert_yaxis()
    axes.grid(alpha=0.25)
    print(f"drawn: {save_figure(figure, path)}")


def main(options: Options) -> None:
    if options.plot:
        check_writable_file(Path(options.plot))
    for name in ("nonzeros", "widths", "rates", "seeds"):
        require(len(getattr(options, name)) > 0, name, getattr(options, name), "name at least one")
    base = PretrainConfig(steps=options.steps, checkpoint_every=options.steps, log_every=100)
    if options.what == "grid":
        variants = grid(base, options.nonzeros, options.widths)
    else:
        variants = ablations(base)
    folder = Path(options.out or f"runs/frontier-{options.what}")
    outcomes = run_sweep(variants, options.rates, options.seeds, folder, jobs=options.jobs)
    print_table(outcomes)
    plot = Path(options.plot) if options.plot else folder / "frontier.png"
    if options.what == "grid":
        plot_grid(outcomes, options, plot)
    else:
        plot_ablations(outcomes, plot)


if __name__ == "__main__":
    with report_errors():
        main(tyro.cli(Options, description=__doc__))

"""Steer the dense model through sparse channels: strength curves, controls, side effects, and a figure.

Examples:
    sparse-bridges steer --run runs/demo
    sparse-bridges steer --run runs/demo --task while_return_true --where stream --out runs/demo/stream
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from interventions.cli.options import SteeredPrompts, SteeredTask, parse, say_next
from interventions.steering.experiment_config import Experiment
from interventions.tasks.names import check_task_name
from sparse_model.io.lock import one_writer
from sparse_model.io.tables import paragraph, table

if TYPE_CHECKING:
    from torch import nn

    from interventions.bases.comparison_config import Comparison
    from interventions.bundle.channels import Channel
    from interventions.steering.result import Steering


@dataclass(frozen=True, kw_only=True)
class Settings(Experiment):
    """An experiment whose sets can be given on the command line."""

    task: SteeredTask = None
    prompts: SteeredPrompts = None
    sets: Annotated[tuple[tuple[int, ...], ...], tyro.conf.UseAppendAction] = ()
    """Set of channels to move instead, such as --sets 3 --sets 3 7; no two of one size. A channel that was not searched
    for is a set by itself."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Steer the dense model through sparse channels: strength curves, controls, side effects, and a figure."""

    run: str = "runs/demo"
    """Run folder, or the name of a packaged bundle, which needs --out."""
    out: str | None = None
    """Folder for metrics.json and the figure; unset: the run's own, which keeps one result per task."""
    device: str = "cpu"
    """Where the models run: cpu, cuda or cuda:N."""
    anyway: bool = False
    """Steer also where the dense model does not solve the task."""
    experiment: Annotated[Settings, tyro.conf.arg(name="")] = field(default_factory=Settings)
    """What is steered, and what it is compared with."""


def command(arguments: list[str]) -> None:
    main(parse(Options, "steer", arguments, __doc__))


def main(options: Options) -> None:
    from interventions.bundle.bundle import load_dense

    run, folder = places(options.run, options.out, options.experiment)
    with one_writer(folder):
        _steer(load_dense(run, options.device), folder, options)


def places(name: str, out: str | None, experiment: "Experiment | Comparison") -> tuple[Path, Path]:
    """The run, and the folder that its results go to. Raises for what can be refused before anything is loaded."""
    from bridges.packaged import FOLDER, find_run
    from sparse_model.io.atomic import check_writable

    run = find_run(name)
    folder = Path(out) if out else run
    if folder.is_relative_to(FOLDER):
        raise ValueError(f"{name} is part of the package, where nothing is written: name a folder with --out")
    check_names(run, experiment)
    check_writable(folder)
    return run, folder


def check_names(run: Path, experiment: "Experiment | Comparison") -> None:
    """Raise for an unknown channel or task before anything is loaded."""
    from interventions.bundle.channels import load_channels, resolve
    from sparse_model.config import SparseConfig, from_json

    shape = run / "sparse" / "config.json"
    if experiment.task:
        check_task_name(experiment.task)
    if experiment.channel and shape.is_file():
        resolve(experiment.channel, load_channels(run), from_json(SparseConfig, shape))


def _steer(dense: "nn.Module", folder: Path, options: Options) -> None:
    from bridges.run_folder import update_metrics
    from interventions.bundle.bundle import get_bundle
    from interventions.steering.baseline import dense_accuracy
    from interventions.steering.experiment import resolved
    from interventions.steering.plot import plot_steering
    from interventions.steering.steer import steer
    from interventions.tasks.of_run import run_task

    get_bundle(dense).bridges.check_scales()
    baseline = dense_accuracy(dense, options.experiment)
    check_solved(baseline["pair_accuracy"], anyway=options.anyway)
    prompts = run_task(get_bundle(dense).run, str(resolved(options.experiment, get_bundle(dense)).task)).record
    result = steer(dense, options.experiment)
    name = "steering.png" if result.task == "single_double_quote" else f"steering-{result.task}.png"
    plot = plot_steering(result, folder / name)
    update_metrics(
        folder,
        merge=True,
        dense_task={result.task: baseline},
        steering={result.task: result._asdict()},
        task_prompts={result.task: prompts},
    )
    describe(result, baseline, get_bundle(dense).channels)
    print(f"plot: {plot}")
    say_next(
        "report", "--run", str(folder if folder == get_bundle(dense).folder else options.run), device=options.device
    )


def check_solved(accuracy: float, *, anyway: bool) -> None:
    """Raise ValueError for a task that the dense model does not solve, or say so."""
    from interventions.circuits.task_scores import SOLVED, solves

    if solves(accuracy):
        return
    said = (
        f"the dense model gets {accuracy:.0%} of the task's pairs right, a task counts as solved from {SOLVED:.0%}: "
        "a steered answer means little where the unsteered one is wrong"
    )
    if not anyway:
        raise ValueError(
            f"{said}; train the dense model longer, take a task of sparse-bridges solved-tasks, or add --anyway"
        )
    print(f"warning: {said}", file=sys.stderr)


def describe(result: "Steering", baseline: dict[str, float], channels: Mapping[str, "Channel"]) -> None:
    """Print the curves, the edits at their chosen strengths, the equal searches, the side effects and the verdict."""
    from interventions.steering.headline import headline

    print(
        paragraph(
            f"{result.task}, {result.prompts} evaluation prompts, site {result.site}, where={result.where}; dense "
            "model: " + ", ".join(f"{n} {v:.4f}" for n, v in baseline.items())
        )
    )
    print(f"\nmean P(counterfactual answer) at each strength\n{table(curve_rows(result))}")
    print(paragraph("near 1 is good for channels, near 0 for what is drawn at random; 95 %: over prompts."))
    print(f"\nat the strength chosen on selection prompts\n{table(chosen_rows(result))}")
    if result.searched:
        print(f"\none search for all, at norm {result.search_norm:.2f}\n{table(search_rows(result))}")
        print(paragraph("ours, median, largest: P(counterfactual answer); p: draws as good, small is good."))
    print(f"\nside effects of the mean edit at every token\n{table(side_rows(result.side_effects))}")
    print(
        paragraph(
            "KL, nats per token of other text, and perplexity (cf.: behind the counterfactual prompt): near those of "
            "unsteered is good. others: pairs right on tasks that the unsteered model solves, and the worst of them."
        )
    )
    print(f"\nNMSE at the site: decoder {result.ridge_fit['decoder_nmse']:.3f}, ridge {result.ridge_fit['nmse']:.3f}")
    found = headline(result, channels)
    if found is not None:
        print(paragraph(f"{found.verdict}: {found.words}"))


def curve_rows(result: "Steering") -> list[list[str]]:
    """Every curve at up to six strengths; for the sets the bootstrap interval at the last."""
    from interventions.steering.result import named_curves, set_name

    step = -(-(len(result.strength) - 1) // 5) or 1
    shown = [*range(0, len(result.strength) - 1, step), len(result.strength) - 1]
    intervals = {
        set_name(n): f"{low[-1]:.2f}-{result.channels_high[n][-1]:.2f}" for n, low in result.channels_low.items()
    }
    rows = [["strength", *(f"{result.strength[i]:g}" for i in shown), "95 %"]]
    for name, curve in named_curves(result).items():
        short = name.replace("95th percentile", "p95").replace("random directions as long as", "random, as long as")
        rows.append([short, *(f"{curve[i]:.3f}" for i in shown), intervals.get(name, "")])
    return rows


def chosen_rows(result: "Steering") -> list[list[str]]:
    """Each edit at the strength that was chosen on selection prompts, or at 1."""
    from interventions.steering.result import FROM_SPARSE, IN_PAPER_UNITS, chosen_strength, place_of, set_name

    edits = [(set_name(n), n, curve) for n, curve in result.channels.items()]
    edits += [(set_name(n) + FROM_SPARSE, f"by_patching {n}", curve) for n, curve in result.by_patching.items()]
    edits += [(set_name(n) + IN_PAPER_UNITS, f"paper {n}", curve) for n, curve in result.paper.items()]
    edits.append(("difference of means", "difference_of_means", result.difference_of_means))
    rows = [["edit", "strength", "P(cf.)", "random p95", ""]]
    for title, name, curve in edits:
        strength = chosen_strength(result, name)
        place = place_of(result, strength)
        random = result.random_own_p95.get(name)
        p = "not measured" if place is None else f"{curve[place]:.4f}"
        p95 = f"{random[place]:.4f}" if random and place is not None else ""
        rows.append([title, f"{strength:g}", p, p95, "" if name in result.chosen else "none was chosen"])
    return rows


def search_rows(result: "Steering") -> list[list[str]]:
    """What one search finds for ours and for the controls."""
    from interventions.steering.result import searches, set_name

    rows = [["searched through", "ours", "median", "largest", "draws", "p"]]
    for row in searches(result):
        values = f"{row.ours:.4f}", f"{row.median:.4f}", f"{row.largest:.4f}", str(row.draws), f"{row.p_value:.3f}"
        rows.append([f"{row.control}, {set_name(row.size)}", *values])
    return rows


def side_rows(effects: dict[str, dict[str, Any]]) -> list[list[str]]:
    """What the fixed vectors do to everything else."""
    from interventions.steering.result import set_name

    rows = [["edit", "norm", "P(cf.)", "KL", "perpl.", "(cf.)", "others", "worst"]]
    for name, one in effects.items():
        accuracies = one["pair_accuracy"]
        worst = min(accuracies, key=accuracies.__getitem__, default=None)
        figures = [f"{one['norm']:.2f}", f"{one['p_target']:.4f}", f"{one['kl']:.4f}"]
        figures += [f"{one['perplexity']:.2f}", f"{one['perplexity_counterfactual']:.2f}"]
        mean = "" if worst is None else f"{sum(accuracies.values()) / len(accuracies):.3f}"
        rows.append([set_name(name), *figures, mean, f"{worst} {accuracies[worst]:.2f}" if worst else "none solved"])
    return rows

"""Steer the dense model through sparse channels: strength curves, controls, side effects, and a figure.

Examples:
    sparse-bridges steer --run runs/demo
    sparse-bridges steer --run runs/demo --task while_return_true --where stream --out runs/demo/stream
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from interventions.cli.options import PROMPTS_HELP, TASK_LIST, parse
from interventions.steering.experiment_config import Experiment
from interventions.tasks.names import PromptKind, check_task_name
from sparse_model.io.lock import one_writer

if TYPE_CHECKING:
    from torch import nn

    from interventions.steering.result import Steering


@dataclass(frozen=True, kw_only=True)
class Settings(Experiment):
    """An experiment whose sets can be given on the command line."""

    task: Annotated[
        str | None,
        tyro.conf.arg(
            help=f"Task whose prompts are steered, {TASK_LIST}; unset: the one that the channel was found for."
        ),
    ] = None
    prompts: Annotated[PromptKind | None, tyro.conf.arg(help=f"{PROMPTS_HELP} Unset: as for the channel's search.")] = (
        None
    )
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
    from interventions.bundle.packaged import FOLDER, find_run
    from sparse_model.io.atomic import check_writable

    run = find_run(options.run)
    folder = Path(options.out) if options.out else run
    if folder.is_relative_to(FOLDER):
        raise ValueError(f"{options.run} is part of the package, where nothing is written: name a folder with --out")
    check_names(run, options.experiment)
    check_writable(folder)
    with one_writer(folder):
        _steer(load_dense(run, options.device), folder, options)


def check_names(run: Path, experiment: Settings) -> None:
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
    print(
        f"{result.task}, {result.prompts} evaluation prompts, site {result.site}, where={result.where}; dense model: "
        + ", ".join(f"{n} {v:.4f}" for n, v in baseline.items())
    )
    print_curves(result)
    print_chosen(result)
    print_searches(result)
    print_side_effects(result.side_effects)
    print(f"\nNMSE at the site: decoder {result.ridge_fit['decoder_nmse']:.3f}, ridge {result.ridge_fit['nmse']:.3f}")
    print(f"plot: {plot}")


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


def print_curves(result: "Steering") -> None:
    """Every curve at up to six strengths; for the sets the bootstrap interval at the last."""
    from interventions.steering.result import named_curves, set_name

    step = -(-(len(result.strength) - 1) // 5) or 1
    shown = [*range(0, len(result.strength) - 1, step), len(result.strength) - 1]
    print(f"\n{'mean P(counterfactual answer) at strength':42}" + "".join(f"{result.strength[i]:8g}" for i in shown))
    intervals = {set_name(n): (low[-1], result.channels_high[n][-1]) for n, low in result.channels_low.items()}
    for name, curve in named_curves(result).items():
        interval = "   95 %: {:.4f} to {:.4f}".format(*intervals[name]) if name in intervals else ""
        print(f"{name:42}" + "".join(f"{curve[i]:8.4f}" for i in shown) + interval)


def print_chosen(result: "Steering") -> None:
    """Each edit at the strength that was chosen on selection prompts, or at 1."""
    from interventions.steering.result import FROM_SPARSE, IN_PAPER_UNITS, chosen_strength, place_of, set_name

    edits = [(set_name(n), n, curve) for n, curve in result.channels.items()]
    edits += [(set_name(n) + FROM_SPARSE, f"by_patching {n}", curve) for n, curve in result.by_patching.items()]
    edits += [(set_name(n) + IN_PAPER_UNITS, f"paper {n}", curve) for n, curve in result.paper.items()]
    edits.append(("difference of means", "difference_of_means", result.difference_of_means))
    print(f"\n{'at the strength chosen on selection prompts':46}strength   P(cf.)  random p95")
    for title, name, curve in edits:
        strength = chosen_strength(result, name)
        place = place_of(result, strength)
        values = "     not measured" if place is None else f"{curve[place]:9.4f}"
        if place is not None and name in result.random_own_p95:
            values += f"{result.random_own_p95[name][place]:12.4f}"
        print(f"{title:46}{strength:8g}{values}" + ("" if name in result.chosen else "   (none was chosen)"))


def print_searches(result: "Steering") -> None:
    """What one search finds for ours and for the controls."""
    from interventions.steering.result import searches, set_name

    heads = f"{'ours':>8}{'median':>9}{'largest':>9}{'draws':>7}{'p':>8}"
    print(f"\n{f'one search for all, at norm {result.search_norm:.2f}':46}{heads}")
    for row in searches(result):
        values = f"{row.ours:8.4f}{row.median:9.4f}{row.largest:9.4f}{row.draws:7}{row.p_value:8.3f}"
        print(f"{f'{row.control}, {set_name(row.size)}':46}{values}")


def print_side_effects(effects: dict[str, dict[str, Any]]) -> None:
    """What the fixed vectors do to everything else."""
    from interventions.steering.result import set_name

    heads = "  norm    P(cf.)  KL, nats   perplexity (cf.)   other tasks"
    print(f"\n{'side effects of the mean edit everywhere':40}{heads}")
    for name, one in effects.items():
        accuracies = one["pair_accuracy"]
        worst = min(accuracies, key=accuracies.__getitem__, default=None)
        tasks = (
            "none solved"
            if worst is None
            else (f"{sum(accuracies.values()) / len(accuracies):.3f}, worst {worst} {accuracies[worst]:.2f}")
        )
        perplexity = f"{one['perplexity']:.2f} ({one['perplexity_counterfactual']:.2f})"
        figures = f"{one['norm']:6.2f}{one['p_target']:10.4f}{one['kl']:10.4f}"
        print(f"{set_name(name):40}{figures}   {perplexity:16}   {tasks}")

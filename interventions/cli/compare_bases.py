"""Compare the sparse model's channels with other bases of their dense site: a table, a figure, effect and side effect.

Examples:
    sparse-bridges compare-bases --run runs/demo
    sparse-bridges compare-bases --run runs/demo --task while_return_true --kept 8 32 --coder-tokens 1000000
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from interventions.bases.comparison_config import Comparison
from interventions.cli.options import SteeredPrompts, SteeredTask, parse, say_next
from interventions.cli.steer import check_solved, places
from sparse_model.io.lock import one_writer
from sparse_model.io.tables import paragraph, table

if TYPE_CHECKING:
    from torch import nn

    from interventions.bases.result import Bases


@dataclass(frozen=True, kw_only=True)
class Settings(Comparison):
    """A comparison as the command line takes it."""

    task: SteeredTask = None
    prompts: SteeredPrompts = None


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compare the sparse model's channels with other bases of their dense site."""

    run: str = "runs/demo"
    """Run folder, or the name of a packaged bundle, which needs --out."""
    out: str | None = None
    """Folder for metrics.json and the figure; unset: the run's own, which keeps one result per task."""
    device: str = "cpu"
    """Where the models run: cpu, cuda or cuda:N."""
    anyway: bool = False
    """Compare also where the dense model does not solve the task."""
    comparison: Annotated[Settings, tyro.conf.arg(name="")] = field(default_factory=Settings)
    """What is steered, through which bases."""


def command(arguments: list[str]) -> None:
    main(parse(Options, "compare-bases", arguments, __doc__))


def main(options: Options) -> None:
    from interventions.bundle.bundle import load_dense

    run, folder = places(options.run, options.out, options.comparison)
    with one_writer(folder):
        _compare(load_dense(run, options.device), folder, options)


def _compare(dense: "nn.Module", folder: Path, options: Options) -> None:
    from bridges.run_folder import update_metrics
    from interventions.bases.compare import compare_bases
    from interventions.bases.result import plot_bases
    from interventions.bundle.bundle import get_bundle
    from interventions.steering.baseline import dense_accuracy
    from interventions.steering.experiment import resolved
    from interventions.tasks.of_run import run_task

    chosen = options.comparison
    get_bundle(dense).bridges.check_scales()
    experiment = chosen.experiment()
    check_solved(dense_accuracy(dense, experiment)["pair_accuracy"], anyway=options.anyway)
    result = compare_bases(dense, chosen)
    plot = plot_bases(result, folder / f"bases-{result.task}.png")
    record = run_task(get_bundle(dense).run, str(resolved(experiment, get_bundle(dense)).task)).record
    update_metrics(folder, merge=True, bases={result.task: result.plain()}, task_prompts={result.task: record})
    describe(result)
    print(f"plot: {plot}")
    say_next(
        "report", "--run", str(folder if folder == get_bundle(dense).folder else options.run), device=options.device
    )


def describe(result: "Bases") -> None:
    """Print the table, how good the trained coders are, and the verdict."""
    from interventions.bases.result import verdict

    print(f"{result.task}, site {result.site}, {result.prompts} evaluation prompts, unsteered {result.unsteered:.4f}")
    print(f"\n{table(rows_of(result))}")
    print(
        paragraph(
            f"equal: P(counterfactual answer) at the equal norm, {result.equal:g}, the largest at which 95 % of random "
            "directions do nothing. 0.5 at: the norm that first takes selection prompts so much of the way to P on "
            "their counterfactuals, in units of the exact patch's. vector: the set's mean vector at every token, where "
            "it first does so: P on evaluation prompts, KL in nats per token of other text, pairs right on other "
            "tasks. own: candidates of the sparse model alone. A transcoder's edits are of its sublayer's output, and "
            "so are their norms."
        )
    )
    coders = [
        f"{name}: NMSE {one['nmse']:.3f}, {one['unused']:.0f} latents unused" for name, one in result.coders.items()
    ]
    if coders:
        print(paragraph(f"trained on {next(iter(result.coders.values()))['tokens']:,.0f} tokens: {'; '.join(coders)}"))
    print(paragraph(verdict(result)))


def rows_of(result: "Bases") -> list[list[str]]:
    """The table: each set at the equal norm, the norms it needs, and its mean vector at equal effect."""
    from interventions.bases.result import TARGETS, title

    head = ["basis", "equal: P", *(f"{target:g} at" for target in TARGETS)]
    for target in TARGETS:
        head += [f"vector {target:g}: P", "KL", "others"]
    rows = [head]
    for row in result.rows:
        norms = ["never" if norm is None else f"{norm:.3g}" for norm in row.reached.values()]
        cells = [title(row), f"{row.equal:.3f}", *norms]
        for target in TARGETS:
            one = row.fixed.get(f"{target:g}")
            others = "none" if one is None or one.others is None else f"{one.others:.2f}"
            cells += ["never", "", ""] if one is None else [f"{one.p:.3f}", f"{one.kl:.3f}", others]
        rows.append(cells)
    return rows

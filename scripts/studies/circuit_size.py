"""Count the edges that sparse and dense models of about equal loss need for the tasks that both solve.

RUN names a finished run, whose sparse model is compared with its dense GPT-2. --sparse-runs and --dense-runs compare
models of sparse-bridges train-sparse pair by pair, the second trained with --sparsity.nonzero-fraction 1. Killed, it
goes on where it stopped: every measurement is kept below circuits/sizes. The figures go into metrics.json.

Examples:
    python scripts/studies/circuit_size.py runs/demo --seeds 0 1 2
    python scripts/studies/circuit_size.py --sparse-runs runs/sparse --dense-runs runs/all-weights --plot size.png
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from bridges.run_folder import update_metrics
from interventions.circuits.prune_config import PruneConfig
from interventions.circuits.size import (
    LABELS,
    Contest,
    Label,
    Measured,
    Measuring,
    Settings,
    contest_of_pretrained,
    contest_of_run,
)
from interventions.circuits.size_table import contest_summary, contest_table, overview, plot
from interventions.circuits.task_scores import SOLVED, score_tasks
from interventions.cli.options import report_errors
from interventions.tasks.catalogue import get_task
from sparse_model.config import require
from sparse_model.io.atomic import check_writable_file
from sparse_model.io.progress import progress_bar


@dataclass(frozen=True, kw_only=True)
class Options:
    """Count the edges that sparse and dense models of about equal loss need for the tasks that both solve."""

    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """Run folders."""
    sparse_runs: tuple[str, ...] = ()
    """Folders of sparse-bridges train-sparse, in place of RUNs."""
    dense_runs: tuple[str, ...] = ()
    """As many with a nonzero fraction of 1, in the same order."""
    tasks: tuple[str, ...] = ()
    """Tasks; unset: all that both models solve."""
    seeds: tuple[int, ...] = (0,)
    """Pruning seeds; they take the place of --seed."""
    levels: tuple[float, ...] = (0.05, 0.3, 0.5)
    """Further target losses, for the curve of loss against edges."""
    draws: int = 20
    """Random removals that necessity is compared with."""
    controls: bool = True
    """Also prune with redrawn weights, which takes as long again."""
    plot: str | None = None
    """Where the figure goes; unset: circuit_size.png in the first folder."""
    config: Annotated[PruneConfig, tyro.conf.arg(name="")] = field(default_factory=PruneConfig)


def contests(options: Options) -> list[Contest]:
    """The models to compare. Raises ValueError unless RUNs, or as many sparse as dense runs, are named."""
    if options.runs and not (options.sparse_runs or options.dense_runs):
        return [contest_of_run(run) for run in options.runs]
    pairs = list(zip(options.sparse_runs, options.dense_runs, strict=False))
    if options.runs or not pairs or len(options.sparse_runs) != len(options.dense_runs):
        raise ValueError("name RUN folders, or as many --sparse-runs as --dense-runs")
    return [contest_of_pretrained(*pair) for pair in pairs]


def solved(contest: Contest, wanted: tuple[str, ...]) -> tuple[list[str], dict[str, str]]:
    """The wanted tasks (or all) that both models solve, and why the others are left out."""
    models = {side.label: side.model for side in contest.sides}
    scores = score_tasks(models, contest.tokenizer, max_tokens=contest.n_ctx, pairs=128, seed=0, only=wanted)
    tasks, left_out = [], {}
    for name, of_task in scores.items():
        if isinstance(of_task, str):
            left_out[name] = of_task
        elif all(score.solved for score in of_task.values()):
            tasks.append(name)
        else:
            accuracy = ", ".join(f"{label} {score.pair_accuracy:.2f}" for label, score in of_task.items())
            left_out[name] = f"not solved by both (pair accuracy {accuracy}; {SOLVED:g} needed)"
    return tasks, left_out


def measure(contest: Contest, options: Options) -> dict:
    """The summary of a contest."""
    tasks, left_out = solved(contest, options.tasks)
    settings = Settings(options.levels, options.draws, options.controls)
    sizes: dict[str, dict[Label, list[Measured]]] = {name: {label: [] for label in LABELS} for name in tasks}
    with progress_bar(total=len(tasks) * len(options.seeds) * 2, desc=contest.name, unit="pruning") as bar:
        for seed in options.seeds:
            sides = [Measuring(contest, side, replace(options.config, seed=seed), settings) for side in contest.sides]
            for name in tasks:
                task = get_task(name, contest.tokenizer, max_tokens=contest.n_ctx)
                for measuring in sides:
                    bar.set_postfix_str(f"{name}, {measuring.side.label}")
                    sizes[name][measuring.side.label].append(measuring(task, progress=True))
                    bar.update()
    for name, by_label in list(sizes.items()):
        for label in LABELS:
            missed = [of_seed.whole_loss for of_seed in by_label[label] if not of_seed.sizes]
            if missed:
                left_out[name] = f"the whole {label} model has a task loss of {max(missed):.3f} on selection prompts"
                sizes.pop(name, None)
    return contest_summary(contest, sizes, options.config.target_loss, options.seeds, left_out)


def main(options: Options) -> None:
    if options.plot:
        check_writable_file(Path(options.plot))
    require(len(options.seeds) > 0, "seeds", options.seeds, "name at least one")
    require(options.draws > 0, "draws", options.draws, "must be at least 1")
    figures = {}
    for contest in contests(options):
        folder, summary = contest.sides[0].folder, measure(contest, options)
        figures[str(folder)] = summary
        update_metrics(folder, circuit_size=summary)
        print(f"{contest.name}\n{contest_table(summary)}\nkept in {folder / 'metrics.json'}\n")
    if len(figures) > 1:
        print(f"{overview(figures)}\n")
    path = Path(options.plot) if options.plot else Path(next(iter(figures))) / "circuit_size.png"
    print(f"drawn: {plot(list(figures.values()), path)}")


if __name__ == "__main__":
    with report_errors():
        main(tyro.cli(Options))

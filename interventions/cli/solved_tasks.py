"""Which of the twenty tasks the dense and the sparse model of each run solve: a Markdown table, and RUN/metrics.json.

A folder of sparse-bridges train-dense or train-sparse holds only one of them, which will do.

Example:
    sparse-bridges solved-tasks runs/demo
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from interventions.cli.options import parse
from sparse_model.config import require

if TYPE_CHECKING:
    from interventions.circuits.task_scores import TaskScore


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which of the twenty tasks the dense and the sparse model of each run solve."""

    runs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Run folders."""
    pairs: int = 128
    """Evaluation pairs of each task."""
    seed: int = 0
    """Seeds the pairs."""

    def __post_init__(self) -> None:
        require(len(self.runs) > 0, "runs", self.runs, "name at least one run folder")
        require(self.pairs >= 1, "pairs", self.pairs, "must be at least 1")


def command(arguments: list[str]) -> None:
    main(parse(Options, "solved-tasks", arguments, __doc__))


def main(options: Options) -> None:
    from tqdm.auto import tqdm

    from bridges.run_folder import update_metrics
    from interventions.circuits.task_scores import solved_tasks

    scores = {}
    for folder in tqdm(options.runs, unit="run", leave=False, disable=len(options.runs) == 1):
        outcomes = scores[folder] = solved_tasks(folder, pairs=options.pairs, seed=options.seed)
        update_metrics(
            Path(folder),
            tasks={
                name: {"unsupported": of} if isinstance(of, str) else {label: s._asdict() for label, s in of.items()}
                for name, of in outcomes.items()
            },
        )
    print(table(scores))


def table(scores: "dict[str, dict[str, dict[str, TaskScore] | str]]") -> str:
    """Pair accuracy and P(right) of the models of each run, by task; solved ones are bold."""
    from interventions.circuits.task_scores import SOLVED

    columns = [
        (folder, label)
        for folder, column in scores.items()
        for label in ("dense", "sparse")
        if any(not isinstance(of, str) and label in of for of in column.values())
    ]
    heads = ["task", *(f"{Path(folder).name} {label}: pairs, P(right)" for folder, label in columns)]
    lines, reasons = [heads, ["---"] * len(heads)], []
    for name in next(iter(scores.values())):
        column = [(scores[folder][name], label) for folder, label in columns]
        lines.append([name, *("-" if isinstance(of, str) else cell(of[label]) for of, label in column)])
        reasons += [f"{Path(run).name}: {of[name]}" for run, of in scores.items() if isinstance(of[name], str)]
    solved = [
        sum(of[label].solved for of in scores[folder].values() if not isinstance(of, str)) for folder, label in columns
    ]
    lines.append([f"solved: pairs at least {SOLVED:g}", *map(str, solved)])
    return "\n".join([f"| {' | '.join(line)} |" for line in lines] + [f"\nunsupported, {reason}" for reason in reasons])


def cell(score: "TaskScore") -> str:
    """Pair accuracy and P(right) of a model."""
    accuracy = f"{score.pair_accuracy:.2f}"
    return f"{f'**{accuracy}**' if score.solved else accuracy}, {score.p_right:.2f}"

"""What a run's models and count tables make of a task, of your own or one of the twenty: pairs, accuracy, P(right).

Each pair of a file is checked on the way. The count tables are of the run's training text: what they solve needs no
more than counting. Nothing is saved.

Examples:
    sparse-bridges check-task --run runs/demo --task ./my_task.jsonl
    sparse-bridges check-task --run runs/demo --task for_while --prompts natural
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from interventions.cli.options import PROMPTS_HELP, TASK_LIST, parse, say_next
from interventions.tasks.names import PromptKind, check_task_name
from sparse_model.config import require
from sparse_model.io.tables import paragraph

if TYPE_CHECKING:
    from interventions.tasks.base import Task
    from interventions.tasks.reports import TaskReport


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a run's models and count tables make of a task."""

    run: str = "runs/demo"
    """Folder of a training, or the name of a packaged bundle."""
    task: Annotated[str, tyro.conf.arg(help=f"Task to check, {TASK_LIST}.")]
    prompts: Annotated[PromptKind, tyro.conf.arg(help=PROMPTS_HELP)] = "generated"
    pairs: int = 128
    """Pairs of each split, or as many as there are."""
    seed: int = 0
    """Seeds the pairs."""
    device: str = "cpu"
    """Where the models run: cpu, cuda or cuda:N."""
    floors: bool = True
    """Count the n-grams of the training text, which is prepared where it is not kept from training."""

    def __post_init__(self) -> None:
        require(self.pairs >= 1, "pairs", self.pairs, "must be at least 1")


def command(arguments: list[str]) -> None:
    main(parse(Options, "check-task", arguments, __doc__))


def main(options: Options) -> None:
    from bridges.packaged import FOLDER, find_run
    from interventions.tasks.base import CannotPresent
    from interventions.tasks.reports import folder_tasks, models_in, report_tasks, training_tokens

    check_task_name(options.task)
    folder = Path(find_run(options.run))
    models = models_in(folder, options.device)
    (task,) = folder_tasks(folder, min(model.n_ctx for model in models.values()), [options.task], options.prompts)
    training = training_tokens(folder, progress=True) if options.floors else None
    report = report_tasks([task], models, training, pairs=options.pairs, seed=options.seed)[task.name]
    if isinstance(report, str):
        raise CannotPresent(report)
    describe(task, report)
    solved = solved_by(report)
    verdict = f"solved by the {' and the '.join(solved)} model" if solved else "no model solves it: raise --steps"
    print(verdict)
    if len(solved) == 2 and not folder.is_relative_to(FOLDER):
        found = ("--run", options.run, "--task", options.task, "--prompts", options.prompts)
        say_next("find-channel", *found, device=options.device)


def describe(task: "Task", report: "TaskReport") -> None:
    """Print the pairs, the floors of every split, and the evaluation pairs by distance."""
    from interventions.tasks.files import FileTask
    from interventions.tasks.reports import distance_table

    print(paragraph(f"{task.name}: {task.description}"))
    print(paragraph("prompts: " + ", ".join(f"{name} {value}" for name, value in report.record.items())))
    if isinstance(task, FileTask) and task.by_first_token:
        print(f"{task.by_first_token} answers are several tokens long and count by their first one")
    for split, count in report.available.items():
        floors = ", ".join(f"{name} {p:.2f}" for name, p in report.floors[split].items())
        pairs = "as many pairs as wanted" if count is None else f"{count} pairs"
        print(f"{split:10} {pairs}" + (f"; pair accuracy of counting: {floors}" if floors else ""))
    print("\nevaluation pairs by the tokens from the last that differs to the answer\n")
    print(distance_table(report))
    legend = "pair accuracy (both members right; near 1 is good) and P(right answer)"
    print("\n" + paragraph(legend + ("; counting has no P." if report.needs_more_than_counting is not None else ".")))
    if report.needs_more_than_counting is not None:
        more = "needs more than" if report.needs_more_than_counting else "needs no more than"
        print(f"\nthis task {more} counting trigrams")


def solved_by(report: "TaskReport") -> list[str]:
    """The models that solve a task."""
    from interventions.circuits.task_scores import solves

    models = [label for label in ("dense", "sparse") if label in report.scores]
    return [label for label in models if solves(report.scores[label]["all"].accuracy)]

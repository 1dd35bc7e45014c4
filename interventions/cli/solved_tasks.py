"""Which of the twenty tasks the dense and the sparse model of each run solve: a Markdown table, and RUN/metrics.json.

A folder of sparse-bridges train-dense or train-sparse holds only one of them, which will do. Beside the models stands
what count tables of the training text score on the same pairs.

Examples:
    sparse-bridges solved-tasks runs/demo
    sparse-bridges solved-tasks runs/demo --prompts natural
    sparse-bridges solved-tasks runs/demo --task ./my_task.jsonl --task for_while
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from interventions.cli.options import PROMPTS_HELP, TASK_LIST, parse, writing_into
from interventions.tasks.names import PromptKind, check_task_name
from sparse_model.config import require

if TYPE_CHECKING:
    from interventions.circuits.task_scores import TaskScore
    from interventions.tasks.reports import TaskReport

    TaskScores = dict[str, dict[str, TaskScore] | str]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which of the twenty tasks the dense and the sparse model of each run solve."""

    runs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Run folders."""
    tasks: Annotated[
        tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(name="task", help=f"Only this, {TASK_LIST}.")
    ] = ()
    prompts: Annotated[PromptKind, tyro.conf.arg(help=PROMPTS_HELP)] = "generated"
    pairs: int = 128
    """Evaluation pairs of each task, or as many as it has."""
    seed: int = 0
    """Seeds the pairs."""
    device: str = "cpu"
    """Where the models run: cpu, cuda or cuda:N."""
    floors: bool = True
    """Count the n-grams of the training text, which is prepared where it is not kept from training."""

    def __post_init__(self) -> None:
        require(len(self.runs) > 0, "runs", self.runs, "name at least one run folder")
        require(self.pairs >= 1, "pairs", self.pairs, "must be at least 1")


def command(arguments: list[str]) -> None:
    main(parse(Options, "solved-tasks", arguments, __doc__))


def main(options: Options) -> None:
    from interventions.circuits.circuit import failed_circuits
    from sparse_model.io.progress import progress_bar

    for name in options.tasks:
        check_task_name(name)
    scores, reports = {}, {}
    for folder in progress_bar(options.runs, unit="run", leave=False, disable=len(options.runs) == 1):
        with writing_into(folder):
            scores[folder], reports[folder] = measure(Path(folder), options)
    print(table(scores, reports))
    if options.prompts == "natural":
        print(distances(reports))
    for folder in options.runs:
        for name, reason in failed_circuits(Path(folder)).items():
            print(f"{Path(folder).name}, {name}: {reason}")


def measure(folder: Path, options: Options) -> "tuple[TaskScores, dict[str, TaskReport | str]]":
    """The scores and the reports of a folder's models, kept in its metrics.json."""
    from bridges.run_folder import update_metrics
    from interventions.circuits.task_scores import solved_tasks
    from interventions.tasks.reports import folder_tasks, models_in, report_tasks, training_tokens

    models = models_in(folder, options.device)
    tasks = folder_tasks(folder, min(model.n_ctx for model in models.values()), options.tasks, options.prompts)
    scores = solved_tasks(folder, pairs=options.pairs, seed=options.seed, tasks=tasks, device=options.device)
    training = training_tokens(folder, progress=True) if options.floors else None
    shown = models if options.prompts == "natural" else {}
    reports = report_tasks(tasks, shown, training, pairs=options.pairs, seed=options.seed)
    kept = {name: entry(of, reports[name]) for name, of in scores.items()}
    update_metrics(folder, merge=True, tasks=kept)
    return scores, reports


def entry(scores: "dict[str, TaskScore] | str", report: "TaskReport | str") -> dict[str, Any]:
    """What metrics.json keeps of a task."""
    if isinstance(scores, str) or isinstance(report, str):
        return {"unsupported": scores if isinstance(scores, str) else report}
    return {label: score._asdict() for label, score in scores.items()} | report.as_json()


def table(scores: "dict[str, TaskScores]", reports: "dict[str, dict[str, TaskReport | str]]") -> str:
    """Pair accuracy and P(right) of the models of each run, by task, beside the floors; solved ones are bold."""
    from interventions.circuits.task_scores import SOLVED

    columns = [
        (folder, label)
        for folder, column in scores.items()
        for label in ("dense", "sparse")
        if any(not isinstance(of, str) and label in of for of in column.values())
    ]
    counted = [folder for folder in scores if any(floor(report) for report in reports[folder].values())]
    heads = ["task", *(f"{Path(folder).name} {label}: pairs, P(right)" for folder, label in columns)]
    heads += [f"{Path(folder).name} counting: 2-, 3-, 5-gram" for folder in counted]
    lines, reasons = [heads, ["---"] * len(heads)], []
    for name in next(iter(scores.values())):
        column = [(scores[folder][name], label) for folder, label in columns]
        cells = ["-" if isinstance(of, str) else cell(of[label]) for of, label in column]
        lines.append([name, *cells, *(floor(reports[folder][name]) or "-" for folder in counted)])
        reasons += [f"{Path(run).name}: {of[name]}" for run, of in scores.items() if isinstance(of[name], str)]
    solved = [
        sum(of[label].solved for of in scores[folder].values() if not isinstance(of, str)) for folder, label in columns
    ]
    lines.append([f"solved: pairs at least {SOLVED:g}", *map(str, solved), *("" for _ in counted)])
    return "\n".join([f"| {' | '.join(line)} |" for line in lines] + [f"\nunsupported, {reason}" for reason in reasons])


def floor(report: "TaskReport | str") -> str:
    """Pair accuracy of the count tables on the evaluation pairs; empty where nothing was counted."""
    return "" if isinstance(report, str) else ", ".join(f"{p:.2f}" for p in report.floors["evaluation"].values())


def distances(reports: "dict[str, dict[str, TaskReport | str]]") -> str:
    """A table for each run and task by the distance from the deciding token to the answer."""
    from interventions.tasks.reports import distance_table

    tables = [
        f"\n{Path(folder).name}, {name}\n\n{distance_table(report)}"
        for folder, by_task in reports.items()
        for name, report in by_task.items()
        if not isinstance(report, str)
    ]
    return "\n".join(tables)


def cell(score: "TaskScore") -> str:
    """Pair accuracy and P(right) of a model."""
    accuracy = f"{score.pair_accuracy:.2f}"
    return f"{f'**{accuracy}**' if score.solved else accuracy}, {score.p_right:.2f}"

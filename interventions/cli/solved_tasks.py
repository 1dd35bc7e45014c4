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

from interventions.cli.options import PROMPTS_HELP, TASK_LIST, parse, say_next, writing_into
from interventions.tasks.names import PromptKind, check_task_name
from sparse_model.config import require
from sparse_model.io.tables import paragraph

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
            print(paragraph(f"{Path(folder).name}, {name}: {reason}"))
    say_next_steps(options, scores[options.runs[0]])


def say_next_steps(options: Options, scores: "TaskScores") -> None:
    """Print what to do with a solved task; where there is none, that training comes first."""
    run, files = options.runs[0], {Path(name).stem: name for name in options.tasks}
    solved = [name for name, of in scores.items() if not isinstance(of, str) and all(s.solved for s in of.values())]
    if not solved:
        print("no task is solved by all models: train longer, more --steps, before a channel is looked for")
    elif (Path(run) / "bridges").is_dir():
        task = files.get(solved[0], solved[0])
        say_next("find-channel", "--run", run, "--task", task, device=options.device)


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
    """A Markdown table for each run: pair accuracy and P(right) of its models by task, beside the floors."""
    from interventions.circuits.task_scores import SOLVED

    legend = paragraph(
        "pairs: share of pairs both of whose prompts get the right answer, bold where the task counts as solved "
        f"({SOLVED:g}). P: mean P(right answer). n-gram: pairs that counting the training text gets right; near "
        "that of a model, the task needs no more than counting."
    )
    return "\n\n".join([*(_run_table(run, by_task, reports[run]) for run, by_task in scores.items()), legend])


def _run_table(run: str, scores: "TaskScores", reports: "dict[str, TaskReport | str]") -> str:
    labels = [m for m in ("dense", "sparse") if any(not isinstance(of, str) and m in of for of in scores.values())]
    counted = any(floors(report) for report in reports.values())
    heads = ["task", *(head for label in labels for head in (f"{label} pairs", "P"))]
    rows = [heads + (["2-gram", "3-gram", "5-gram"] if counted else [])]
    for name, of in scores.items():
        cells = ["-", "-"] * len(labels) if isinstance(of, str) else [c for label in labels for c in cell(of[label])]
        rows.append([name, *cells, *((floors(reports[name]) or ["-"] * 3) if counted else ())])
    scored = [of for of in scores.values() if not isinstance(of, str)]
    solved = [f"{sum(of[label].solved for of in scored)} of {len(scored)} by the {label} model" for label in labels]
    unsupported = [paragraph(f"unsupported, {name}: {of}") for name, of in scores.items() if isinstance(of, str)]
    parts = [f"{Path(run).name}: solved {', '.join(solved)}", markdown(rows), "\n".join(unsupported)]
    return "\n\n".join(part for part in parts if part)


def markdown(rows: list[list[str]]) -> str:
    """A Markdown table whose columns stand below each other as plain text, too."""
    widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(rows[0]))]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "\n".join(f"| {' | '.join(c.ljust(w) for c, w in zip(row, widths, strict=True))} |" for row in rows)


def floors(report: "TaskReport | str") -> list[str]:
    """Pair accuracy of the count tables on the evaluation pairs; empty where nothing was counted."""
    return [] if isinstance(report, str) else [f"{p:.2f}" for p in report.floors["evaluation"].values()]


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


def cell(score: "TaskScore") -> tuple[str, str]:
    """Pair accuracy and P(right) of a model."""
    accuracy = f"{score.pair_accuracy:.2f}"
    return f"**{accuracy}**" if score.solved else accuracy, f"{score.p_right:.2f}"

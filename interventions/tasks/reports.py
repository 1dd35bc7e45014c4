"""What models and count tables make of tasks: by split, and by the distance from the deciding token to the answer."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import Int
from torch import Tensor

from bridges.bundle_format import load_dense_part
from bridges.dense import DenseModel
from interventions.tasks.base import PROMPT_SPLITS, CannotPresent, PromptSplit, Task, TaskBatch
from interventions.tasks.catalogue import TaskName, list_tasks
from interventions.tasks.floors import ORDERS, ngrams_right
from interventions.tasks.names import PromptKind
from interventions.tasks.of_run import task_for, training_text
from interventions.tasks.scores import Logits, Scores, by_distance, score
from sparse_model.data.corpus import load_blocks
from sparse_model.data.tokenizer import load_tokenizer
from sparse_model.model.checkpoint import load_sparse
from sparse_model.model.device import check_device

TABLE_NAMES = {2: "bigram", 3: "trigram", 5: "5-gram"}
SOLVED_BY_COUNTING = 0.98
"""Pair accuracy of a trigram table from which a task needs no more than counting."""


class TaskReport(NamedTuple):
    """A task, and how models and count tables do on it."""

    record: dict[str, Any]
    """Where the prompts come from."""
    available: dict[PromptSplit, int | None]
    """Pairs that there are, by split; None for templates, which do not run out."""
    floors: dict[PromptSplit, dict[str, float]]
    """Pair accuracy of the count tables of the training text, by split; empty where that is not known."""
    scores: dict[str, dict[str, Scores]]
    """On the evaluation pairs, of each model and count table: "all", then by distance."""

    @property
    def needs_more_than_counting(self) -> bool | None:
        """Whether a trigram table does not do; None where nothing was counted."""
        floor = self.floors.get("evaluation", {}).get("trigram")
        return None if floor is None else floor < SOLVED_BY_COUNTING

    def as_json(self) -> dict[str, Any]:
        """The report as it stands in metrics.json."""
        scores = {label: {far: s._asdict() for far, s in by.items()} for label, by in self.scores.items()}
        return {"prompts": self.record, "available": self.available, "floors": self.floors, "by_distance": scores}


def report_tasks(
    tasks: Iterable[Task],
    models: Mapping[str, Logits],
    training: Int[Tensor, "..."] | None,
    *,
    pairs: int = 128,
    seed: int = 0,
) -> dict[str, TaskReport | str]:
    """A report of every task, by name; the reason where it cannot be presented.

    models: what gives the logits of every position, by name. training: the text whose n-grams are counted.
    pairs: of each split, or all that there are.
    """
    reports: dict[str, TaskReport | str] = {}
    batches: dict[tuple[str, PromptSplit], TaskBatch] = {}
    for task in tasks:
        try:
            drawn = {split: task.sample_up_to(pairs, split=split, seed=seed) for split in PROMPT_SPLITS}
        except CannotPresent as error:
            reports[task.name] = str(error)
            continue
        batches |= {(task.name, split): batch for split, batch in drawn.items()}
        available = {split: task.available(split) for split in PROMPT_SPLITS}
        scores = {label: score(logits, drawn["evaluation"]) for label, logits in models.items()}
        reports[task.name] = TaskReport(task.record, available, {split: {} for split in PROMPT_SPLITS}, scores)
    counted = ngrams_right(training, batches) if training is not None and batches else {}
    for (name, split), right in counted.items():
        report = reports[name]
        assert isinstance(report, TaskReport)
        for n in ORDERS:
            report.floors[split][TABLE_NAMES[n]] = float(right[n].float().mean())
            if split == "evaluation":
                report.scores[TABLE_NAMES[n]] = by_distance(batches[name, split], right[n])
    return reports


def models_in(folder: Path, device: str = "cpu") -> dict[str, DenseModel | Any]:
    """The dense and the sparse model of a training's folder, or the one that it has, on a device.

    Raises FileNotFoundError for a folder with neither.
    """
    models: dict[str, Any] = {}
    where = check_device(device)
    if (folder / "dense").is_dir():
        models["dense"] = DenseModel(load_dense_part(folder))
    if (folder / "sparse").is_dir():
        models["sparse"] = load_sparse(folder / "sparse").eval()
    if not models:
        raise FileNotFoundError(f"{folder} has neither dense/ nor sparse/: name the folder of a finished training")
    return {label: model.to(where) for label, model in models.items()}


def folder_tasks(
    folder: Path, max_tokens: int, names: Sequence[TaskName] = (), prompts: PromptKind = "generated"
) -> list[Task]:
    """Tasks for the models in a training's folder: the named ones, or all that have such prompts.

    Raises what `task_for` raises.
    """
    tokenizer, text = load_tokenizer(folder / "tokenizer"), training_text(folder)
    return [
        task_for(name, tokenizer, text and text.corpus, max_tokens=max_tokens, prompts=prompts)
        for name in names or list_tasks(prompts)
    ]


def training_tokens(folder: Path, *, progress: bool = False) -> Int[Tensor, "block pos"] | None:
    """What the models in a folder were trained on; None where no config.json says. Raises what `load_blocks` raises."""
    text = training_text(folder)
    if text is None:
        return None
    return load_blocks(text.corpus, load_tokenizer(folder / "tokenizer"), text.n_ctx, progress=progress).train


def distance_table(report: TaskReport) -> str:
    """The evaluation pairs as a Markdown table: by distance, each model's accuracy and P(right), and the floors."""
    every = next(iter(report.scores.values()), {})
    lines = [["distance", "pairs", *report.scores], ["---"] * (2 + len(report.scores))]
    for far, first in every.items():
        lines.append([far, str(first.pairs), *(_cell(by[far]) for by in report.scores.values())])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(scores: Scores) -> str:
    return f"{scores.accuracy:.2f}" + ("" if scores.p_right is None else f", {scores.p_right:.2f}")

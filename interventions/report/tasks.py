"""The report's twenty tasks: which the run's models solve, and how many edges their circuits have."""

import statistics
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, get_args

from interventions.circuits.node_model import ModelKind
from interventions.circuits.task_scores import TaskScore
from interventions.tasks.catalogue import TASKS
from interventions.tasks.names import NATURAL
from interventions.tasks.of_run import change_of
from interventions.tasks.record import DistanceFigures
from interventions.tasks.reports import SOLVED_BY_COUNTING, TABLE_NAMES

FAR = 0.05
"""Difference of two models' losses, nats, from which the sizes of their circuits do not compare."""


class TaskRow(NamedTuple):
    """A task in both models."""

    name: str
    description: str
    scores: dict[str, TaskScore]
    """By model; empty where the task was not measured."""
    edges: dict[str, float]
    """By model, median over pruning seeds; empty where no circuits were cut out."""
    why: str
    """Why one of them is empty, and which circuit failed."""
    floors: list[float]
    """Pair accuracy of the bigram, trigram and 5-gram tables of the training text; empty where nothing was counted."""

    @property
    def counted(self) -> bool:
        """Whether counting trigrams is enough."""
        return bool(self.floors) and self.floors[1] >= SOLVED_BY_COUNTING

    @property
    def ratio(self) -> float | None:
        """Dense over sparse edges; a circuit without edges counts as one with one."""
        return max(1.0, self.edges["dense"]) / max(1.0, self.edges["sparse"]) if self.edges else None


def task_rows(metrics: dict[str, Any], failed: Mapping[str, str] = MappingProxyType({})) -> list[TaskRow]:
    """What solved-tasks and scripts/studies/circuit_size.py found, in the paper's order, then other tasks.

    `failed` are circuits that failed, in words by task (see `failed_circuits`).
    """
    scored, sizes = metrics.get("tasks", {}), metrics.get("circuit_size", {})
    measured, left_out = sizes.get("tasks", {}), sizes.get("left_out", {})
    rows = []
    for name in dict.fromkeys([*TASKS, *scored]):
        scores_of = scored.get(name, {})
        scores = {label: TaskScore(**scores_of[label]) for label in get_args(ModelKind)[::-1] if label in scores_of}
        edges = {
            label: float(statistics.median(one["edges"] for one in seeds))
            for label, seeds in measured.get(name, {}).items()
        }
        if scores or edges or scores_of or name in left_out:
            why = _why(name, scores_of, left_out, failed)
            floors = list(scores_of.get("floors", {}).get("evaluation", {}).values())
            rows.append(TaskRow(name, _description(name, scores_of), scores, edges, why, floors))
    return rows


class DistanceRow(NamedTuple):
    """A task's pairs whose deciding token stands some tokens before the answer."""

    task: str
    distance: str
    pairs: int
    models: list[DistanceFigures | None]
    """Dense and sparse."""
    floors: list[float | None]
    """Pair accuracy of the count tables; None where nothing was counted."""


def distance_rows(metrics: dict[str, Any]) -> list[DistanceRow]:
    """What solved-tasks found on natural prompts, by distance."""
    rows = []
    for task, scored in metrics.get("tasks", {}).items():
        by: dict[str, dict[str, DistanceFigures]] = scored.get("by_distance", {})
        measured = next((by[label] for label in get_args(ModelKind) if label in by), {})
        for distance, first in measured.items():
            if distance != "all":  # which the table above has
                models = [by.get(label, {}).get(distance) for label in get_args(ModelKind)[::-1]]
                counted = [by.get(table, {}).get(distance) for table in TABLE_NAMES.values()]
                floors = [figures and figures["accuracy"] for figures in counted]
                rows.append(DistanceRow(task, distance, first["pairs"], models, floors))
    return rows


def _why(name: str, scored: Mapping[str, Any], left_out: Mapping[str, str], failed: Mapping[str, str]) -> str:
    dense = failed.get(f"{name}-dense", "")
    reasons = (
        scored.get("unsupported") or left_out.get(name, ""),
        failed.get(name, ""),
        f"dense model: {dense}" if dense else "",
    )
    return "; ".join(reason for reason in reasons if reason)


def _description(name: str, found: dict[str, Any]) -> str:
    """A task's sentence; of one from a file, where it stands."""
    spec = TASKS.get(name.removesuffix(NATURAL))
    return spec.description if spec else f"The pairs of {found.get('prompts', {}).get('file', 'a file')}."


def counting_words(metrics: dict[str, Any]) -> dict[str, str]:
    """By task, a sentence that says whether it needs more than counting; of those where n-grams were counted."""
    sentences = {}
    for row in task_rows(metrics):
        if row.floors:
            shares = ", ".join(f"{floor:.0%}" for floor in row.floors)
            more = "no more" if row.counted else "more"
            sentences[row.name] = (
                f"Bigram, trigram and 5-gram tables of the training text get {shares} of its pairs right: "
                f"this task needs {more} than counting."
            )
    return sentences


def changed_files(records: Iterable[tuple[str, dict[str, Any]]]) -> list[str]:
    """A sentence for every task whose file is not the one that results were made with, once."""
    changes = ((task, change_of(record)) for task, record in records)
    return list(dict.fromkeys(f"Task {task}: {change}." for task, change in changes if change))


def size_ratio(metrics: dict[str, Any]) -> float | None:
    """Dense over sparse edges, geometric means over tasks that need some in both models, median over pruning seeds."""
    ratio = metrics.get("circuit_size", {}).get("with_edges", {}).get("ratio")
    return statistics.median(ratio) if ratio else None


def size_warnings(metrics: dict[str, Any]) -> list[str]:
    """What a reader of the circuits' sizes should know."""
    ce = metrics.get("circuit_size", {}).get("ce")
    if not ce or abs(ce["sparse"] - ce["dense"]) <= FAR:
        return []
    return [
        f"The sizes of circuits compare a sparse model of {ce['sparse']:.3f} nats with a dense one of "
        f"{ce['dense']:.3f}: at unequal loss the ratio says little. "
        "Compare models of about equal loss, with --sparse-runs and --dense-runs."
    ]

"""The report's twenty tasks: which the run's models solve, and how many edges their circuits have."""

import statistics
from typing import Any, NamedTuple

from interventions.circuits.task_scores import TaskScore
from interventions.tasks.catalogue import TASKS

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
    """Why one of them is empty."""

    @property
    def ratio(self) -> float | None:
        """Dense over sparse edges; a circuit without edges counts as one with one."""
        return max(1.0, self.edges["dense"]) / max(1.0, self.edges["sparse"]) if self.edges else None


def task_rows(metrics: dict[str, Any]) -> list[TaskRow]:
    """What solved-tasks and scripts/studies/circuit_size.py found, in the paper's order; none without either."""
    scored, sizes = metrics.get("tasks", {}), metrics.get("circuit_size", {})
    measured, left_out = sizes.get("tasks", {}), sizes.get("left_out", {})
    rows = []
    for name, spec in TASKS.items():
        scores_of = scored.get(name, {})
        scores = {} if "unsupported" in scores_of else {label: TaskScore(**score) for label, score in scores_of.items()}
        edges = {
            label: float(statistics.median(one["edges"] for one in seeds))
            for label, seeds in measured.get(name, {}).items()
        }
        if scores or edges or scores_of or name in left_out:
            rows.append(
                TaskRow(name, spec.description, scores, edges, scores_of.get("unsupported") or left_out.get(name, ""))
            )
    return rows


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
        f"{ce['dense']:.3f}: at unequal loss the ratio says little."
    ]

"""metrics.json as the report reads it: checked as a whole, so that no table meets a wrong type."""

from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict

from bridges.evaluation import SiteReport
from bridges.run_folder import read_metrics
from interventions.circuits.task_scores import TaskScore
from interventions.tasks.record import PromptRecord, TaskFigures
from sparse_model.io.commands import command_line
from sparse_model.io.reading import typed

_MORE = {"extra": "allow"}


class _Tokens(TypedDict):
    __pydantic_config__ = _MORE  # type: ignore[misc]

    tokens: int


class _Corpus(TypedDict):
    __pydantic_config__ = _MORE  # type: ignore[misc]

    splits: dict[str, _Tokens]
    notes: list[str]


class _Training(TypedDict):
    __pydantic_config__ = _MORE  # type: ignore[misc]

    dense_seconds: float
    joint_seconds: float
    processes: int
    device: str
    threads: int
    corpus: _Corpus


class _Loss(TypedDict):
    ce: float


class _Matrix(TypedDict):
    nonzeros: int
    fraction: float


class _Sparse(TypedDict):
    __pydantic_config__ = _MORE  # type: ignore[misc]

    ce: float
    nonzeros: int
    nonzero_fraction: float
    matrices: dict[str, _Matrix]
    activation_l0: dict[str, float]
    dead_channels: dict[str, int]


class _Paths(TypedDict):
    n: int
    kl: float


class _Baseline(TypedDict):
    __pydantic_config__ = _MORE  # type: ignore[misc]

    pair_accuracy: float
    p_right: NotRequired[float]
    p_wrong: NotRequired[float]


class _Scored(TaskFigures, total=False):
    dense: TaskScore
    sparse: TaskScore


class _Losses(TypedDict):
    dense: float
    sparse: float


class _Ratio(TypedDict, total=False):
    __pydantic_config__ = _MORE  # type: ignore[misc]

    ratio: list[float] | None


class _Circuit(TypedDict):
    __pydantic_config__ = _MORE  # type: ignore[misc]

    edges: float


class _Sizes(TypedDict):
    __pydantic_config__ = _MORE  # type: ignore[misc]

    target_loss: float
    ce: _Losses
    with_edges: NotRequired[_Ratio]
    tasks: NotRequired[dict[str, dict[str, list[_Circuit]]]]
    left_out: NotRequired[dict[str, str]]


class Metrics(TypedDict, total=False):
    """The parts of metrics.json; each command adds its own. Steering and bases are checked where they are read."""

    __pydantic_config__ = _MORE  # type: ignore[misc]

    training: _Training | None
    held_out_tokens: int
    dense: _Loss
    sparse: _Sparse
    sites: list[SiteReport] | None
    paths: _Paths | None
    dense_task: dict[str, _Baseline]
    steering: dict[str, Any]
    bases: dict[str, Any]
    tasks: dict[str, _Scored]
    task_prompts: dict[str, PromptRecord]
    circuit_size: _Sizes | None


def checked_metrics(folder: Path, n_sites: int) -> dict[str, Any]:
    """metrics.json of a run, without parts that are null. ValueError for another type or run, naming the key."""
    path, remedy = folder / "metrics.json", f"remove it and run {command_line('evaluate', '--run', folder)}"
    metrics = read_metrics(folder)
    sites = typed(Metrics, metrics, path, remedy).get("sites")
    if sites is not None and [site.site for site in sites] != list(range(n_sites)):
        raise ValueError(f"{path} is not of this run (it has not its {n_sites} sites): {remedy}")
    if sites is not None and not {"dense", "sparse"} <= metrics.keys():
        raise ValueError(f"{path} has sites, but not the losses of both models: {remedy}")
    return {name: part for name, part in metrics.items() if part is not None}

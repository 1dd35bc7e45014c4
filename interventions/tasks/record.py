"""Where a result's prompts came from, as its file keeps it (`Task.record`)."""

from typing import Any

from typing_extensions import TypedDict


class PromptRecord(TypedDict, total=False):
    """The keys that are read; others are kept."""

    __pydantic_config__ = {"extra": "allow"}  # type: ignore[misc]  # noqa: RUF012

    prompts: str
    file: str
    sha256: str


def task_option(task: str, record: Any) -> str:
    """What --task takes to get a result's task again: the file of one's own pairs, otherwise its name."""
    file = record.get("file") if isinstance(record, dict) and record.get("prompts") == "file" else None
    return file if isinstance(file, str) else task


class DistanceFigures(TypedDict):
    """Scores on the pairs of a range of distances; a count table has no probability."""

    pairs: int
    accuracy: float
    p_right: float | None


class TaskFigures(TypedDict, total=False):
    """An entry of `tasks` in metrics.json, as solved-tasks writes it: as far as it is read anywhere."""

    __pydantic_config__ = {"extra": "allow"}  # type: ignore[misc]  # noqa: RUF012

    unsupported: str
    prompts: PromptRecord
    floors: dict[str, dict[str, float]]
    """By split, then by table."""
    by_distance: dict[str, dict[str, DistanceFigures]]
    """By model or count table, then by distance; of the models only where the prompts are natural."""

"""The report's comparison of bases: a table at equal norm and at equal effect, and two figures."""

from pathlib import Path
from typing import Any, NamedTuple

from interventions.bases.result import TARGETS, Bases, Effects, Row, effect_chart, kl_chart, title, verdict
from interventions.charts import Chart


class BasisRow(NamedTuple):
    """A line of the table; None where a target is never reached."""

    name: str
    equal: float
    reached: list[float | None]
    """The norm of each target."""
    fixed: list[Effects | None]
    """The mean vector at each target."""


class BasesPage(NamedTuple):
    """One task's comparison."""

    result: Bases
    words: str
    charts: list[Chart]
    rows: list[BasisRow]


def bases_pages(folder: Path, metrics: dict[str, Any]) -> list[BasesPage]:
    """A panel for each task in metrics.json. ValueError for a comparison that does not read."""
    pages = []
    for number, task in enumerate(metrics.get("bases", {}), 1):
        result = Bases.from_metrics(metrics, task, folder)
        charts = [effect_chart(result, f"bases-{number}"), kl_chart(result, f"bases-kl-{number}")]
        pages.append(BasesPage(result, verdict(result), charts, [_row(row) for row in result.rows]))
    return pages


def _row(row: Row) -> BasisRow:
    return BasisRow(title(row), row.equal, list(row.reached.values()), [row.fixed.get(f"{t:g}") for t in TARGETS])

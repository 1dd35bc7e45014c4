"""Curves as plain numbers, prepared once: the report's script draws them, and matplotlib for a notebook or a PNG.

The report draws with uPlot 1.6.32 (MIT; report/static/charts.js): 51 KB of script, where Plotly's smallest bundle has
1.2 MB. It has zoom, hover, toggles, log scales and bands, and neither innerHTML nor eval, so that it works under the
strictest policy.
"""

import math
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

from matplotlib.axes import Axes

from interventions.figures import DEPTH, GREY

BLUE, ORANGE, INK = "#3d7cc9", "#cf7a24", "ink"
"""`ink` is the colour of the text around a figure."""
Style = Literal["line", "dash", "dots", "steps"]


_LINES: dict[Style, dict[str, Any]] = {
    "line": {},
    "dash": {"ls": "--"},
    "dots": {"marker": "o", "ms": 3},
    "steps": {"drawstyle": "steps-post"},
}


class Series(NamedTuple):
    """One curve. None leaves a gap."""

    name: str
    values: list[float | None]
    colour: str
    style: Style = "line"
    low: list[float | None] = []  # noqa: RUF012
    """Lower end of an interval around the values; none where empty."""
    high: list[float | None] = []  # noqa: RUF012


class Band(NamedTuple):
    """The area between two curves."""

    name: str
    low: list[float | None]
    high: list[float | None]
    colour: str


class Chart(NamedTuple):
    """A figure of curves over one axis."""

    id: str
    """Unique in the page."""
    title: str
    caption: str
    x: list[float | None]
    x_title: str
    y_title: str
    series: list[Series]
    bands: list[Band] = []  # noqa: RUF012
    scale: Literal["linear", "log"] = "linear"
    both_scales: bool = False
    """Whether the page offers the other scale."""
    x_labels: list[str] | None = None
    """Words instead of numbers below the axis, one for each whole number."""
    y_range: tuple[float, float] | None = None
    group: str = ""
    """Charts of one group share their cursor and their zoom."""

    def plain(self) -> dict[str, Any]:
        """As JSON takes it."""
        return self._asdict() | {
            "series": [series._asdict() for series in self.series],
            "bands": [band._asdict() for band in self.bands],
        }


def finite(value: int | float | None, digits: int = 4) -> float | None:
    """A number of so many significant digits; None for what is no number, which JSON has no word for."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.{digits}g}")


def numbers(values: Iterable[int | float | None], digits: int = 4) -> list[float | None]:
    """`finite` of each."""
    return [finite(value, digits) for value in values]


def depth_colour(index: int, count: int) -> str:
    """The colour of one of `count` things in order; legible on white and on black."""
    red, green, blue, _ = DEPTH(index / max(1, count - 1))
    return f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"


def draw_chart(axes: Axes, chart: Chart) -> None:
    """A chart's bands and curves on matplotlib axes."""
    for band in chart.bands:
        ends = (_floats(band.low), _floats(band.high))
        axes.fill_between(_floats(chart.x), *ends, color=band.colour, alpha=0.3, lw=0, label=band.name)
    for series in chart.series:
        colour = "black" if series.colour == INK else series.colour
        axes.plot(_floats(chart.x), _floats(series.values), color=colour, label=series.name, **_LINES[series.style])
        if series.low:
            ends = (_floats(series.low), _floats(series.high))
            axes.fill_between(_floats(chart.x), *ends, color=colour, alpha=0.15, lw=0)
    axes.set(xlabel=chart.x_title, ylabel=chart.y_title)


def _floats(values: list[float | None]) -> list[float]:
    """None, a gap, is NaN for matplotlib."""
    return [float("nan") if value is None else value for value in values]


__all__ = [
    "BLUE",
    "GREY",
    "INK",
    "ORANGE",
    "Band",
    "Chart",
    "Series",
    "Style",
    "depth_colour",
    "draw_chart",
    "finite",
    "numbers",
]

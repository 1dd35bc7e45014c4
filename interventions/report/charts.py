"""Curves as plain numbers, for the page's script to draw (static/charts.js, with uPlot).

uPlot 1.6.32 (MIT) is the plotting library: 51 KB of script, where Plotly's smallest bundle has 1.2 MB. It has zoom,
hover, toggles, log scales and bands, and neither innerHTML nor eval, so that it works under the strictest policy.
"""

import math
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

from interventions.figures import DEPTH, GREY

BLUE, ORANGE, INK = "#3d7cc9", "#cf7a24", "ink"
"""`ink` is the page's text colour."""
Style = Literal["line", "dash", "dots", "steps"]


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


def depth_colour(at: int, count: int) -> str:
    """The colour of one of `count` things in order; legible on white and on black."""
    red, green, blue, _ = DEPTH(at / max(1, count - 1))
    return f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"


__all__ = ["BLUE", "GREY", "INK", "ORANGE", "Band", "Chart", "Series", "depth_colour", "finite", "numbers"]

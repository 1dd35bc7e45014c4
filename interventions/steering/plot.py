"""Strength curves of a steering experiment: their numbers, prepared once, and the figure in matplotlib.

The report's script draws the same chart. matplotlib needs no display.
"""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from interventions.charts import GREY, INK, Band, Chart, Series, Style, depth_colour, numbers
from interventions.steering.result import DRAWN, Steering, named_curves, set_name

_COLOURS = {"random_channels": GREY, "shuffled": "#9a7f4f", "untrained": "#7d6f9a"}
_INK = "black"  # of matplotlib's figures
_LINES: dict[Style, dict[str, Any]] = {
    "line": {},
    "dash": {"ls": "--"},
    "dots": {"marker": "o", "ms": 3},
    "steps": {"drawstyle": "steps-post"},
}


def strength_chart(result: Steering, chart_id: str = "steering") -> Chart:
    """One task's strength curves with their controls, as a report, a notebook and a PNG draw them."""
    curves, sets = named_curves(result), sorted(result.channels, key=int)
    colours = {n: depth_colour(at, len(sets)) for at, n in enumerate(sets)}
    series = [_set_series(result, n, colours[n]) for n in sets]

    rivals: list[tuple[str, str, Style]] = [
        (f"ridge regression, {set_name(result.reference)}", colours[result.reference], "dash"),
        ("exact patch", INK, "line"),
        ("difference of means", INK, "dash"),
        ("random directions, mean", GREY, "line"),
        *((f"{DRAWN[field]}, 95th percentile", colour, "dash") for field, colour in _COLOURS.items()),
    ]
    series += [Series(name, numbers(curves[name]), colour, style) for name, colour, style in rivals]
    band = f"{result.random_draws} random directions, 5–95 %"
    return Chart(
        id=chart_id,
        title="Strength curves",
        caption=f"Mean over {result.prompts} evaluation prompts; site {result.site}, where={result.where}. What is "
        f"drawn at random is, token by token, as long as the edit with {set_name(result.reference)}. Around the "
        "channels' curves: 95 % bootstrap interval over prompts.",
        x=numbers(result.strength),
        x_title="steering strength (1: fully patched)",
        y_title="P(counterfactual answer)",
        series=series,
        bands=[Band(band, numbers(result.random_p05), numbers(result.random_p95), GREY)],
        both_scales=True,
        y_range=(0, 1),
    )


def _set_series(result: Steering, n: str, colour: str) -> Series:
    ends = (numbers(result.channels_low[n]), numbers(result.channels_high[n]))
    return Series(set_name(n), numbers(result.channels[n]), colour, "dots", *ends)


def draw_chart(axes: Axes, chart: Chart) -> None:
    """A chart's bands and curves on matplotlib axes."""
    for band in chart.bands:
        ends = (_floats(band.low), _floats(band.high))
        axes.fill_between(_floats(chart.x), *ends, color=band.colour, alpha=0.3, lw=0, label=band.name)
    for series in chart.series:
        colour = _INK if series.colour == INK else series.colour
        axes.plot(_floats(chart.x), _floats(series.values), color=colour, label=series.name, **_LINES[series.style])
        if series.low:
            ends = (_floats(series.low), _floats(series.high))
            axes.fill_between(_floats(chart.x), *ends, color=colour, alpha=0.15, lw=0)
    axes.set(xlabel=chart.x_title, ylabel=chart.y_title)


def _floats(values: list[float | None]) -> list[float]:
    """None, a gap, is NaN for matplotlib."""
    return [float("nan") if value is None else value for value in values]


def draw_steering(axes: Axes, result: Steering) -> None:
    """Strength curves of one task with their controls."""
    draw_chart(axes, strength_chart(result))
    axes.set(ylim=(-0.02, 1.02))


def plot_steering(result: Steering, path: Path) -> Path:
    """Draw the figure as a PNG, on a linear and a logarithmic scale; returns its path."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    linear, log = figure.subplots(1, 2)
    for axes in (linear, log):
        draw_steering(axes, result)
        axes.grid(alpha=0.25)
    lowest = min(min(curve) for curve in (result.random_p05, *result.channels.values()))
    log.set(yscale="log", ylim=(max(1e-6, lowest / 2), 1.2), ylabel="")
    figure.suptitle(
        f"{result.task}: a dense model steered through sparse channels\n"
        f"site {result.site}, where={result.where}, {result.prompts} evaluation prompts",
        fontsize=10,
    )
    handles, labels = linear.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8, frameon=False)
    return save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a PNG by way of a temporary name; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.stem + ".tmp.png")
    figure.savefig(temporary, dpi=150)
    temporary.replace(path)
    return path

"""What a steering experiment found: curves by name, the strengths at which tables read them, and a figure."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from interventions.charts import GREY, INK, Band, Chart, Series, Style, depth_colour, draw_chart, numbers
from interventions.tasks.record import task_option
from sparse_model.io.commands import command_line
from sparse_model.io.reading import typed

Curve = list[float]
_COLOURS = {"random_channels": GREY, "shuffled": "#9a7f4f", "untrained": "#7d6f9a"}
FULL_STRENGTH = 1.0
"""The strength at which channels take their counterfactual values."""


class Steering(NamedTuple):
    """Mean P(counterfactual answer) at the last token, full vocabulary, at each strength. `_asdict()` is JSON."""

    task: str
    strength: Curve
    channels: dict[str, Curve]
    """By number of channels moved."""
    two_way: dict[str, Curve]
    """The same, normalised over the two answers."""
    random_mean: Curve
    random_p05: Curve
    random_p95: Curve
    random_channels_mean: Curve
    random_channels_p95: Curve
    difference_of_means: Curve
    prompts: int
    random_draws: int
    where: str
    site: int
    sets: dict[str, list[int]]
    """The channels of each set."""
    channels_low: dict[str, Curve]
    """2.5th percentile of `channels` over bootstrap resamples of the prompts."""
    channels_high: dict[str, Curve]
    """97.5th percentile."""
    shuffled_mean: Curve
    shuffled_p95: Curve
    untrained_mean: Curve
    untrained_p95: Curve
    ridge: dict[str, Curve]
    """The same channels through a ridge regression, by their number."""
    exact_patch: Curve
    """The dense model's own counterfactual at the site."""
    reference: str
    """The set whose norm and number of channels the drawn controls have."""
    norms: dict[str, float]
    """Mean norm of each edit over the tokens that it moves, at strength 1; of those through shuffled and untrained
    decoders before they are scaled, mean over the decoders."""
    ridge_fit: dict[str, float]
    """Penalty of the regression; its NMSE and the trained decoder's on held-out text."""
    side_effects: dict[str, dict[str, Any]]
    """`SideEffects` by set, and of `unsteered`, `difference_of_means` and `random` (mean over 5 directions as long as
    the reference's fixed vector)."""
    experiment: dict[str, Any]
    """The experiment, with what it had left open."""
    model: dict[str, int | float]
    """Shape and seed of the run."""
    random_own_p95: dict[str, Curve]
    """95th percentile of random directions as long as each set's own edit, and as the difference of means."""
    chosen: dict[str, float]
    """The strength that was chosen on selection prompts: for each set, `by_patching` and its number for those of the
    sparse model alone, and `difference_of_means`."""
    paper: dict[str, Curve]
    """The sets in the paper's units, by number of channels."""
    by_patching: dict[str, Curve]
    """The sets that the sparse model alone names, by number of channels."""
    patching_sets: dict[str, list[int]]
    """Their channels."""
    search_norm: float
    """The norm of the equal search, chosen on selection prompts."""
    searched: dict[str, dict[str, list[float]]]
    """P(counterfactual answer) of the sets that one search finds at that norm: by control and size, a value per draw.
    `trained bridge` is ours."""
    digest: str
    """Of the channel as it was chosen."""
    reach: float
    """P(counterfactual answer) of the counterfactual prompts themselves, unsteered."""

    def plot(self) -> Figure:
        """The strength curves with their controls; needs no display."""
        return plot_strengths(self)

    @classmethod
    def from_metrics(cls, metrics: dict[str, Any], task: str, folder: Path) -> "Steering":
        """A task's result in metrics.json of a folder. A result that is not of this version is a ValueError."""
        fields = metrics["steering"][task]
        again = command_again("steer", metrics, task, folder)
        if not isinstance(fields, dict) or set(fields) != set(cls._fields):
            raise ValueError(
                f"{folder / 'metrics.json'}: the steering of {task} is of another version or damaged, steer again: "
                f"{again}"
            )
        result = typed(cls, fields, f"{folder / 'metrics.json'}: the steering of {task}", f"steer again: {again}")
        curves = [curve for name, kind in cls.__annotations__.items() if kind is Curve for curve in [fields[name]]]
        curves += [c for name in _CURVES_BY_SET for c in fields[name].values()]
        if not all(len(curve) in (0, len(result.strength)) for curve in curves):
            raise ValueError(
                f"{folder / 'metrics.json'}: the steering of {task} has curves that are not as long as its strengths, "
                f"steer again: {again}"
            )
        return result


_CURVES_BY_SET = ("channels", "two_way", "channels_low", "channels_high", "ridge", "random_own_p95")
DRAWN = {
    "random": "random directions",
    "random_channels": "random channels",
    "shuffled": "shuffled decoder",
    "untrained": "untrained bridge",
}
"""What is drawn at random, by the names of the fields."""


FROM_SPARSE = " from the sparse model alone"
IN_PAPER_UNITS = " in the paper's units"


def chosen_strength(result: Steering, name: str) -> float:
    """The strength that was chosen for an edit on selection prompts; 1, the counterfactual value, where none was."""
    return result.chosen.get(name, FULL_STRENGTH)


def named_curves(result: Steering) -> dict[str, Curve]:
    """All curves of mean P(counterfactual answer) under the names that tables give them."""
    curves = {set_name(n): curve for n, curve in result.channels.items()}
    curves |= {f"{set_name(n)}{FROM_SPARSE}": curve for n, curve in result.by_patching.items()}
    curves |= {f"{set_name(n)}{IN_PAPER_UNITS}": curve for n, curve in result.paper.items()}
    curves |= {f"ridge regression, {set_name(n)}": curve for n, curve in result.ridge.items()}
    curves |= {"exact patch": result.exact_patch, "difference of means": result.difference_of_means}
    for field, name in DRAWN.items():
        curves[f"{name}, mean"] = getattr(result, f"{field}_mean")
        curves[f"{name}, 95th percentile"] = getattr(result, f"{field}_p95")
    for name, curve in result.random_own_p95.items():
        if name != result.reference:
            curves[f"random directions as long as {set_name(name)}, 95th percentile"] = curve
    return curves


def set_name(size: str) -> str:
    """ "1 channel", "4 channels"; other names as they are."""
    return f"{size} channel{'s' * (size != '1')}" if size.isdigit() else size.replace("_", " ")


def place_of(result: Steering, strength: int | float) -> int | None:
    """The place of a strength in a result's curves; None where it was not measured."""
    return next((place for place, measured in enumerate(result.strength) if abs(measured - strength) < 1e-6), None)


def at_strength(result: Steering, strength: int | float, folder: str = "this run") -> int:
    """The place of a strength in a result's curves. Raises ValueError where it was not measured."""
    place = place_of(result, strength)
    if place is None:
        measured = ", ".join(f"{s:g}" for s in result.strength)
        raise ValueError(f"strength={strength}: {folder} was steered at {measured}")
    return place


def strength_of(result: Steering, name: str, strength: int | float | None = None) -> int | float:
    """Where a curve is read: at the strength given; unset: at the chosen one of the edit that it goes with, or at 1."""
    if strength is not None:
        return strength
    for n in (*result.sets, "difference_of_means"):
        edit = set_name(n)
        if name in (edit, f"ridge regression, {edit}") or name.startswith(f"random directions as long as {edit},"):
            return chosen_strength(result, n)
    for n in result.by_patching:
        if name == f"{set_name(n)}{FROM_SPARSE}":
            return chosen_strength(result, f"by_patching {n}")
    return chosen_strength(result, result.reference) if name.startswith(tuple(DRAWN.values())) else FULL_STRENGTH


def value_at(result: Steering, name: str, strength: int | float | None = None) -> float:
    """P(counterfactual answer) on one of the `named_curves`. Raises ValueError where it was not measured there."""
    return named_curves(result)[name][at_strength(result, strength_of(result, name, strength))]


OURS = "trained bridge"
"""The search that the controls are compared with."""


def p_value(ours: float, controls: Sequence[float]) -> float:
    """The share of controls, ours among them, that do at least as well."""
    return (1 + sum(p >= ours for p in controls)) / (1 + len(controls))


class Searched(NamedTuple):
    """What one search finds through a control, beside what it finds through the trained bridge."""

    control: str
    size: str
    ours: float
    median: float
    largest: float
    draws: int
    p_value: float
    """Share of the draws, ours among them, that do at least as well as ours."""


def searches(result: Steering) -> list[Searched]:
    """The equal searches, by control and size."""
    ours = result.searched.get(OURS, {})
    return [
        Searched(control, n, ours[n][0], statistics.median(found), max(found), len(found), p_value(ours[n][0], found))
        for control, by_size in result.searched.items()
        for n, found in by_size.items()
        if control != OURS
    ]


def strength_chart(result: Steering, chart_id: str = "steering") -> Chart:
    """One task's strength curves with their controls, as a report, a notebook and a PNG draw them."""
    curves, sets = named_curves(result), sorted(result.channels, key=int)
    colours = {n: depth_colour(number, len(sets)) for number, n in enumerate(sets)}
    series = [_set_series(result, n, colours[n]) for n in sets]

    reference = set_name(result.reference)
    rivals: list[tuple[str, str, Style]] = [
        (f"ridge regression, {reference}", colours[result.reference], "dash"),
        (f"{reference}{IN_PAPER_UNITS}", colours[result.reference], "line"),
        *((f"{set_name(n)}{FROM_SPARSE}", GREY, "line") for n in result.by_patching if n == result.reference),
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
        "channels' curves: 95 % bootstrap interval over prompts. Counterfactual prompts, unsteered: "
        f"{result.reach:.3f}.",
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


def draw_steering(axes: Axes, result: Steering) -> None:
    """Strength curves of one task with their controls."""
    draw_chart(axes, strength_chart(result))
    axes.set(ylim=(-0.02, 1.02))


def plot_strengths(result: Steering) -> Figure:
    """One task's steering: P(counterfactual answer) against strength, with the controls."""
    figure = Figure(figsize=(7.4, 4.2), layout="constrained")
    axes = figure.subplots()
    draw_steering(axes, result)
    axes.grid(alpha=0.25)
    axes.set_title(f"{result.task}: site {result.site}, where={result.where}, {result.prompts} prompts", fontsize=10)
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    return figure


def command_again(command: str, metrics: dict[str, Any], task: str, folder: Path) -> str:
    """A command that makes a result of metrics.json again."""
    records = metrics.get("task_prompts")
    record = records.get(task) if isinstance(records, dict) else None
    return command_line(command, "--run", folder, "--task", task_option(task, record))

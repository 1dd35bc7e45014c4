"""The report's steering panels: strength curves with their controls, and side effects."""

from pathlib import Path
from typing import Any, NamedTuple

from interventions.report.charts import GREY, INK, Band, Chart, Series, depth_colour, numbers
from interventions.steering.result import DRAWN, Steering, named_curves, set_name
from interventions.steering.side_effects import SideEffects

_STYLES = {"random_channels": GREY, "shuffled": "#9a7f4f", "untrained": "#7d6f9a"}


class Claim(NamedTuple):
    """A line of the overview: one set at full strength."""

    edit: str
    unsteered: float
    steered: float
    interval: tuple[float, float] | None
    """95 % bootstrap interval over prompts."""
    controls: list[float | None]
    """In the order of `CONTROLS`; None where the result has no such control."""


CONTROLS = (
    ("random p95", "95th percentile of random directions, as long as the reference edit at every token"),
    ("random channels p95", "95th percentile over randomly drawn channels, at the same norm"),
    ("shuffled p95", "95th percentile over decoders whose columns were exchanged, at the same norm"),
    ("untrained p95", "95th percentile over bridges that were not trained, at the same norm"),
    ("ridge", "The same channels through a ridge regression in place of the trained bridge"),
    ("difference of means", "Mean dense stream of one class minus the other's, on selection prompts"),
    ("exact patch", "The dense model's own counterfactual at the site"),
)
"""Columns of the overview, with what they are."""


class SideRow(NamedTuple):
    """A line of the table of side effects."""

    name: str
    effects: SideEffects
    mean_accuracy: float | None
    worst: str
    """The other task that suffers most; empty where the unsteered model solves none."""


class SteeringPage(NamedTuple):
    """One task's strength curves."""

    result: Steering
    chart: Chart
    claims: list[Claim]
    rows: list[tuple[str, list[float]]]
    """The curves by name, controls included."""
    two_way: list[tuple[str, list[float]]]
    """The channels' curves normalised over the two answers."""
    side_effects: list[SideRow]


def steering_pages(folder: Path, metrics: dict[str, Any]) -> list[SteeringPage]:
    """A panel for each task in metrics.json. ValueError for results that do not read, naming the file and the task."""
    pages = []
    for number, (task, fields) in enumerate(metrics.get("steering", {}).items(), 1):
        try:
            pages.append(_page(Steering(**fields), number))
        except (TypeError, KeyError, IndexError) as error:
            raise ValueError(
                f"{folder / 'metrics.json'}: steering of {task} does not read ({error!r}): steer again with "
                "sparse-bridges steer"
            ) from error
    return pages


def _page(result: Steering, number: int) -> SteeringPage:
    return SteeringPage(
        result=result,
        chart=_chart(result, number),
        claims=[_claim(result, name) for name in result.channels],
        rows=[*named_curves(result).items(), ("random directions, 5th percentile", result.random_p05)],
        two_way=[(set_name(name), curve) for name, curve in result.two_way.items()],
        side_effects=[_side_row(name, SideEffects(**one)) for name, one in result.side_effects.items()],
    )


def _claim(result: Steering, name: str) -> Claim:
    def last(curve: list[float]) -> float | None:
        return curve[-1] if curve else None

    curve = result.channels[name]
    low, high = result.channels_low.get(name), result.channels_high.get(name)
    controls = [last(getattr(result, f"{field}_p95")) for field in DRAWN]
    controls += [last(result.ridge.get(name, [])), last(result.difference_of_means), last(result.exact_patch)]
    return Claim(set_name(name), curve[0], curve[-1], (low[-1], high[-1]) if low and high else None, controls)


def _side_row(name: str, effects: SideEffects) -> SideRow:
    accuracies = effects.pair_accuracy
    if not accuracies:
        return SideRow(set_name(name), effects, None, "")
    worst = min(accuracies, key=accuracies.__getitem__)
    return SideRow(
        set_name(name), effects, sum(accuracies.values()) / len(accuracies), f"{worst} {accuracies[worst]:.2f}"
    )


def _chart(result: Steering, number: int) -> Chart:
    series = [_channels(result, name, at) for at, name in enumerate(result.channels)]
    if result.reference in result.ridge:
        colour = depth_colour(list(result.channels).index(result.reference), len(result.channels))
        name = f"ridge, {set_name(result.reference)}"
        series.append(Series(name, numbers(result.ridge[result.reference]), colour, "dash"))
    if result.exact_patch:
        series.append(Series("exact patch", numbers(result.exact_patch), INK))
    series.append(Series("difference of means", numbers(result.difference_of_means), INK, "dash"))
    series.append(Series("random directions, mean", numbers(result.random_mean), GREY))
    for field, colour in _STYLES.items():
        curve = getattr(result, f"{field}_p95")
        if curve:
            series.append(Series(f"{DRAWN[field]}, 95th pct", numbers(curve), colour, "dash"))
    reference = f"the edit with {set_name(result.reference or '4')}"
    return Chart(
        id=f"steering-{number}",
        title="Strength curves",
        caption=f"Mean over {result.prompts} evaluation prompts; site {result.site}, where={result.where}. What is "
        f"drawn at random is, token by token, as long as {reference}."
        + " Around the channels' curves: 95 % bootstrap interval over prompts."
        * bool(result.channels_low),
        x=numbers(result.strength),
        x_title="steering strength (1: fully patched)",
        y_title="P(counterfactual answer)",
        series=series,
        bands=[
            Band(
                f"{result.random_draws} random directions, 5–95 %",
                numbers(result.random_p05),
                numbers(result.random_p95),
                GREY,
            )
        ],
        both_scales=True,
        y_range=(0, 1),
    )


def _channels(result: Steering, name: str, at: int) -> Series:
    return Series(
        name=set_name(name),
        values=numbers(result.channels[name]),
        colour=depth_colour(at, len(result.channels)),
        style="dots",
        low=numbers(result.channels_low.get(name, [])),
        high=numbers(result.channels_high.get(name, [])),
    )

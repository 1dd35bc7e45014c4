"""The report's steering panels: strength curves with their controls, and side effects."""

from pathlib import Path
from typing import Any, NamedTuple

from interventions.charts import Chart
from interventions.steering.result import (
    DRAWN,
    FROM_SPARSE,
    FULL_STRENGTH,
    Curve,
    Searched,
    Steering,
    command_again,
    named_curves,
    place_of,
    searches,
    set_name,
    strength_chart,
)
from interventions.steering.side_effects import SideEffects
from sparse_model.io.reading import typed


class Claim(NamedTuple):
    """A line of the overview: one set at full strength. None stands for what was not measured."""

    edit: str
    unsteered: float | None
    steered: float | None
    interval: tuple[float | None, float | None]
    """95 % bootstrap interval over prompts."""
    controls: list[float | None]
    """In the order of `CONTROLS`."""


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
    searches: list[Searched]


def steering_pages(folder: Path, metrics: dict[str, Any]) -> list[SteeringPage]:
    """A panel for each task in metrics.json. ValueError for results that do not read, naming the file and the task."""
    pages = []
    for number, task in enumerate(metrics.get("steering", {}), 1):
        result = Steering.from_metrics(metrics, task, folder)
        try:
            pages.append(_page(result, number))
        except (ValueError, KeyError, IndexError) as error:
            raise ValueError(
                f"{folder / 'metrics.json'}: the steering of {task} is damaged ({error!r}), steer again: "
                f"{command_again('steer', metrics, task, folder)}"
            ) from error
    return pages


def _page(result: Steering, number: int) -> SteeringPage:
    return SteeringPage(
        result=result,
        chart=strength_chart(result, f"steering-{number}"),
        claims=[_claim(result, name) for name in result.channels]
        + [_claim_by_patching(result, n) for n in result.by_patching],
        searches=searches(result),
        rows=[*named_curves(result).items(), ("random directions, 5th percentile", result.random_p05)],
        two_way=[(set_name(name), curve) for name, curve in result.two_way.items()],
        side_effects=[
            _side_row(name, typed(SideEffects, one, name, "steer again")) for name, one in result.side_effects.items()
        ],
    )


def at_full_strength(result: Steering, curve: Curve) -> float | None:
    """A curve's value at strength 1, where the channels take their counterfactual values; None: not measured."""
    return _value(result, curve, FULL_STRENGTH)


def _value(result: Steering, curve: Curve, strength: float) -> float | None:
    place = place_of(result, strength)
    return None if place is None else curve[place]


def _claim(result: Steering, name: str) -> Claim:
    controls = [getattr(result, f"{field}_p95") for field in DRAWN]
    controls += [result.ridge[name], result.difference_of_means, result.exact_patch]
    low, steered, high = (
        at_full_strength(result, curves[name])
        for curves in (result.channels_low, result.channels, result.channels_high)
    )
    return Claim(
        edit=set_name(name),
        unsteered=_value(result, result.channels[name], 0.0),
        steered=steered,
        interval=(low, high),
        controls=[at_full_strength(result, curve) for curve in controls],
    )


def _claim_by_patching(result: Steering, name: str) -> Claim:
    """Of a set that the sparse model alone names; the drawn controls are the reference's."""
    drawn = [at_full_strength(result, getattr(result, f"{field}_p95")) for field in DRAWN]
    others = [at_full_strength(result, curve) for curve in (result.difference_of_means, result.exact_patch)]
    return Claim(
        edit=f"{set_name(name)}{FROM_SPARSE}",
        unsteered=_value(result, result.by_patching[name], 0.0),
        steered=at_full_strength(result, result.by_patching[name]),
        interval=(None, None),
        controls=[*drawn, None, *others],
    )


def _side_row(name: str, effects: SideEffects) -> SideRow:
    accuracies = effects.pair_accuracy
    if not accuracies:
        return SideRow(set_name(name), effects, None, "")
    worst = min(accuracies, key=accuracies.__getitem__)
    return SideRow(
        set_name(name), effects, sum(accuracies.values()) / len(accuracies), f"{worst} {accuracies[worst]:.2f}"
    )

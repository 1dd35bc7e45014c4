"""What a steering experiment found: curves by name, the strengths at which tables read them, and a figure."""

# ruff: noqa: RUF012 (a NamedTuple has no default factories; nobody changes its defaults)

from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from interventions.figures import DEPTH, GREY
from interventions.steering.strengths import quiet_count

Curve = list[float]


class Steering(NamedTuple):
    """Mean P(counterfactual answer) at the last token, full vocabulary, at each strength. `_asdict()` is JSON.

    Fields with an empty default are not in the results of earlier versions.
    """

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
    channels_low: dict[str, Curve] = {}
    """2.5th percentile of `channels` over bootstrap resamples of the prompts."""
    channels_high: dict[str, Curve] = {}
    """97.5th percentile."""
    shuffled_mean: Curve = []
    shuffled_p95: Curve = []
    untrained_mean: Curve = []
    untrained_p95: Curve = []
    ridge: dict[str, Curve] = {}
    """The same channels through a ridge regression, by their number."""
    exact_patch: Curve = []
    """The dense model's own counterfactual at the site."""
    reference: str = ""
    """The set whose norm and number of channels the drawn controls have."""
    norms: dict[str, float] = {}
    """Mean norm of each edit over the tokens that it moves, at strength 1; of those through shuffled and untrained
    decoders before they are scaled, mean over the decoders."""
    ridge_fit: dict[str, float] = {}
    """Penalty of the regression; its NMSE and the trained decoder's on held-out text."""
    side_effects: dict[str, dict[str, Any]] = {}
    """`SideEffects` by set, and of `unsteered`, `difference_of_means` and `random` (mean over 5 directions as long as
    the reference's fixed vector)."""
    experiment: dict[str, Any] = {}
    """The experiment, with what it had left open."""
    model: dict[str, int | float] = {}
    """Shape and seed of the run."""
    random_own_p95: dict[str, Curve] = {}
    """95th percentile of random directions as long as each set's own edit, and as the difference of means."""
    chosen: dict[str, float] = {}
    """The strength that was chosen on selection prompts: for each set, and for `difference_of_means`."""
    searched: dict[str, list[float]] = {}
    """P(counterfactual answer) of the one channel that the same search finds through each shuffled decoder, and each
    untrained bridge, at its quiet strength; of channels that were found by steering."""

    def plot(self) -> Figure:
        """The strength curves with their controls; needs no display."""
        return plot_strengths(self)


DRAWN = {
    "random": "random directions",
    "random_channels": "random channels",
    "shuffled": "shuffled decoder",
    "untrained": "untrained bridge",
}
"""What is drawn at random, by the names of the fields."""


def quiet_strength(result: Steering, name: str) -> float:
    """The largest strength of a set, or of the difference of means, that is quiet on the evaluation prompts.

    What an edit does to the answer has no say in it. It is not above 1, the counterfactual value, unless a larger one
    was chosen on selection prompts.
    """
    p95 = result.random_own_p95.get(name)
    if p95 is None:  # of a version that did not measure it
        return full_strength(result)
    most = max(1.0, result.chosen.get(name, 0.0))
    return max([s for s in result.strength[: quiet_count(p95)] if s <= most], default=result.strength[0])


def full_strength(result: Steering) -> float:
    """1, the counterfactual value; where that was not measured, the last strength below it, or the first above."""
    return max([s for s in result.strength if s <= 1], default=result.strength[0])


def named_curves(result: Steering) -> dict[str, Curve]:
    """All curves of mean P(counterfactual answer) under the names that tables give them."""
    curves = {set_name(n): curve for n, curve in result.channels.items()}
    curves |= {f"ridge regression, {set_name(n)}": curve for n, curve in result.ridge.items()}
    curves |= {"exact patch": result.exact_patch, "difference of means": result.difference_of_means}
    for field, name in DRAWN.items():
        curves[f"{name}, mean"] = getattr(result, f"{field}_mean")
        curves[f"{name}, 95th percentile"] = getattr(result, f"{field}_p95")
    for name, curve in result.random_own_p95.items():
        if name != result.reference:
            curves[f"random directions as long as {set_name(name)}, 95th percentile"] = curve
    return {name: curve for name, curve in curves.items() if curve}


def set_name(size: str) -> str:
    """ "1 channel", "4 channels"; other names as they are."""
    return f"{size} channel{'s' * (size != '1')}" if size.isdigit() else size.replace("_", " ")


def at_strength(result: Steering, strength: int | float, folder: str = "this run") -> int:
    """The place of a strength in a result's curves. Raises ValueError where it was not measured."""
    for at, one in enumerate(result.strength):
        if abs(one - strength) < 1e-6:
            return at
    raise ValueError(f"strength={strength}: {folder} was steered at {', '.join(f'{s:g}' for s in result.strength)}")


def strength_of(result: Steering, name: str, strength: int | float | None = None) -> int | float:
    """Where a curve is read: at the strength given; unset: at the quiet one of the set that it goes with, or at 1."""
    if strength is not None:
        return strength
    for n in (*result.sets, "difference_of_means"):
        own = set_name(n)
        if name in (own, f"ridge regression, {own}") or name.startswith(f"random directions as long as {own},"):
            return quiet_strength(result, n)
    return quiet_strength(result, result.reference) if name.startswith(tuple(DRAWN.values())) else full_strength(result)


def value_at(result: Steering, name: str, strength: int | float | None = None) -> float:
    """P(counterfactual answer) on one of the `named_curves`."""
    return named_curves(result)[name][at_strength(result, strength_of(result, name, strength))]


def draw_steering(axes: Axes, result: Steering, ink: str = "black") -> None:
    """Strength curves of one task with their controls; `ink` is the colour of those that need no sparse model."""
    strength, curves = result.strength, named_curves(result)
    for at, (n, curve) in enumerate(sorted(result.channels.items(), key=lambda entry: int(entry[0]))):
        colour = DEPTH(at / max(1, len(result.channels) - 1))
        axes.plot(strength, curve, color=colour, marker="o", ms=3, label=set_name(n))
        if n in result.channels_low:
            axes.fill_between(strength, result.channels_low[n], result.channels_high[n], color=colour, alpha=0.15, lw=0)
        if n == result.reference:
            axes.plot(strength, result.ridge[n], color=colour, ls="--", label=f"ridge regression, {set_name(n)}")
    if result.exact_patch:
        axes.plot(strength, result.exact_patch, color=ink, lw=1, label="exact patch (dense)")
    axes.plot(strength, result.difference_of_means, color=ink, ls="--", label="difference of means (dense)")
    band = f"{result.random_draws} random directions, 5–95 %"
    axes.fill_between(
        strength, result.random_p05, result.random_p95, color=GREY, alpha=0.3, lw=0, label=band, gid="random-band"
    )
    axes.plot(strength, result.random_mean, color=GREY, label="random directions, mean")
    for name, style in (("random channels", ":"), ("shuffled decoder", "--"), ("untrained bridge", "-.")):
        name = f"{name}, 95th percentile"
        if name in curves:
            axes.plot(strength, curves[name], color=GREY, ls=style, label=name)
    axes.set(xlabel="steering strength (1: fully patched)", ylabel="mean P(counterfactual answer)", ylim=(-0.02, 1.02))


def plot_strengths(result: Steering) -> Figure:
    """One task's steering: P(counterfactual answer) against strength, with the controls."""
    figure = Figure(figsize=(7.4, 4.2), layout="constrained")
    axes = figure.subplots()
    draw_steering(axes, result)
    axes.grid(alpha=0.25)
    axes.set_title(f"{result.task}: site {result.site}, where={result.where}, {result.prompts} prompts", fontsize=10)
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    return figure

"""The steering figure, drawn with matplotlib without a display; the report and the PNG share it."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from interventions.steering import Steering

GREY = "#8a8f98"
# Of middling lightness from end to end: legible on white and on black.
DEPTH = LinearSegmentedColormap.from_list("depth", ["#4f7fe0", "#1fa09a", "#d08a1e", "#d0527f"])


def draw_steering(axes: Axes, result: Steering, ink: str = "black") -> None:
    """Strength curves of one task with their controls; `ink` is the colour of the difference of means."""
    strength = result.strength
    band = f"{result.random_draws} random directions, 5–95 %"
    axes.fill_between(
        strength, result.random_p05, result.random_p95, color=GREY, alpha=0.3, lw=0, label=band, gid="random-band"
    )
    axes.plot(strength, result.random_mean, color=GREY, label="random directions, mean")
    axes.plot(strength, result.random_channels_p95, color=GREY, ls=":", label="random channels, 95th percentile")
    axes.plot(strength, result.difference_of_means, color=ink, ls="--", label="difference of means (dense)")
    for at, (n, curve) in enumerate(sorted(result.channels.items(), key=lambda entry: int(entry[0]))):
        colour = DEPTH(at / max(1, len(result.channels) - 1))
        axes.plot(strength, curve, color=colour, marker="o", ms=3, label=f"{n} sparse channel{'s' * (n != '1')}")
    axes.set(xlabel="steering strength (1: fully patched)", ylabel="mean P(counterfactual answer)", ylim=(-0.02, 1.02))


def plot_steering(result: Steering, path: Path) -> Path:
    """Draw the figure as a PNG by way of a temporary name; returns its path."""
    figure = Figure(figsize=(7.4, 4.2), layout="constrained")
    axes = figure.subplots()
    draw_steering(axes, result)
    axes.grid(alpha=0.25)
    axes.set_title(
        f"{result.task}: a dense model steered through sparse channels\n"
        f"site {result.site}, where={result.where}, {result.prompts} evaluation prompts",
        fontsize=10,
    )
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    temporary = path.with_name(path.stem + ".tmp.png")
    figure.savefig(temporary, dpi=150)
    temporary.replace(path)
    return path

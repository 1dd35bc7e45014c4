"""Steering figures, drawn with matplotlib without a display."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from interventions.steering.result import Steering, named_curves, set_name

GREY = "#8a8f98"
# Of middling lightness from end to end: legible on white and on black.
DEPTH = LinearSegmentedColormap.from_list("depth", ["#4f7fe0", "#1fa09a", "#d08a1e", "#d0527f"])


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

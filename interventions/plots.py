"""Figures, drawn with matplotlib without a display."""

from pathlib import Path

from matplotlib.figure import Figure

from interventions.steering import Steering


def plot_steering(result: Steering, path: Path) -> Path:
    """Draw the strength curves with their controls as a PNG; returns its path."""
    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.subplots()
    strength = result.strength
    axes.fill_between(
        strength,
        result.random_p05,
        result.random_p95,
        color="0.8",
        label=f"{result.random_draws} random directions, 5-95 %",
    )
    axes.plot(strength, result.random_mean, color="0.45", label="random directions, mean")
    axes.plot(strength, result.random_channels_p95, color="0.45", ls=":", label="random channels, 95th percentile")
    axes.plot(strength, result.difference_of_means, color="tab:red", ls="--", label="difference of means (dense)")
    blues = {"1": "#9ecae1", "2": "#4292c6", "4": "#08519c", "8": "#08306b"}
    for n, curve in result.channels.items():
        name = "channel" if n == "1" else "channels"
        axes.plot(strength, curve, color=blues.get(n), marker="o", ms=3, label=f"{n} sparse {name}")
    axes.set(
        xlabel="steering strength (1: fully patched)",
        ylabel="mean P(counterfactual answer)",
        ylim=(-0.02, 1.02),
        title=f"{result.task}: dense model steered through sparse channels\n"
        f"site {result.site}, where={result.where}, {result.prompts} evaluation prompts",
    )
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    temporary = path.with_name(path.stem + ".tmp.png")
    figure.savefig(temporary, dpi=150)
    temporary.replace(path)
    return path

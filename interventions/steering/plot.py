"""The steering figure as a PNG, drawn with matplotlib without a display."""

from pathlib import Path

from matplotlib.figure import Figure

from interventions.figures import save_figure
from interventions.steering.result import Steering, draw_steering


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

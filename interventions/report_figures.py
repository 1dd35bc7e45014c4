"""The report's figures: inline SVG whose text and lines take the page's colour, so that both themes can show them."""

import io
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from jaxtyping import Float
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from interventions.plots import DEPTH, draw_steering
from interventions.steering import Steering

MOST_POINTS = 400
"""Points of a curve; longer ones are averaged, or a long run's report would be mostly paths."""

_INK = "#010203"  # stands for currentColor, which matplotlib cannot write
_BLUE, _ORANGE = "#4585d8", "#d98324"
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "font.size": 9,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _INK,
    "grid.alpha": 0.12,
    "lines.linewidth": 1.4,
    "legend.frameon": False,
    "legend.fontsize": 8,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
}

Curve = Float[np.ndarray, " step"]


class Picture(NamedTuple):
    """A figure with its words."""

    title: str
    caption: str
    svg: Markup


class History(NamedTuple):
    """metrics.jsonl as columns."""

    step: Curve
    ce: Curve
    nmse_encode: Float[np.ndarray, "step site"]
    nmse_decode: Float[np.ndarray, "step site"]
    kl_dense_to_sparse: Curve
    kl_sparse_to_dense: Curve
    nonzero_fraction: Curve
    lr: Curve


def history(records: Sequence[dict]) -> History:
    """The columns of metrics.jsonl's records; neighbours are averaged where there are over `MOST_POINTS`.

    Raises KeyError or ValueError for records that lack a column or whose sites differ in number.
    """
    columns = [np.array([record[name] for record in records], dtype=float) for name in History._fields]
    count = min(len(records), MOST_POINTS)
    return History(*(np.stack([part.mean(0) for part in np.array_split(c, count)]) for c in columns))


def smooth(values: Curve) -> Curve:
    """Centred moving mean over a twentieth of the curve; at the ends over the points that there are."""
    window = np.ones(max(3, len(values) // 20))
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")


@mpl.rc_context(_STYLE)
def training_pictures(past: History, labels: Sequence[str]) -> list[Picture]:
    """The training curves; `labels` name the sites."""
    both = (
        ("KL(dense ‖ dense → sparse hybrid)", past.kl_dense_to_sparse, _BLUE),
        ("KL(dense ‖ sparse → dense hybrid)", past.kl_sparse_to_dense, _ORANGE),
    )
    figure, axes = _figure("nats per token")
    axes.plot(past.step, past.ce, color=_BLUE)
    ce = Picture("Cross-entropy", "Next-token loss of the sparse model on training batches.", _svg(figure, "ce"))
    figure, axes = _figure("nats per token", log=True)
    for name, values, colour in both:
        axes.plot(past.step, values, color=colour, alpha=0.25, lw=0.8)
        axes.plot(past.step, smooth(values), color=colour, label=name)
    axes.legend()
    kl = Picture(
        "Hybrid KL", "Faint: as logged, at the sites drawn in that step. Full: moving mean.", _svg(figure, "kl")
    )
    pictures = [ce, kl]
    for name, title in (("nmse_encode", "NMSE of the encoders"), ("nmse_decode", "NMSE of the decoders")):
        figure, axes = _figure("NMSE", log=True)
        _site_curves(axes, past.step, getattr(past, name), labels)
        figure.legend(loc="outside right center")
        pictures.append(Picture(title, "One curve per site; 1 is predicting the mean.", _svg(figure, name)))
    figure, axes = _figure("share of weights", log=True)
    axes.plot(past.step, past.nonzero_fraction, color=_BLUE)
    caption = "Share of the sparse model's weights that the annealing schedule keeps."
    pictures.append(Picture("Nonzero weights", caption, _svg(figure, "nonzeros")))
    figure, axes = _figure("rate")
    axes.plot(past.step, past.lr, color=_BLUE)
    pictures.append(Picture("Learning rate", "Of the sparse model's optimizer.", _svg(figure, "lr")))
    return pictures


@mpl.rc_context(_STYLE)
def steering_picture(result: Steering, name: str) -> Picture:
    """Strength curves of one task with their controls; `name` tells figures on the same page apart."""
    figure, axes = _figure("mean P(counterfactual answer)", size=(7.4, 4.0))
    draw_steering(axes, result, _INK)
    figure.legend(loc="outside right center")
    caption = (
        f"Site {result.site}, where={result.where}, {result.prompts} evaluation prompts. Random directions and random "
        "channels have, token by token, the norm of the edit with four channels."
    )
    return Picture(result.task, caption, _svg(figure, name))


def _site_curves(axes: Axes, step: Curve, values: Float[np.ndarray, "step site"], labels: Sequence[str]) -> None:
    n_sites = values.shape[1]
    every = -(-n_sites // 9)  # a legend of at most nine
    for site in range(n_sites):
        shown = labels[site] if site % every == 0 or site == n_sites - 1 else None
        axes.plot(step, values[:, site], color=DEPTH(site / max(1, n_sites - 1)), label=shown)


def _figure(ylabel: str, *, log: bool = False, size: tuple[float, float] = (5.2, 2.9)) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel="step", ylabel=ylabel, yscale="log" if log else "linear")
    if log:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    return figure, axes


def _svg(figure: Figure, name: str) -> Markup:
    """The figure as an svg element without background, ids prefixed with `name`."""
    figure.patch.set_visible(False)
    for axes in figure.axes:
        axes.patch.set_visible(False)
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r"<style .*?</style>|<defs>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;]*;", "font-family: inherit;", svg)
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\1{name}-", svg)
    return Markup(svg)

"""What bracket_counting.py has found, as a picture."""

from pathlib import Path
from typing import Any

from bracket_prompts import SHORT
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from interventions.charts import BLUE, ORANGE
from interventions.figures import GREY, save_figure

_MEMBERS = (("[", ORANGE), ("[[", BLUE))
_ARMS = {
    "depth channel": BLUE,
    "all channels": ORANGE,
    "difference of means, as long as the channel": "#2a9d5c",
    "random, as long as the channel": GREY,
}
_MARGIN = "logit of ]] less that of ]"


def draw(results: dict[str, Any], path: Path) -> Path:
    """Six panels of the first run that has a sparse model; the dense models of all runs in one of them."""
    first = next((found for found in results.values() if "sparse" in found), next(iter(results.values())))
    label = "sparse" if "sparse" in first else "dense"
    figure = Figure(figsize=(15, 8.5), layout="constrained")
    axes = figure.subplots(2, 3)
    figures = first[label]["figures"]
    _attention(axes[0, 0], figures, first[label]["roles"])
    if "depth" in figures["measured"]["evaluation"]:
        _curves(
            axes[0, 1], figures, figures["measured"]["evaluation"]["depth"], figures["laws"]["depth, all heads"]["mean"]
        )
        axes[0, 1].set(title="depth channel at the last token", ylabel="value written")
    _curves(axes[0, 2], figures, figures["measured"]["evaluation"]["margins"], figures["laws"]["all heads"]["mean"])
    axes[0, 2].set(title=f"{label} model", ylabel=_MARGIN)
    if label == "sparse" and "curve" in first[label]["roles"]:
        _threshold(axes[1, 0], first[label]["roles"], figures)
    _dense(axes[1, 1], results)
    if "steering" in first:
        _steering(axes[1, 2], first["steering"])
    for axis in axes.flat:
        if not axis.has_data():
            axis.set_axis_off()
    return save_figure(figure, path)


def _attention(axis: Axes, figures: dict[str, Any], roles: dict[str, Any]) -> None:
    seen = figures["measured"]["evaluation"]["looks"]
    axis.plot(figures["numbers"], [row[0] for row in seen], color=BLUE, marker="o", ms=3, label="on the opener")
    axis.plot(figures["numbers"], [row[1] for row in seen], color=GREY, marker="o", ms=3, label="on each other token")
    axis.plot(figures["numbers"], [row[3] for row in seen], color=GREY, ls="--", label="1/n, an even average")
    axis.set(
        title=f"attention of head {'.'.join(map(str, roles['head']))}",
        xlabel="names in the list",
        ylabel="weight",
        ylim=(0, None),
    )
    axis.legend()


def _curves(axis: Axes, figures: dict[str, Any], measured: list[list[float]], foretold: list[list[float]]) -> None:
    for member, (opener, colour) in enumerate(_MEMBERS):
        axis.plot(
            figures["numbers"],
            [row[member] for row in measured],
            color=colour,
            marker="o",
            ms=3,
            label=f"after {opener}, measured",
        )
        axis.plot(
            figures["numbers"],
            [row[member] for row in foretold],
            color=colour,
            ls="--",
            label=f"after {opener}, foretold",
        )
    axis.axhline(0, color=GREY, lw=0.7)
    axis.set(xlabel="names in the list")
    axis.legend()


def _threshold(axis: Axes, roles: dict[str, Any], figures: dict[str, Any]) -> None:
    values = [point[0] for point in roles["curve"]]
    selection = figures["measured"]["selection"]
    for member, (opener, colour) in enumerate(_MEMBERS):
        axis.plot(
            values,
            [point[1 + member] for point in roles["curve"]],
            color=colour,
            label=f"after {opener}, channel set, {SHORT} names",
        )
        points = [
            (depth[member], margin[member])
            for depth, margin in zip(selection["depth"], selection["margins"], strict=True)
        ]
        axis.plot(
            *zip(*points, strict=True),
            color=colour,
            marker="o",
            ms=3,
            ls=":",
            label=f"after {opener}, by number of names",
        )
    axis.axhline(0, color=GREY, lw=0.7)
    axis.set(
        title="threshold: margin by the depth channel",
        xlabel="depth channel at the last token",
        ylabel=_MARGIN,
    )
    axis.legend()


def _dense(axis: Axes, results: dict[str, Any]) -> None:
    dense = {name: found["dense"]["figures"] for name, found in results.items() if "dense" in found}
    for number, (name, figures) in enumerate(dense.items()):
        colour = BLUE if number == 0 else GREY
        rows = figures["measured"]["evaluation"]["margins"]
        axis.plot(
            figures["numbers"],
            [row[1] for row in rows],
            color=colour,
            lw=2 if number == 0 else 1,
            label=name if number == 0 else None,
        )
        axis.plot(
            figures["numbers"], [row[1] for row in figures["laws"]["all heads"]["mean"]], color=colour, ls="--", lw=1
        )
    if dense and "sparse" in (laws := next(iter(dense.values()))["laws"]):
        axis.plot(
            figures["numbers"],
            [row[1] for row in laws["sparse"]["mean"]],
            color=ORANGE,
            ls="--",
            label="foretold by the sparse model",
        )
    axis.axhline(0, color=GREY, lw=0.7)
    axis.set(
        title="dense models after [[, and foretold (dashed)",
        xlabel="names in the list",
        ylabel=_MARGIN,
    )
    axis.legend()


def _steering(axis: Axes, steering: dict[str, Any]) -> None:
    long = str(steering["names"])
    for arm, colour in _ARMS.items():
        of = steering["moves"]["deepen"][arm]
        for what, number, style in (("repair", long, "-"), ("cause", str(SHORT), "--")):
            strengths = [0.0, *map(float, of[what])]
            values = [steering["unsteered"][number][1], *(point["margins"][1] for point in of[what].values())]
            axis.plot(
                strengths, values, color=colour, ls=style, marker="o", ms=3, label=arm if what == "repair" else None
            )
    axis.axhline(0, color=GREY, lw=0.7)
    axis.set(
        title=f"dense, {long} names repaired, {SHORT} spoilt (dashed)",
        xlabel="strength",
        ylabel=_MARGIN,
    )
    axis.legend()

"""What the comparison of bases found, and its figure."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from interventions.charts import GREY, INK, Chart, Series, Style, depth_colour, draw_chart, numbers
from interventions.editing.where import Where
from interventions.figures import save_figure
from interventions.steering.result import command_again
from sparse_model.io.reading import typed

OURS = "sparse channels"
TARGETS = (0.5, 0.9)
"""Shares of the way from P(counterfactual answer) on the prompts to that on their counterfactuals at which edits are
compared at equal effect."""
_OTHER = {"difference of means": "#9a7f4f", "difference of means, last token": "#7d6f9a", "logistic probe": "#b05a7a"}


class Effects(NamedTuple):
    """A set's mean vector at every token, at one norm, chosen on selection prompts."""

    factor: float
    """The norm of the edit, in units of the exact patch's; its mean vector is shorter."""
    p: float
    """Mean P(counterfactual answer) of evaluation prompts with that vector."""
    kl: float
    """KL(unsteered || steered) on other text, nats per token."""
    perplexity: float
    """Of text generated with it, by the unsteered model behind the counterfactual prompts."""
    pair_accuracy: dict[str, float]
    """Of the other tasks that the unsteered model solves."""

    @property
    def others(self) -> float | None:
        """Mean accuracy on the other tasks; None where none is solved."""
        accuracies = self.pair_accuracy.values()
        return sum(accuracies) / len(accuracies) if accuracies else None


class Row(NamedTuple):
    """One set of latents."""

    basis: str
    latents: int
    indices: list[int]
    """None for edits of one direction."""
    site: int
    where: Where
    p: list[float]
    """Mean P(counterfactual answer) on evaluation prompts at every norm of the ladder."""
    equal: float
    """The same at the equal norm."""
    reached: dict[str, float | None]
    """The norm at which P first goes each share of the way on selection prompts; None where none does."""
    p_fixed: list[float]
    """P with the mean vector at every token, on evaluation prompts, at every norm of the ladder."""
    kl: list[float]
    """KL on other text with that vector."""
    fixed: dict[str, Effects]
    """Where that vector's P first goes each share of the way on selection prompts; left out where it does not."""


class Bases(NamedTuple):
    """The comparison at one site for one task. `_asdict()`, rows too, is JSON."""

    task: str
    site: int
    prompts: int
    ladder: list[float]
    """Norms, in units of the exact patch's."""
    unit: dict[str, float]
    """The exact patch's norm by place."""
    equal: float
    """The equal norm, in the same units."""
    unsteered: float
    random_p95: list[float]
    """95th percentile of random directions on evaluation prompts."""
    rows: list[Row]
    coders: dict[str, dict[str, float]]
    """Of the trained ones: NMSE on held-out text, latents that it never uses, training tokens."""
    comparison: dict[str, Any]
    digest: str
    """Of the channel whose site it is."""

    def plain(self) -> dict[str, Any]:
        """As JSON takes it."""
        rows = [row._asdict() | {"fixed": {n: one._asdict() for n, one in row.fixed.items()}} for row in self.rows]
        return self._asdict() | {"rows": rows}

    @classmethod
    def from_metrics(cls, metrics: dict[str, Any], task: str, folder: Path) -> "Bases":
        """A task's comparison in metrics.json of a folder; ValueError for one of another version."""
        again = f"compare again: {command_again('compare-bases', metrics, task, folder)}"
        fields, place = metrics["bases"][task], f"{folder / 'metrics.json'}: the bases of {task}"
        if not isinstance(fields, dict) or set(fields) != set(cls._fields):
            raise ValueError(f"{place} are of another version or damaged, {again}")
        return typed(cls, fields, place, again)


def title(row: Row) -> str:
    """ "sparse channels, 4" or the name alone."""
    return f"{row.basis}, {row.latents}" if row.indices else row.basis


def verdict(result: Bases) -> str:
    """What the comparison says of the sparse channels, in words: how long an edit must be, and how quiet it is."""
    size = shown_size(result)
    own = next(row for row in result.rows if row.basis == OURS and row.latents == size)
    others = [row for row in result.rows if row.indices and row.latents == size and OURS not in row.basis]
    target = next((name for name in reversed([f"{t:g}" for t in TARGETS]) if own.reached[name]), None)
    if target is None:
        return f"{size} sparse channels never go {TARGETS[0]:g} of the way to the counterfactual's P at these norms."
    reach = {row.basis: row.reached[target] or 0.0 for row in others if row.reached[target]}
    norm = own.reached[target]
    said = f"{size} sparse channels go {target} of the way to the counterfactual's P at norm {norm:g}; so do "
    said += f"{len(reach)} of {len(others)} "
    said += "other bases" + (
        f", at {min(reach.values()):g} ({min(reach, key=reach.__getitem__)}) or more" * bool(reach)
    )
    quiet = {row.basis: row.fixed[target].kl for row in others if target in row.fixed}
    if target not in own.fixed:
        return f"{said}. As one vector at every token they never do."
    said += f". As one vector at every token they do with a KL of {own.fixed[target].kl:.3f} on other text"
    return said + (
        f", the quietest other, {min(quiet, key=quiet.__getitem__)}, with {min(quiet.values()):.3f}." if quiet else "."
    )


def _series(rows: Iterable[Row], field: str) -> list[Series]:
    rows = list(rows)
    names = list(dict.fromkeys(row.basis for row in rows if row.indices))
    drawn = []
    for row in rows:
        colour = depth_colour(names.index(row.basis), len(names)) if row.indices else _OTHER.get(row.basis, INK)
        style: Style = "dots" if row.basis == OURS else "line" if row.indices or colour == INK else "dash"
        drawn.append(Series(title(row), numbers(getattr(row, field)), colour, style))
    return drawn


def shown_size(result: Bases) -> int:
    """The number of latents that figures show: 4, or the nearest below it, or the smallest."""
    sizes = [row.latents for row in result.rows if row.indices]
    return max((n for n in sizes if n <= 4), default=min(sizes, default=1))


def _shown(result: Bases) -> list[Row]:
    return [row for row in result.rows if not row.indices or row.latents == shown_size(result)]


def effect_chart(result: Bases, chart_id: str = "bases") -> Chart:
    """P against norm."""
    series = _series(_shown(result), "p")
    series.append(Series("random directions, 95th percentile", numbers(result.random_p95), GREY, "dash"))
    return Chart(
        id=chart_id,
        title="Effect against norm",
        caption=f"{shown_size(result)} latents of each basis, found by one search, beside edits of one direction; site "
        f"{result.site}, {result.prompts} evaluation prompts. The equal norm is {result.equal:g}.",
        x=numbers(result.ladder),
        x_title="norm of the edit (1: the exact patch's)",
        y_title="P(counterfactual answer)",
        series=series,
        y_range=(0, 1),
    )


def kl_chart(result: Bases, chart_id: str = "bases-kl") -> Chart:
    """KL on other text against norm."""
    return Chart(
        id=chart_id,
        title="Side effect against norm",
        caption="KL from the unsteered model on held-out text with each set's mean vector at every token.",
        x=numbers(result.ladder),
        x_title="norm of the edit (1: the exact patch's)",
        y_title="KL, nats per token",
        series=_series(_shown(result), "kl"),
        scale="log",
    )


def draw_against_kl(axes: Axes, result: Bases) -> None:
    """P against KL, both with the mean vector at every token: up and to the left is good."""
    for row, series in zip(_shown(result), _series(_shown(result), "p"), strict=True):
        colour = "black" if series.colour == INK else series.colour
        style = {"dots": "-o", "dash": "--"}.get(series.style, "-")
        axes.plot(row.kl, row.p_fixed, style, color=colour, ms=3, label=series.name)
    axes.set(xscale="log", ylim=(-0.02, 1.02), xlabel="mean vector at every token: KL on other text, nats per token")


def plot_bases(result: Bases, path: Path) -> Path:
    """Effect against norm and against side effect, as a PNG; returns its path."""
    figure = Figure(figsize=(11.5, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_chart(left, effect_chart(result))
    left.set(xscale="log", ylim=(-0.02, 1.02))
    left.set_xticks([norm for norm in result.ladder if norm.as_integer_ratio()[0] == 1 or norm % 1 == 0], minor=False)
    left.set_xticks([], minor=True)
    left.xaxis.set_major_formatter("{x:g}")
    draw_against_kl(right, result)
    for axes in (left, right):
        axes.grid(alpha=0.25)
    figure.suptitle(f"{result.task}: bases of site {result.site}, {result.prompts} evaluation prompts", fontsize=10)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=7, frameon=False)
    return save_figure(figure, path)

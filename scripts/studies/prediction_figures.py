"""What prediction.py makes of predicted and measured changes: figures, tables and the picture."""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from bridges.sites import Site
from interventions.charts import BLUE, ORANGE
from interventions.figures import DEPTH, GREY, save_figure
from sparse_model.io.progress import progress_bar

EDITS = ("last", "all", "stream")
"""What is moved of a channel: its read at the last token, its read at every token, the stream at the last token."""
SETS = ("sets", "sets_stream")
"""Sets of channels at the last token, in the read and in the stream."""
PRIMARY = ("last", "top")
"""Edit and quantity that the claim stands on; settled before anything was measured."""
QUANTITIES = {"top": "the token predicted to move most", "next": "the text's next token", "vocabulary": "every token"}
"""Whose logits are compared."""
_FIGURES = ("correlation", "rank_correlation", "slope", "same_sign", "same_sign_of_large")
_DRAWS_OF_ALL = 20

Changes = Float[Tensor, "edit row vocab"]
"""Of the logits behind the last token, less their mean over the vocabulary: a constant changes nothing."""


def pairs_of(change: Changes, picked: Int[Tensor, "edit row"] | None) -> Tensor:
    """The changes that are compared, a row per edit; picked: a token for each, None for all."""
    return change.flatten(1) if picked is None else change.gather(-1, picked[..., None])[..., 0]


def top_token(predicted: Changes) -> Int[Tensor, "edit row"]:
    """The token whose logit the prediction moves most."""
    return predicted.abs().argmax(-1)


def agreement(x: Tensor, y: Tensor, *, ranks: bool = True) -> dict[str, float]:
    """How well predicted changes x foretell measured ones y.

    Signs are compared where a change is predicted at all, and in the quarter of the pairs with the largest predictions.
    """
    x, y = x.flatten().double(), y.flatten().double()
    said = x != 0
    large = said & (x.abs() >= x.abs().sort().values[-max(1, len(x) // 4)])
    return {
        "correlation": _correlation(x, y),
        **({"rank_correlation": _correlation(_ranks(x), _ranks(y))} if ranks else {}),
        "slope": float((x @ y) / (x @ x).clamp(min=1e-30)),
        "same_sign": _same_sign(x[said], y[said]),
        "same_sign_of_large": _same_sign(x[large], y[large]),
    }


def _same_sign(x: Tensor, y: Tensor) -> float:
    """A half where there is nothing to compare."""
    return float((x.sign() == y.sign()).double().mean()) if len(x) else 0.5


def _correlation(x: Tensor, y: Tensor) -> float:
    x, y = x - x.mean(), y - y.mean()
    return float((x @ y) / (x.norm() * y.norm()).clamp(min=1e-30))


def _ranks(x: Tensor) -> Tensor:
    """Ranks, equal values sharing theirs."""
    order = x.sort().values
    left, right = (torch.searchsorted(order, x, side=side) for side in ("left", "right"))
    return (left + right).double() / 2


def shuffled(site: Int[Tensor, " channel"], generator: torch.Generator) -> Int[Tensor, " channel"]:
    """A permutation of the channels within their sites: whose column each gets from a shuffled decoder."""
    order = torch.arange(len(site))
    for one in site.unique():
        members = (site == one).nonzero().flatten()
        order[members] = members[torch.randperm(len(members), generator=generator)]
    return order


def compare(
    site: Int[Tensor, " channel"],
    following: Int[Tensor, " row"],
    predicted: Changes,
    measured: Changes,
    draws: int,
    seed: int,
) -> dict[str, Any]:
    """All figures of one edit of single channels: over all sites and by site, with those of shuffled decoders."""
    chosen = {"top": top_token(predicted), "next": following.expand(len(site), -1), "vocabulary": None}
    result: dict[str, Any] = {}
    for name, picked in chosen.items():
        # All logits together are millions of pairs: fewer draws, and no ranks.
        ranks, count = picked is not None, draws if picked is not None else min(draws, _DRAWS_OF_ALL)
        x, generator = pairs_of(predicted, picked), torch.Generator().manual_seed(seed)
        null = [
            agreement(x, pairs_of(measured[shuffled(site, generator)], picked), ranks=ranks)
            for _ in progress_bar(range(count), desc=f"shuffled decoders, {name}", unit="decoder", leave=False)
        ]
        y = pairs_of(measured, picked)
        own = agreement(x, y, ranks=ranks)
        result[name] = own | {
            "pairs": x.numel(),
            "null": {figure: _spread([one[figure] for one in null], own[figure]) for figure in own},
            "sites": {str(i): agreement(x[site == i], y[site == i], ranks=ranks) for i in site.unique().tolist()},
        }
    sizes = [change.norm(dim=-1).flatten().double() for change in (predicted, measured)]
    ratio = float(sizes[1].sum() / sizes[0].sum())
    return result | {"size": {"rank_correlation": _correlation(*map(_ranks, sizes)), "ratio": ratio}}


def _spread(values: list[float], own: float) -> dict[str, float]:
    ordered = torch.tensor(values, dtype=torch.double)
    return {
        "mean": float(ordered.mean()),
        "p95": float(ordered.quantile(0.95)),
        "largest": float(ordered.max()),
        "p_value": (1 + int((ordered >= own).sum())) / (1 + len(values)),
    }


def compare_sets(
    size: Int[Tensor, " set"], site: Int[Tensor, " set"], predicted: Changes, measured: Changes
) -> dict[str, Any]:
    """Of sets of channels moved to their values on another text, by how many they are, and by site for all of them."""
    picked = top_token(predicted)
    x, y = pairs_of(predicted, picked), pairs_of(measured, picked)
    whole = int(size.max())
    return {
        "sizes": {str(n): agreement(x[size == n], y[size == n]) for n in size.unique().tolist()},
        "whole_by_site": {
            str(i): agreement(x[(size == whole) & (site == i)], y[(size == whole) & (site == i)])
            for i in site.unique().tolist()
        },
    }


def draw(
    path: Path, site: Int[Tensor, " channel"], predicted: Changes, measured: Changes, figures: dict[str, Any], seed: int
) -> Path:
    """Predicted against measured; the same through one shuffled decoder; and by the number of channels moved."""
    picked = top_token(predicted)
    x, y = pairs_of(predicted, picked), pairs_of(measured, picked)
    null = pairs_of(measured[shuffled(site, torch.Generator().manual_seed(seed))], picked)
    figure = Figure(figsize=(14, 4.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    own = figures[PRIMARY[0]][PRIMARY[1]]
    _scatter(left, site, x, y, f"one channel: correlation {own['correlation']:.2f}, same sign {own['same_sign']:.0%}")
    nulls = own["null"]
    title = f"null, one shuffled decoder; mean of all: {nulls['correlation']['mean']:.2f}, "
    _scatter(middle, site, x, null, title + f"{nulls['same_sign']['mean']:.0%}")
    middle.set_ylim(left.get_ylim())
    left.legend(fontsize=8, frameon=False, markerscale=4)
    for edit, line in zip(SETS, ("--", "-"), strict=True):
        sizes = figures[edit]["sizes"]
        for name, colour in (("correlation", BLUE), ("same_sign", ORANGE)):
            label = f"{name.replace('_', ' ')}, {'stream' if edit == 'sets_stream' else 'read'}"
            values = [sizes[n][name] for n in sizes]
            right.plot([int(n) for n in sizes], values, "o", ls=line, color=colour, label=label)
    right.set(xscale="log", ylim=(-0.05, 1.05), xlabel="channels moved to their values on another text")
    right.set_title("sets of channels, drawn at random", fontsize=10)
    right.grid(alpha=0.25)
    right.legend(fontsize=8, frameon=False)
    return save_figure(figure, path)


def _scatter(axes: Axes, site: Int[Tensor, " channel"], x: Tensor, y: Tensor, title: str) -> None:
    last = int(site.max())
    for i in site.unique().tolist():
        at, colour = site == i, DEPTH(i / max(1, last))
        label = Site(i, last // 2).label if last % 2 == 0 else str(i)
        axes.plot(x[at].flatten(), y[at].flatten(), ".", ms=2, alpha=0.35, color=colour, label=label)
    ends = torch.stack([x.min(), x.max()])
    axes.plot(ends, ends, lw=1, color=GREY, label="as predicted")
    axes.set(xscale="symlog", yscale="symlog", xlabel="change predicted by the sparse model, logits")
    axes.set_ylabel("change in the dense model, logits")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)


def markdown(figures: dict[str, Any], n_layers: int) -> str:
    """The figures as Markdown tables."""
    shown = [figure.replace("_", " ") for figure in _FIGURES]
    names = {"last": "read, last token", "all": "read, every token", "stream": "stream, last token"}
    rows, by_site = [["moved", "logit of", "pairs", *shown]], [["moved", "site", *shown]]
    for edit, moved in names.items():
        for quantity, words in QUANTITIES.items():
            own = figures[edit][quantity]
            rows.append([moved, words, f"{own['pairs']:,}", *(_cell(own, figure) for figure in _FIGURES)])
        for site, own in figures[edit][PRIMARY[1]]["sites"].items():
            by_site.append([moved, f"{site}, {Site(int(site), n_layers).label}", *_plain(own)])
    by_size = [["moved together", "channels", *shown]]
    for edit in SETS:
        moved = "stream, last token" if edit == "sets_stream" else "read, last token"
        for n, own in figures[edit]["sizes"].items():
            by_size.append([moved, n, *_plain(own)])
        for site, own in figures[edit]["whole_by_site"].items():
            by_size.append([moved, f"all, site {site}, {Site(int(site), n_layers).label}", *_plain(own)])
    sizes = [["moved", "rank correlation of the changes' sizes", "measured to predicted"]]
    for edit, moved in names.items():
        own = figures[edit]["size"]
        sizes.append([moved, f"{own['rank_correlation']:.2f}", f"{own['ratio']:.2f}"])
    return "\n\n".join(map(_table, (rows, by_site, by_size, sizes)))


def _plain(own: dict[str, float]) -> list[str]:
    return [f"{own[figure]:.2f}" for figure in _FIGURES]


def _cell(own: dict[str, Any], figure: str) -> str:
    if figure not in own:
        return ""
    null = own["null"][figure]
    return f"{own[figure]:.2f} (null {null['mean']:.2f}, largest {null['largest']:.2f})"


def _table(rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:]))

"""The report's training curves: metrics.jsonl as charts."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from bridges.run_folder import Run
from bridges.sites import all_sites
from interventions.charts import BLUE, INK, ORANGE, Chart, Series, depth_colour, numbers
from sparse_model.training.metrics_log import read_metrics

MOST_POINTS = 400
"""Points of a curve; longer ones are averaged, or a long run's report would be mostly curves."""

Curve = Float[np.ndarray, " step"]
_KLS = (
    ("kl_dense_to_sparse", "KL dense → sparse", BLUE),
    ("kl_sparse_to_dense", "KL sparse → dense", ORANGE),
    ("kl_mixed", "KL mixed paths", "#a0609f"),
)


class History(NamedTuple):
    """metrics.jsonl as columns."""

    step: Curve
    ce: Curve
    nmse_encode: Float[np.ndarray, "step site"]
    nmse_decode: Float[np.ndarray, "step site"]
    nonzero_fraction: Curve
    lr: Curve
    kl: dict[str, Curve]
    """The hybrids' KLs by name; NaN where none of the kind was drawn."""


def history(records: Sequence[dict]) -> History:
    """The columns of metrics.jsonl's records; neighbours are averaged where there are over `MOST_POINTS`.

    Raises KeyError or ValueError for records that lack a column or whose sites differ in number.
    """
    count = min(len(records), MOST_POINTS)

    def thinned(column: np.ndarray) -> np.ndarray:
        parts = np.array_split(column, count)
        # nanmean warns of a part without any number
        return np.stack([np.nanmean(p, 0) if np.isfinite(p).any() else np.full(p.shape[1:], np.nan) for p in parts])

    names = [name for name in History._fields if name != "kl"]
    columns = {name: thinned(np.array([record[name] for record in records], dtype=float)) for name in names}
    kl = {}
    for name, _, _ in _KLS:
        series = np.array([record.get(name, np.nan) for record in records], dtype=float)
        if np.isfinite(series).any():
            kl[name] = thinned(series)
    return History(**columns, kl=kl)


def training_charts(run: Run) -> list[Chart]:
    """Charts of RUN/metrics.jsonl; none where there is no such file. A damaged one is a ValueError that names it."""
    path = run.folder / "metrics.jsonl"
    records = read_metrics(path) if path.exists() else []
    if not records:
        return []
    try:
        past = history(records)
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): remove it to do without the training curves") from error
    labels = [site.label for site in all_sites(run.sparse.n_layers)]
    return [_terms(past), *_per_site(past, labels), *_schedules(past)]


def _chart(past: History, name: str, title: str, caption: str, y_title: str, series: list[Series]) -> Chart:
    return Chart(
        id=f"training-{name}",
        title=title,
        caption=caption,
        x=numbers(past.step.tolist(), 7),
        x_title="step",
        y_title=y_title,
        series=series,
        scale="log",
        both_scales=True,
        group="training",
    )


def _terms(past: History) -> Chart:
    curves = [
        ("sparse cross-entropy", past.ce, INK),
        ("NMSE encoders", past.nmse_encode.mean(1), "#3f9c8f"),
        ("NMSE decoders", past.nmse_decode.mean(1), "#8a9a3c"),
        *((title, past.kl[name], colour) for name, title, colour in _KLS if name in past.kl),
    ]
    return _chart(
        past,
        "terms",
        "Loss terms",
        "Unweighted, on training batches: cross-entropy and KLs in nats per token, NMSE as the mean over sites. The "
        "KLs are those of the hybrids that a step drew, hence their noise.",
        "nats, or NMSE",
        [Series(name, numbers(values.tolist()), colour) for name, values, colour in curves],
    )


def _per_site(past: History, labels: Sequence[str]) -> list[Chart]:
    charts = []
    for name, title in (("encode", "NMSE of the encoders"), ("decode", "NMSE of the decoders")):
        values: np.ndarray = getattr(past, f"nmse_{name}")
        series = [
            Series(label, numbers(values[:, column].tolist()), depth_colour(column, len(labels)))
            for column, label in enumerate(labels[: values.shape[1]])
        ]
        charts.append(_chart(past, name, title, "One curve per site; 1 is predicting the mean.", "NMSE", series))
    return charts


def _schedules(past: History) -> list[Chart]:
    kept = Series("share kept", numbers(past.nonzero_fraction.tolist()), BLUE)
    rate = Series("rate", numbers(past.lr.tolist()), BLUE)
    return [
        _chart(past, "kept", "Nonzero weights", "Share that the annealing schedule keeps.", "share", [kept]),
        _chart(past, "rate", "Learning rate", "Of the sparse model's optimizer.", "rate", [rate])._replace(
            scale="linear"
        ),
    ]

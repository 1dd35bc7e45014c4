"""The report of a run: one HTML file that needs nothing else.

It shows what the run folder holds: configuration, training curves, faithfulness per site, named channels with their
activation on code, and steering with its controls. A part that is missing is replaced by the command that adds it.
"""

import dataclasses
import json
import shlex
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, StrictUndefined, UndefinedError

from bridges.evaluate import SiteReport
from bridges.run import Run, open_run
from bridges.sites import all_sites
from interventions.channels import Channel, load_channels
from interventions.find import ENOUGH
from interventions.report_channels import channel_pages
from interventions.report_figures import Picture, history, steering_picture, training_pictures
from interventions.steering import Steering
from sparse_model.files import write_text
from sparse_model.metrics import read_metrics

REPORT = "report.html"

_TEMPLATE = "report.html.jinja"
_RECOVERED = "Share of the loss that the hybrid recovers: 0 is the site replaced by its mean, 1"


class Column(NamedTuple):
    """A column of the per-site table."""

    field: str
    title: str
    tip: str
    form: str = ".3f"
    heat: bool = False
    """Whether the cell is coloured: 0 not at all, 1 or more fully."""


COLUMNS = (
    Column("site", "site", "Residual site: 0 is the embedding, 2L the input of the unembedding", "d"),
    Column("label", "read by", "What reads the residual stream at this site", "s"),
    Column("nmse_encode", "NMSE encoder", "Error of the dense → sparse bridge; 1 predicts the mean", heat=True),
    Column("nmse_decode", "NMSE decoder", "Error of the sparse → dense bridge; 1 predicts the mean", heat=True),
    Column("explained_variance_encode", "EV encoder", "Explained variance: 1 − NMSE, but a constant error is free"),
    Column("explained_variance_decode", "EV decoder", "Explained variance: 1 − NMSE, but a constant error is free"),
    Column("kl_dense_to_sparse", "KL d→s", "KL(dense ‖ hybrid that starts dense, ends sparse), nats", heat=True),
    Column("kl_sparse_to_dense", "KL s→d", "KL(dense ‖ hybrid that starts sparse, ends dense), nats", heat=True),
    Column("ce_dense_to_sparse", "CE d→s", "Next-token loss of the dense → sparse hybrid, nats"),
    Column("ce_sparse_to_dense", "CE s→d", "Next-token loss of the sparse → dense hybrid, nats"),
    Column("recovered_dense_to_sparse", "recovered d→s", f"{_RECOVERED} the sparse model alone"),
    Column("recovered_sparse_to_dense", "recovered s→d", f"{_RECOVERED} the dense model alone"),
    Column("dead_reads", "dead reads", "Channels of the sparse read that are zero at every held-out token", "d"),
)
"""All fields of `SiteReport`."""


class Card(NamedTuple):
    """A key figure."""

    title: str
    value: str
    note: str


class SteeringPage(NamedTuple):
    """One task's strength curves."""

    result: Steering
    picture: Picture
    rows: list[tuple[str, list[float]]]
    """The curves by name, controls included."""
    two_way: list[tuple[str, list[float]]]
    """The channels' curves normalised over the two answers."""


def write_report(folder: Path) -> Path:
    """Write RUN/report.html from what the run folder holds; returns its path.

    Raises what `bridges.run.open_run` raises for a folder that is no finished run, and ValueError, naming the file,
    for a metrics.jsonl, metrics.json or channels.json that is damaged.
    """
    run = open_run(folder)
    metrics = _metrics(run.folder)
    channels = load_channels(run.folder)
    steering = _steering_pages(run.folder, metrics)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"fixed": format, "count": "{:,}".format, "json_text": _json_text}
    template = environment.from_string(files("interventions").joinpath(_TEMPLATE).read_text(encoding="utf-8"))
    try:
        html = template.render(
            run=run,
            command=f"--run {shlex.quote(str(folder))}",
            config=dataclasses.asdict(run.config),
            metrics=metrics,
            columns=COLUMNS,
            cards=_cards(metrics),
            means=_means(metrics),
            curves=_training_pictures(run),
            pages=channel_pages(run, channels),
            steering=steering,
            warnings=warnings(run, metrics, channels, [page.result for page in steering]),
        )
    except UndefinedError as error:
        raise ValueError(f"metrics.json or channels.json in {run.folder} is incomplete: {error}") from error
    path = run.folder / REPORT
    write_text(path, html)
    return path


def _cards(metrics: dict[str, Any]) -> list[Card]:
    if "sites" not in metrics:
        return []
    dense, sparse, mean = metrics["dense"]["ce"], metrics["sparse"], _means(metrics)
    over = f"mean over {len(metrics['sites'])} sites"
    return [
        Card("dense loss", f"{dense:.3f}", "nats per held-out token"),
        Card("sparse loss", f"{sparse['ce']:.3f}", f"{sparse['ce'] - dense:+.3f} against dense"),
        Card("nonzero weights", f"{sparse['nonzeros']:,}", f"1 in {1 / sparse['nonzero_fraction']:.3g}"),
        Card("NMSE to sparse", f"{mean['nmse_encode']:.3f}", over),
        Card("NMSE to dense", f"{mean['nmse_decode']:.3f}", over),
        Card("KL to sparse", f"{mean['kl_dense_to_sparse']:.3f}", f"nats, {over}"),
        Card("KL to dense", f"{mean['kl_sparse_to_dense']:.3f}", f"nats, {over}"),
    ]


def _means(metrics: dict[str, Any]) -> dict[str, float]:
    """Means over the sites of the per-site table's real-valued columns."""
    sites = metrics.get("sites", [])
    fields = [column.field for column in COLUMNS if column.form == ".3f"]
    return {field: sum(site[field] for site in sites) / len(sites) for field in fields} if sites else {}


def _json_text(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


def warnings(run: Run, metrics: dict[str, Any], channels: dict[str, Channel], steering: list[Steering]) -> list[str]:
    """What a reader should know before trusting the figures."""
    found = []
    if "sites" in metrics:
        found += _model_warnings(run, metrics)
    for task, baseline in metrics.get("dense_task", {}).items():
        if baseline["pair_accuracy"] < 0.9:
            found.append(
                f"The dense model does not solve {task}: it gets both prompts of only "
                f"{baseline['pair_accuracy']:.0%} of the pairs right, so there is little to steer."
            )
    for channel in channels.values():
        found += _channel_warnings(channel)
    for result in steering:
        found += _steering_warnings(result, channels)
    return found


def _channel_warnings(channel: Channel) -> list[str]:
    count, share = len(channel.indices), channel.selection.get("share", {})
    found = [f"Channel {channel.name} needs {count} indices, more than 4."] if count > 4 else []
    carried = share.get(str(count), 1.0)
    if carried < ENOUGH:
        enough = next((n for n, value in share.items() if value >= ENOUGH), None)
        more = f"{enough} would carry {share[enough]:.0%}" if enough else "nor does any larger set that was tried"
        found.append(
            f"Channel {channel.name}: its {count} ind{'ices' if count > 1 else 'ex'} do not carry {ENOUGH:.0%} of the "
            f"effect of the whole read but {carried:.0%} ({more})."
        )
    return found


def _steering_warnings(result: Steering, channels: dict[str, Channel]) -> list[str]:
    found = []
    p95 = result.random_p95[-1]
    if p95 > 0.1:
        found.append(
            f"{result.task}: at full strength random directions of the same norm reach P = {p95:.3f} (95th "
            "percentile), above 0.1: the edit is large enough to do something in any direction."
        )
    for channel in channels.values():
        curve = result.channels.get(str(len(channel.indices)))
        if channel.selection.get("task") == result.task and curve is not None and curve[-1] <= p95:
            found.append(
                f"{result.task}: at full strength channel {channel.name} reaches P = {curve[-1]:.3f}, no more than "
                f"the 95th percentile of random directions, {p95:.3f}."
            )
    return found


def _model_warnings(run: Run, metrics: dict[str, Any]) -> list[str]:
    found = []
    dead_reads = sum(site["dead_reads"] for site in metrics["sites"])
    neurons = run.sparse.n_layers * run.config.sparse.d_mlp
    dead = sum(n for name, n in metrics["sparse"]["dead_channels"].items() if name.endswith("mlp.hook_post"))
    if dead:
        found.append(f"{dead} of the sparse model's {neurons} MLP neurons are zero at every held-out token.")
    if dead_reads:
        reads = len(metrics["sites"]) * run.sparse.d_model
        found.append(f"{dead_reads} of {reads} residual-read channels are zero at every held-out token.")
    for way, words in (("dense_to_sparse", "dense → sparse"), ("sparse_to_dense", "sparse → dense")):
        weak = [site["label"] for site in metrics["sites"] if not site[f"recovered_{way}"] >= 0.8]
        if weak:
            found.append(f"The {words} hybrid recovers less than 0.8 of the loss at {', '.join(weak)}.")
    return found


def _metrics(folder: Path) -> dict[str, Any]:
    path = folder / "metrics.json"
    if not path.exists():
        return {}
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        metrics["sites"] = [SiteReport(**site)._asdict() for site in metrics["sites"]] if "sites" in metrics else None
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): evaluate the run again with train_bridge.py --resume"
        ) from error
    return {name: part for name, part in metrics.items() if part is not None}


def _training_pictures(run: Run) -> list[Picture]:
    path = run.folder / "metrics.jsonl"
    records = read_metrics(path) if path.exists() else []
    if not records:
        return []
    try:
        past = history(records)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): remove it to do without the training curves") from error
    return training_pictures(past, [site.label for site in all_sites(run.sparse.n_layers)])


def _steering_pages(folder: Path, metrics: dict[str, Any]) -> list[SteeringPage]:
    pages = []
    for at, (task, fields) in enumerate(metrics.get("steering", {}).items()):
        try:
            result = Steering(**fields)
        except TypeError as error:
            raise ValueError(
                f"{folder / 'metrics.json'}: steering of {task} does not read ({error}): run scripts/steer.py again"
            ) from error
        rows = [
            *_named(result.channels),
            ("random directions, mean", result.random_mean),
            ("random directions, 5th percentile", result.random_p05),
            ("random directions, 95th percentile", result.random_p95),
            ("random channels, mean", result.random_channels_mean),
            ("random channels, 95th percentile", result.random_channels_p95),
            ("difference of means", result.difference_of_means),
        ]
        picture = steering_picture(result, f"steering{at}")
        pages.append(SteeringPage(result, picture, rows, _named(result.two_way)))
    return pages


def _named(curves: dict[str, list[float]]) -> list[tuple[str, list[float]]]:
    return [(f"{n} sparse channel{'s' * (n != '1')}", curve) for n, curve in curves.items()]

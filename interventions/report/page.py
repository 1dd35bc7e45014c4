"""Putting the report together: one HTML file whose policy forbids it to fetch anything.

Style and script are part of the page, and its Content-Security-Policy names them by their digests: nothing else runs,
no style attribute applies, and strings cannot become markup (trusted types).
"""

import base64
import dataclasses
import hashlib
import json
import shlex
from collections.abc import Iterable, Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup, escape

from bridges.run_folder import Run, open_run
from interventions.bundle.bundle import load_dense
from interventions.bundle.channels import Channel, load_channels
from interventions.charts import Chart
from interventions.circuits.circuit import failed_circuits
from interventions.circuits.task_scores import SOLVED
from interventions.report import overview
from interventions.report.bases import bases_pages
from interventions.report.channels import channel_pages
from interventions.report.circuits import CircuitPage, circuit_pages, load_circuits
from interventions.report.importance import EDGE_PAIRS
from interventions.report.labels import orphan_labels
from interventions.report.metrics import checked_metrics
from interventions.report.sites import COLUMNS, GROUPS, hybrid_chart, site_means, site_rows
from interventions.report.steering import CONTROLS, steering_pages
from interventions.report.tasks import (
    changed_files,
    counting_words,
    distance_rows,
    size_ratio,
    size_warnings,
    task_rows,
)
from interventions.report.texts import HeldOut, blocks, held_out, visible
from interventions.report.training import training_charts
from interventions.steering.headline import headline
from interventions.tasks.reports import SOLVED_BY_COUNTING
from sparse_model.io.atomic import write_text
from sparse_model.io.commands import command_line

REPORT = "report.html"
HELD_OUT_TOKENS = 16_384
"""Held-out tokens in which examples are looked for."""

_STYLES = ("uPlot.min.css", "page.css", "circuit.css", "print.css")
_LIBRARY_LICENCE = "uPlot.LICENSE.txt"
_SCRIPTS = ("uPlot.iife.min.js", "dom.js", "charts.js", "labels.js", "panel.js", "picture.js", "explorer.js", "main.js")


def write_report(folder: Path, device: str = "cpu") -> Path:
    """Write RUN/report.html from what the run folder holds; returns its path.

    Raises what `bridges.run_folder.open_run` raises for a folder that is no finished run, and ValueError, naming the
    file, for a metrics.jsonl, metrics.json or channels.json that is damaged. A circuit that does not read is left out,
    and the report says so.
    """
    run = open_run(folder, device)
    shown = _contents(run)
    parts = {
        "command": command_line("report", "--run", folder),
        "sections": [(name, bool(shown[part])) for name, part in _SECTIONS],
        "absent": absent_parts(shown, folder),
    }
    html = _environment().get_template("report.html.jinja").render(**parts, **shown, **_assets())
    path = run.folder / REPORT
    write_text(path, html)
    return path


_SECTIONS = (
    ("training", "training"),
    ("bridges", "site_rows"),
    ("steering", "steering"),
    ("bases", "bases"),
    ("tasks", "tasks"),
    ("circuits", "circuits"),
    ("channels", "channels"),
)
"""The page's sections, and which of its contents fills each; one that nothing fills is left out."""


def absent_parts(shown: Mapping[str, Any], folder: Path) -> list[tuple[str, str]]:
    """What the report does not have yet, and the command that adds it; none adds training curves."""
    sizes = not shown["tasks"] or "circuit_size" in shown["metrics"]
    parts = [
        (shown["site_rows"], "How faithful the bridges are:", ("evaluate", "--run", folder)),
        (shown["channels"], "A named channel:", ("find-channel", "--run", folder)),
        (shown["steering"], "What steering does, with its controls:", ("steer", "--run", folder)),
        (shown["bases"], "The channels beside other bases:", ("compare-bases", "--run", folder)),
        (shown["tasks"], "Which tasks the models solve:", ("solved-tasks", folder)),
        (shown["circuits"], "A circuit, with its controls:", ("find-circuit", "--run", folder, "--controls")),
    ]
    absent = [(what, command_line(*words)) for there, what, words in parts if not there]
    if not sizes:
        study = shlex.join(["python", "scripts/studies/circuit_size.py", str(folder)])
        absent.append(("The sizes of the circuits, in a clone of the repository:", study))
    return absent


def _contents(run: Run) -> dict[str, Any]:
    """What the templates show, by the names that they give it."""
    metrics = checked_metrics(run.folder, run.bridges.n_sites)
    channels = load_channels(run.folder)
    steering, bases = steering_pages(run.folder, metrics), bases_pages(run.folder, metrics)
    training = training_charts(run)
    loaded = load_circuits(run)
    documents = held_out(run, HELD_OUT_TOKENS) if channels or loaded.circuits else HeldOut("", [])
    device = run.bridges.rms_sparse.device
    pages = channel_pages(run, load_dense(run.folder, device), channels, documents) if channels else []
    rows = blocks(documents, run.config.sparse.n_ctx) if loaded.circuits else None
    circuits = [] if rows is None else list(circuit_pages(run, loaded.circuits, channels, rows))
    hybrids = hybrid_chart(metrics)
    histograms = [page.histogram for page in pages if page.histogram]
    charts = [*training, *hybrids, *(page.chart for page in steering), *histograms]
    charts += [chart for page in bases for chart in page.charts]
    warnings = overview.warnings(run, metrics, channels, [page.result for page in steering], circuits)
    orphans = orphan_labels(run.folder, {page.key for page in circuits})
    records = _records(metrics, channels, circuits)
    return {
        "run": run,
        "config": dataclasses.asdict(run.config),
        "metrics": metrics,
        "findings": [found for page in steering if (found := headline(page.result, channels))],
        "cards": overview.cards(metrics),
        "warnings": [*warnings, *size_warnings(metrics), *changed_files(records), *loaded.problems, *orphans],
        "training": training,
        "site_columns": COLUMNS,
        "site_groups": GROUPS,
        "site_rows": site_rows(metrics),
        "site_means": site_means(metrics),
        "hybrids": hybrids,
        "steering": steering,
        "bases": bases,
        "controls": CONTROLS,
        "tasks": task_rows(metrics, failed_circuits(run.folder)),
        "distances": distance_rows(metrics),
        "counting": counting_words(metrics),
        "solved": SOLVED,
        "solved_by_counting": SOLVED_BY_COUNTING,
        "size_ratio": size_ratio(metrics),
        "circuits": circuits,
        "edge_pairs": EDGE_PAIRS,
        "held_out": documents,
        "channels": pages,
        "data": _data(run, charts, circuits),
    }


def _records(
    metrics: dict[str, Any], channels: Mapping[str, Channel], circuits: Iterable[CircuitPage]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Tasks with where their prompts came from, as the run's results say."""
    yield from metrics.get("task_prompts", {}).items()
    yield from ((name, found.get("prompts", {})) for name, found in metrics.get("tasks", {}).items())
    yield from ((str(c.selection.get("task")), c.selection.get("prompts", {})) for c in channels.values())
    yield from ((page.circuit.task, page.circuit.prompts) for page in circuits)


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("interventions.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"fixed": _fixed, "count": "{:,}".format, "json_text": _json_text, "code": _code}
    return environment


def _fixed(value: int | float, form: str) -> str:
    """A number with a true minus sign."""
    return format(value, form).replace("-", "−")


def _code(text: str) -> Markup:
    """Text whose parts in backticks are code."""
    parts = [escape(part) for part in text.split("`")]
    return Markup("").join(
        Markup("<code>{}</code>").format(p) if position % 2 else p for position, p in enumerate(parts)
    )


def _json_text(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


def _data(run: Run, charts: Iterable[Chart], circuits: list[CircuitPage]) -> Markup:
    """What the page's script draws, as JSON in which no markup can begin or end."""
    ids = sorted(set().union(*(page.tokens for page in circuits)))
    data = {
        "name": run.folder.name,
        "charts": {chart.id: chart.plain() for chart in charts},
        "circuits": {page.key: page.data for page in circuits},
        "tokens": {token: visible(run.tokenizer, token) for token in ids},
    }
    return htmlsafe_json_dumps(data, separators=(",", ":"), allow_nan=False)


def _assets() -> dict[str, Any]:
    """Style and script of the page, and the policy that lets in only them."""
    style, script, early = (_joined(names) for names in (_STYLES, _SCRIPTS, ("theme.js",)))
    script = f"\n/*{_joined((_LIBRARY_LICENCE,))}*/{script}"  # it asks to go wherever the library goes
    policy = "; ".join(
        [
            "default-src 'none'",
            f"style-src {_digest(style)}",
            f"script-src {_digest(early)} {_digest(script)}",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        ]
    )
    return {"policy": policy, "style": Markup(style), "script": Markup(script), "early": Markup(early)}


def _joined(names: Iterable[str]) -> str:
    folder = files("interventions.report").joinpath("static")
    return "\n" + "\n".join(folder.joinpath(name).read_text(encoding="utf-8") for name in names)


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

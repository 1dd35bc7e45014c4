"""Edges against worst-case loss: what an adversary does to ever larger circuits of a run's sparse and dense model.

Prints a Markdown table and draws RUN/worst_case.png. A curve that is in RUN/circuits/worst_case already, of the same
weights and settings, is not made again.

Example:
    python scripts/studies/worst_case.py runs/demo --task single_double_quote --outside random
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from bridges.packaged import find_run
from bridges.run_folder import fingerprint, open_run
from interventions.circuits.circuit import FOLDER
from interventions.circuits.node_model import as_nodes
from interventions.circuits.prune_config import PruneConfig
from interventions.circuits.pruning import reference_ablation
from interventions.circuits.worst_case import CurvePoint, plot_worst_case, worst_case_curve
from interventions.cli.options import report_errors
from interventions.tasks.catalogue import get_task
from sparse_model.data.prepare import prepare_corpus
from sparse_model.io.atomic import check_writable, write_text


@dataclass(frozen=True, kw_only=True)
class Options:
    """Edges against worst-case loss of a run's sparse and dense model."""

    run: tyro.conf.Positional[str]
    """Run folder."""
    task: str = "single_double_quote"
    """Task."""
    out: str | None = None
    """Folder of curves and figure; unset: the run's."""
    config: Annotated[PruneConfig, tyro.conf.arg(name="")] = field(default_factory=PruneConfig)


def main(options: Options) -> None:
    if options.out:
        check_writable(Path(options.out))
    run = open_run(find_run(options.run))
    out = Path(options.out) if options.out else run.folder
    task = get_task(options.task, run.tokenizer, max_tokens=run.config.sparse.n_ctx)
    blocks, curves = None, {}
    for label in ("sparse", "dense"):
        key = json.dumps([fingerprint(run), options.task, label, asdict(options.config)], sort_keys=True)
        name = f"{options.task}-{label}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.json"
        path = out / FOLDER / "worst_case" / name
        if not path.exists():
            if blocks is None:
                blocks = prepare_corpus(run.config, run.tokenizer, samples=run.samples).val
            model = as_nodes(getattr(run, label))
            ablation = reference_ablation(model, blocks, options.config)
            points = worst_case_curve(model, task, ablation, options.config, progress=True)
            write_text(path, json.dumps([point._asdict() for point in points], indent=1) + "\n")
        curves[label] = [CurvePoint(**point) for point in json.loads(path.read_text(encoding="utf-8"))]
    print(table(curves))
    print(f"drawn: {plot_worst_case(curves, options.config.target_loss, out / 'worst_case.png')}")


def table(curves: dict[str, list[CurvePoint]]) -> str:
    """The curves as Markdown."""
    lines = [
        "| model | nodes | edges | all others ablated, calibrated | as it is | p = .25 | worst subset |",
        "|---|---|---|---|---|---|---|",
    ]
    for label, points in curves.items():
        for point in points:
            losses = " | ".join(f"{loss:.3f}" for loss in point[2:])
            lines.append(f"| {label} | {point.nodes} | {point.edges} | {losses} |")
    return "\n".join(lines)


if __name__ == "__main__":
    with report_errors():
        main(tyro.cli(Options))

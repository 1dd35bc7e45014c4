"""Compare settings of pruning over tasks and runs: the default, the paper's centres, draws from the search's ranges.

Each pruning is scored on further selection prompts, never on evaluation prompts, and kept in RUN/circuits/settings:
killed, the command goes on where it stopped. It prints a Markdown table, the best setting first: those that reach the
target on all prunings before those that do not, then by the geometric mean of edges.

Example:
    python scripts/studies/prune_settings.py runs/demo runs/other --tasks single_double_quote with_as --draws 8
"""

import hashlib
import json
import math
import random
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from bridges.packaged import find_run
from bridges.run_folder import fingerprint, open_run
from interventions.circuits.circuit import FOLDER
from interventions.circuits.node_model import as_nodes
from interventions.circuits.prune_config import PruneConfig
from interventions.circuits.pruning import reference_ablation
from interventions.circuits.pruning_seeds import prune_seeds
from interventions.circuits.settings_search import RANGES
from interventions.cli.options import report_errors
from interventions.tasks.catalogue import get_task
from sparse_model.config import require
from sparse_model.data.prepare import prepare_corpus
from sparse_model.io.atomic import check_writable, write_text
from sparse_model.io.progress import progress_bar

PAPER = {"k_coef": 1e-4, "lr": 3e-3, "init_noise_scale": 1e-2, "init_noise_bias": 1e-1, "weight_decay": 1e-3}
"""Centres of the paper's search."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compare settings of pruning over tasks and runs."""

    runs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Run folders, or names of packaged bundles."""
    tasks: tuple[str, ...] = ("single_double_quote",)
    """Tasks that every run's sparse model solves."""
    draws: int = 8
    """Settings drawn from the ranges of find-circuit --search, besides the default and the paper's centres."""
    out: str | None = None
    """Folder of the prunings; unset: RUN/circuits/settings of each run."""
    config: Annotated[PruneConfig, tyro.conf.arg(name="")] = field(default_factory=PruneConfig)

    def __post_init__(self) -> None:
        require(len(self.runs) > 0, "runs", self.runs, "name at least one run folder")
        require(self.draws >= 0, "draws", self.draws, "must not be negative")


def settings(base: PruneConfig, draws: int) -> dict[str, PruneConfig]:
    """By name: the default, the paper's centres, its price of a node alone, random draws even in the logarithm."""
    rng = random.Random(base.seed)
    named = {"default": base, "paper's centres": replace(base, **PAPER), "k_coef 1e-4": replace(base, k_coef=1e-4)}
    for i in range(draws):
        drawn = {name: math.exp(rng.uniform(*map(math.log, ends))) for name, ends in RANGES.items()}
        drawn["beta2"] = 1 - drawn["beta2"]
        named[f"draw {i}"] = replace(base, **drawn)
    return named


def main(options: Options) -> None:
    if options.out:
        check_writable(Path(options.out))
    compared = settings(options.config, options.draws)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in compared}
    for folder in options.runs:
        run = open_run(find_run(folder))
        model, blocks = as_nodes(run.sparse), None
        for task in options.tasks:
            bound = get_task(task, run.tokenizer, max_tokens=run.config.sparse.n_ctx)
            for name, config in progress_bar(compared.items(), desc=f"{run.folder.name}, {task}", unit="pruning"):
                key = json.dumps([fingerprint(run), task, asdict(config)], sort_keys=True)
                out = Path(options.out) if options.out else run.folder / FOLDER / "settings"
                path = out / f"{task}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.json"
                if not path.exists():
                    if blocks is None:
                        blocks = prepare_corpus(run.config, run.tokenizer, samples=run.samples).val
                    began, ablation = time.process_time(), reference_ablation(model, blocks, config)
                    (pruning,) = prune_seeds(model, bound, ablation, config, 1)
                    figures = {"edges": pruning.edges, "nodes": pruning.pruned.k, "loss": pruning.fresh_loss}
                    write_text(path, json.dumps(figures | {"cpu_seconds": time.process_time() - began}) + "\n")
                results[name].append(json.loads(path.read_text(encoding="utf-8")))
    print(table(compared, results, options.config.target_loss))


def table(compared: dict[str, PruneConfig], results: dict[str, list[dict[str, Any]]], target: float) -> str:
    """The settings as Markdown, the best first."""

    def merit(name: str) -> tuple[int, float]:
        return -_reached(results[name], target), _geometric_mean(results[name])

    heads = ["setting", *RANGES, "edges", "reach the target", "highest loss", "CPU s"]
    lines = [heads, ["---"] * len(heads)]
    for name in sorted(compared, key=merit):
        runs = results[name]
        lines.append(
            [
                name,
                *(f"{getattr(compared[name], setting):.3g}" for setting in RANGES),
                f"{_geometric_mean(runs):.1f}",
                f"{_reached(runs, target)} of {len(runs)}",
                f"{max(pruning['loss'] for pruning in runs):.3f}",
                f"{sum(pruning['cpu_seconds'] for pruning in runs):.0f}",
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _reached(runs: list[dict[str, Any]], target: float) -> int:
    return sum(pruning["loss"] <= target for pruning in runs)


def _geometric_mean(runs: list[dict[str, Any]]) -> float:
    return math.exp(sum(math.log(max(1, pruning["edges"])) for pruning in runs) / len(runs))


if __name__ == "__main__":
    with report_errors():
        main(tyro.cli(Options))

"""Compare which hybrids to train on, at equal CPU time: all sites, one site per direction, or random mixed paths.

A dense model is trained once; every objective then gets as many steps as fit into the same CPU seconds, on every seed,
and is searched, steered and evaluated by the usual scripts. Killed, it goes on where it stopped.

Examples:
    python scripts/studies/compare_objectives.py --out runs/objectives
    python scripts/studies/compare_objectives.py --layers 4 --seconds 500 --out runs/objectives-4
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from summary import figures

from bridges.config import PRESETS, RunConfig
from bridges.dense import DenseModel
from bridges.joint_trainer import JointTrainer
from bridges.loading import load_lm
from bridges.run_folder import new_bridges
from interventions.cli.options import report_errors
from sparse_model.io.atomic import check_writable
from sparse_model.io.progress import progress_bar
from sparse_model.model.transformer import SparseTransformer

OBJECTIVES = {
    "one site": {"sites": 1},
    "all sites": {"sites": "all"},
    "two paths": {"paths": 2},
}
"""Settings of `bridge` by name."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compare which hybrids to train on, at equal CPU time."""

    out: str = "runs/objectives"
    """Folder of the runs."""
    layers: int = 2
    """Layers of both models."""
    seconds: float = 250
    """CPU seconds of each joint training."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the joint training."""
    jobs: int = 1
    """Runs side by side, one thread each."""


def cpu_seconds_per_step(config: RunConfig, dense: Path, steps: int = 60) -> float:
    """CPU seconds of a training step, on random tokens."""
    torch.set_num_threads(1)
    blocks = torch.randint(config.sparse.d_vocab, (4 * config.batch_size, config.sparse.n_ctx))
    model = DenseModel(load_lm(dense))
    with tempfile.TemporaryDirectory() as folder:
        bridges = new_bridges(config, model.d_model)
        trainer = JointTrainer(config, model, SparseTransformer(config.sparse), bridges, blocks, Path(folder))
        for step in range(steps + 10):
            if step == 10:
                start = time.process_time()
            trainer.train_step()
        return (time.process_time() - start) / steps


def call(*arguments: str) -> None:
    """Run one of the commands; its output is shown only when it fails."""
    command = [sys.executable, "-m", "interventions.cli", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}")


def run_one(options: Options, objective: str, steps: int, seed: int) -> None:
    """Train, search and steer one run, unless that is done."""
    folder = Path(options.out) / f"{objective.replace(' ', '-')}-seed{seed}"
    flags = [f"--bridge.{name}={value}" for name, value in OBJECTIVES[objective].items()]
    depth = ["--sparse.n-layers", str(options.layers)]
    dense = ["--dense", str(Path(options.out) / "dense" / "dense")]
    if not (folder / "metrics.json").exists():
        run = ["--run", str(folder), "--steps", str(steps), "--seed", str(seed), "--resume"]
        call("train-bridge", "demo", *dense, *depth, *flags, *run)
    if not (folder / "steering.png").exists():
        call("find-channel", "--run", str(folder))
        call("steer", "--run", str(folder), "--anyway")


def report(options: Options, steps: dict[str, int]) -> None:
    """Print medians over the seeds, with ranges, as a Markdown table."""
    rows: dict[str, dict[str, list[float]]] = {}
    for objective in OBJECTIVES:
        for seed in options.seeds:
            folder = Path(options.out) / f"{objective.replace(' ', '-')}-seed{seed}"
            measured = figures(folder, "single_double_quote")
            for name, value in measured.items():
                rows.setdefault(name, {}).setdefault(objective, []).append(value)
    print(f"| {options.layers} layers, {options.seconds:g} CPU s | " + " | ".join(OBJECTIVES) + " |")
    print("|---" * (len(OBJECTIVES) + 1) + "|")
    print("| steps | " + " | ".join(str(steps[o]) for o in OBJECTIVES) + " |")
    for name, values in rows.items():
        cells = [f"{statistics.median(v):.4g} ({min(v):.3g} to {max(v):.3g})" for v in values.values()]
        print(f"| {name} | {' | '.join(cells)} |")


def main(options: Options) -> None:
    out = Path(options.out)
    check_writable(out)
    dense = out / "dense" / "dense"
    if not (dense / "config.json").exists():
        call("train-dense", "demo", "--sparse.n-layers", str(options.layers), "--run", str(out / "dense"), "--resume")
    path = out / "steps.json"
    if not path.exists():
        base = PRESETS["demo"][1]
        base = replace(base, sparse=replace(base.sparse, n_layers=options.layers))
        seconds = {
            name: cpu_seconds_per_step(replace(base, bridge=replace(base.bridge, **changes)), dense)
            for name, changes in OBJECTIVES.items()
        }
        path.write_text(json.dumps({name: round(options.seconds / value) for name, value in seconds.items()}))
    steps = json.loads(path.read_text())
    print(f"steps in {options.seconds:g} CPU seconds: {steps}")
    todo = [(objective, seed) for seed in options.seeds for objective in OBJECTIVES]
    with ThreadPoolExecutor(options.jobs) as pool:
        calls = pool.map(lambda job: run_one(options, job[0], steps[job[0]], job[1]), todo)
        list(progress_bar(calls, total=len(todo), unit="run"))
    report(options, steps)


if __name__ == "__main__":
    with report_errors():
        main(tyro.cli(Options, description=__doc__))

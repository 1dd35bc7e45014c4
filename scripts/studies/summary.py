"""Put the figures of several runs side by side, as a Markdown table with medians.

Example:
    python scripts/studies/summary.py runs/demo runs/demo-1 runs/demo-2
"""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from interventions.cli.options import report_errors
from interventions.steering.result import Steering, named_curves, place_of, searches, set_name, strength_of, value_at
from sparse_model.config import require
from sparse_model.io.commands import command_line


@dataclass(frozen=True, kw_only=True)
class Options:
    """Put the figures of several runs side by side, as a Markdown table with medians."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Run folders that were trained, searched and steered."""
    task: str = "single_double_quote"
    """Task whose steering is shown."""


def read_steering(folder: Path, task: str) -> tuple[dict[str, Any], Steering]:
    """A run's metrics and its steering of a task; what is missing is an error that says which command makes it."""
    path = folder / "metrics.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist: train the run with {command_line('train-bridge', '--run', folder)}"
        )
    metrics = json.loads(path.read_text())
    if task not in metrics.get("steering", {}):
        raise ValueError(f"{path} has no steering of {task}: run sparse-bridges find-channel and steer on it")
    return metrics, Steering.from_metrics(metrics, task, folder)


def steering_figures(result: Steering, strength: float | None = None) -> dict[str, float]:
    """P(counterfactual answer) unsteered and steered, by edit, and the side effects of the edits.

    At one strength; unset: each set, and the difference of means, at its chosen strength, the controls at their set's.
    What belongs to no set is read at strength 1, and left out where that was not measured.
    """
    rows = {}
    if result.strength[0] == 0:
        rows["P(counterfactual answer), unsteered"] = next(iter(result.channels.values()))[0]
    curves, sets = named_curves(result), [set_name(n) for n in result.channels]
    for name in (*sets, "difference of means"):
        if strength is None:
            rows[f"{name}, strength"] = strength_of(result, name)
        rows[f"steered, {name}" if name in sets else name] = value_at(result, name, strength)
    for name in curves:
        at = place_of(result, strength_of(result, name, strength))
        if at is not None and name not in (*sets, "difference of means"):
            rows[name] = curves[name][at]
    for row in searches(result):
        title = f"{set_name(row.size)} searched for at one norm"
        rows[title] = row.ours
        rows[f"{title}, {row.control}, median"] = row.median
        rows[f"{title}, {row.control}, largest"] = row.largest
        rows[f"{title}, {row.control}, p"] = row.p_value
    for name, effects in result.side_effects.items():
        if name != "unsteered":
            rows[f"KL on other text, {set_name(name)}"] = effects["kl"]
    return rows


def figures(folder: Path, task: str) -> dict[str, float]:
    """The figures of one run. Raises what `read_steering` raises."""
    metrics, result = read_steering(folder, task)
    sites, dense = metrics["sites"], metrics["dense_task"][task]

    def mean(name: str) -> float:
        return statistics.mean(site[name] for site in sites)

    return {
        "dense pair accuracy": dense["pair_accuracy"],
        "dense P(right)": dense["p_right"],
        "dense CE": metrics["dense"]["ce"],
        "sparse CE - dense CE": metrics["sparse"]["ce"] - metrics["dense"]["ce"],
        "nonzero fraction": metrics["sparse"]["nonzero_fraction"],
        "NMSE encode, mean over sites": mean("nmse_encode"),
        "NMSE decode, mean": mean("nmse_decode"),
        "KL dense to sparse, mean": mean("kl_dense_to_sparse"),
        "KL sparse to dense, mean": mean("kl_sparse_to_dense"),
        "KL of random mixed paths, mean": metrics["paths"]["kl"],
        "site steered": result.site,
        **steering_figures(result),
        "joint training, seconds": metrics["training"]["joint_seconds"],
    }


def main(options: Options) -> None:
    require(len(options.runs) > 0, "runs", options.runs, "name at least one run folder")
    rows = [figures(Path(run), options.task) for run in options.runs]
    several = len(rows) > 2
    heads = [Path(run).name for run in options.runs] + ["median"] * several
    print(f"| | {' | '.join(heads)} |")
    print("|---" * (len(heads) + 1) + "|")
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row[name] for row in rows if name in row]
        cells = [f"{row[name]:.4g}" if name in row else "-" for row in rows]
        print(f"| {name} | {' | '.join(cells + [f'{statistics.median(values):.4g}'] * several)} |")


if __name__ == "__main__":
    with report_errors():
        main(tyro.cli(Options))

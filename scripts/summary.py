"""Put the figures of several runs side by side, as a Markdown table with medians.

Example:
    python scripts/summary.py runs/demo runs/demo-1 runs/demo-2
"""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path

import tyro
from cli import report_errors


@dataclass(frozen=True, kw_only=True)
class Options:
    """Put the figures of several runs side by side, as a Markdown table with medians."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Run folders that were trained, searched and steered."""
    task: str = "single_double_quote"
    """Task whose steering is shown."""


def figures(folder: Path, task: str) -> dict[str, float]:
    """The figures of one run; a missing metrics.json or steering is an error that says which command makes it."""
    path = folder / "metrics.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: train the run with scripts/train_bridge.py --run {folder}")
    metrics = json.loads(path.read_text())
    if task not in metrics.get("steering", {}):
        raise ValueError(f"{path} has no steering of {task}: run scripts/find_channel.py and scripts/steer.py on it")
    steering, sites, dense = metrics["steering"][task], metrics["sites"], metrics["dense_task"][task]

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
        "site steered": steering["site"],
        "P(other quote) unsteered" if task == "single_double_quote" else "P(target) unsteered": steering["channels"][
            "1"
        ][0],
        **{f"steered, {n} channel{'s'[: n != '1']}": curve[-1] for n, curve in steering["channels"].items()},
        "random directions, mean": steering["random_mean"][-1],
        "random directions, 95th percentile": steering["random_p95"][-1],
        "random channels, 95th percentile": steering["random_channels_p95"][-1],
        "difference of means": steering["difference_of_means"][-1],
        "joint training, seconds": metrics["training"]["joint_seconds"],
    }


def main(options: Options) -> None:
    rows = [figures(Path(run), options.task) for run in options.runs]
    several = len(rows) > 2
    heads = [Path(run).name for run in options.runs] + ["median"] * several
    print(f"| | {' | '.join(heads)} |")
    print("|---" * (len(heads) + 1) + "|")
    for name in rows[0]:
        values = [row[name] for row in rows]
        values += [statistics.median(values)] * several
        print(f"| {name} | {' | '.join(f'{v:.4g}' for v in values)} |")


if __name__ == "__main__":
    with report_errors():
        main(tyro.cli(Options))

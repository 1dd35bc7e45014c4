"""Steer the dense model through a named channel: strength curves with their controls, a plot, and the numbers.

Example:
    python scripts/steer.py --run runs/demo
"""

from dataclasses import dataclass
from typing import Literal

import tyro
from cli import report_errors

from bridges.run import update_metrics
from interventions import load_dense
from interventions.bundle import get_bundle
from interventions.channels import resolve
from interventions.plots import plot_steering
from interventions.steering import steer
from interventions.tasks import answer_probabilities, get_task, pair_accuracy


@dataclass(frozen=True, kw_only=True)
class Options:
    """Steer the dense model through a named channel: strength curves with their controls, a plot, and the numbers."""

    run: str = "runs/demo"
    """Run folder."""
    channel: str = "quote_type"
    """Named channel, as scripts/find_channel.py wrote it."""
    pairs: int = 64
    """Evaluation prompt pairs; their templates were used neither for training nor for selection."""
    draws: int = 50
    """Random directions, and random channel sets, per strength."""
    where: Literal["read", "stream"] = "read"
    """Edit only what the next sublayer reads, or the stream."""


def main(options: Options) -> None:
    dense = load_dense(options.run)
    bundle = get_bundle(dense)
    run, channel = bundle.run, resolve(options.channel, bundle.channels, bundle.run.sparse)
    if "task" not in channel.selection:
        raise ValueError(f"channel {options.channel!r} was not found for a task: use one from scripts/find_channel.py")
    task = get_task(channel.selection["task"], run.tokenizer, max_tokens=run.config.sparse.n_ctx)
    evaluation = task.sample(options.pairs, split="evaluation", seed=run.config.seed)
    selection = task.sample(channel.selection["pairs"], split="selection", seed=run.config.seed)
    logits = run.dense(evaluation.tokens.flatten(0, 1)).unflatten(0, evaluation.tokens.shape[:2])
    right, wrong = answer_probabilities(logits, evaluation)
    baseline = {
        "pair_accuracy": float(pair_accuracy(logits, evaluation)),
        "p_right": float(right.mean()),
        "p_wrong": float(wrong.mean()),
    }
    sets = {int(n): s for n, s in channel.selection["sets"].items() if n in ("1", "2", "4", "8")}
    result = steer(dense, task.name, sets, channel, evaluation, selection, where=options.where, draws=options.draws)
    update_metrics(run.folder, merge=True, dense_task={task.name: baseline}, steering={task.name: result._asdict()})
    plot = plot_steering(result, run.folder / "steering.png")
    print(f"dense model on {task.name}: " + ", ".join(f"{n} {v:.4f}" for n, v in baseline.items()))
    print(f"P(counterfactual answer) on {result.prompts} evaluation prompts, strength 0 -> 1:")
    for n, curve in result.channels.items():
        print(f"  {n} channel(s): {curve[0]:.4f} -> {curve[-1]:.4f}   (two-way {result.two_way[n][-1]:.4f})")
    print(
        f"  {result.random_draws} random directions: mean {result.random_mean[-1]:.4f}, "
        f"95th percentile {result.random_p95[-1]:.4f}"
    )
    print(f"  random channels: mean {result.random_channels_mean[-1]:.4f}, 95th {result.random_channels_p95[-1]:.4f}")
    print(f"  difference of means: {result.difference_of_means[-1]:.4f}\nplot: {plot}")


if __name__ == "__main__":
    with report_errors():
        main(tyro.cli(Options))

"""Put the channels that several runs have for a task side by side, as a Markdown table.

Example:
    python scripts/studies/compare_channels.py runs/demo runs/demo-1 runs/demo-2 --task single_double_quote
"""

from dataclasses import dataclass
from pathlib import Path

import tyro

from interventions.bundle.channels import FILE, Channel, load_channels
from interventions.cli.options import report_errors
from interventions.finding.by_patching import SET_SHARE, carries_enough
from sparse_model.config import require
from sparse_model.io.commands import command_line


@dataclass(frozen=True, kw_only=True)
class Options:
    """Put the channels that several runs have for a task side by side, as a Markdown table."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Run folders with a channel of the task."""
    task: str = "single_double_quote"
    """Task whose channels are compared."""


def channels_of(folder: Path, task: str) -> list[Channel]:
    """A run's channels of a task. Raises ValueError where there is none, naming the command that finds one."""
    named = [channel for channel in load_channels(folder).values() if channel.selection.get("task") == task]
    if not named:
        raise ValueError(
            f"{folder / FILE} has no channel for {task}: find one with "
            + command_line("find-channel", "--run", folder, "--task", task)
        )
    return named


def row(run: str, channel: Channel) -> list[str]:
    """A line of the table."""
    selection = channel.selection
    share, whole = selection["share"], selection["whole_effect_nats"]
    carried = share[str(len(channel.indices))]
    enough = next((n for n, s in share.items() if carries_enough(s)), f"more than {max(share, key=int)}")
    source = "steering" if "candidates" in selection else "patching"
    if "circuit" in selection:
        source = f"circuit of {selection['circuit']['nodes']} nodes"
    indices = ", ".join(f"{i} ({w:+.2f})" for i, w in zip(channel.indices, channel.weights, strict=True))
    return [Path(run).name, channel.name, source, str(channel.site), indices, f"{carried:.0%}",
            f"{carried * whole:.2f} of {whole:.2f}", enough]  # fmt: skip


def main(options: Options) -> None:
    require(len(options.runs) > 0, "runs", options.runs, "name at least one run folder")
    require(len(options.runs) > 0, "runs", options.runs, "name at least one run folder")
    heads = [
        "run",
        "channel",
        "from",
        "site",
        "indices (weights)",
        "share",
        "effect, nats",
        f"indices for {100 * SET_SHARE:g} %",
    ]
    rows = [row(run, channel) for run in options.runs for channel in channels_of(Path(run), options.task)]
    for cells in (heads, ["---"] * len(heads), *rows):
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    with report_errors():
        main(tyro.cli(Options))

"""Find the sparse channel that carries a task's feature and name it in RUN/channels.json.

It is searched for by patching, or taken from the task's circuit (scripts/find_circuit.py).

Examples:
    python scripts/find_channel.py --run runs/demo
    python scripts/find_channel.py --run runs/demo --task while_return_true --from circuit
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from cli import report_errors

from bridges.run import open_run
from interventions.channels import FILE, save_channel
from interventions.circuit import load_circuit
from interventions.find import find_channel
from interventions.from_circuit import channel_from_circuit
from interventions.tasks import get_task

WEAK = 0.5
"""Effect of patching the whole read, nats, below which the user is warned."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Find the sparse channel that carries a task's feature and name it in RUN/channels.json."""

    run: str = "runs/demo"
    """Run folder."""
    task: str = "single_double_quote"
    """Task whose feature is wanted."""
    source: Annotated[Literal["search", "circuit"], tyro.conf.arg(name="from")] = "search"
    """Search all channels, or take those of the task's circuit that the last deciding sublayer reads."""
    name: str | None = None
    """Name for the channel; unset: the one that the task proposes, quote_type for single_double_quote."""
    pairs: int = 64
    """Selection prompt pairs."""
    site: int | None = None
    """Residual site; unset: of those where the read decides both models' answer, the one with the smallest set."""


def main(options: Options) -> None:
    run = open_run(options.run)
    task = get_task(options.task, run.tokenizer, max_tokens=run.config.sparse.n_ctx)
    name = options.name or task.spec.channel
    batch = task.sample(options.pairs, split="selection", seed=run.config.seed)
    if options.source == "circuit":
        channel = channel_from_circuit(run, name, load_circuit(run, task.name), batch, site=options.site)
    else:
        channel = find_channel(run, name, task.name, batch, site=options.site, progress=True)
    save_channel(run.folder, channel)
    for effect in channel.selection["site_effects"]:
        mark = "  <- chosen" if effect["site"] == channel.site else ""
        print(
            f"site {effect['site']} ({effect['label']}): dense P(counterfactual answer) with the stream patched "
            f"{effect['p_stream']:.3f}, the read alone {effect['p_read']:.3f}{mark}"
        )
    for n, share in channel.selection["share"].items():
        print(f"best {n} channels {channel.selection['sets'][n]}: {share:.0%} of the whole read's effect")
    whole = channel.selection["whole_effect_nats"]
    print(
        f"the whole read of site {channel.site}: {whole:+.3f} nats of log P(counterfactual answer) in the sparse model"
    )
    if whole < WEAK:
        print("warning: the sparse model's answer does not hang on this read; the channel means little")
    print(f"{channel}\nsaved in {Path(options.run) / FILE}")


if __name__ == "__main__":
    with report_errors():
        main(tyro.cli(Options))

"""Find the sparse channel that carries a task's feature and name it in RUN/channels.json.

It is searched for by what steers the dense model, by patching the sparse model alone, or taken from the task's circuit
(scripts/find_circuit.py). Only selection prompts are looked at; their strengths are kept with it.

Examples:
    python scripts/find_channel.py --run runs/demo
    python scripts/find_channel.py --run runs/demo --task while_return_true --from patching
    python scripts/find_channel.py --run runs/demo --task while_return_true --from circuit
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from bridges.run_folder import open_run
from interventions.bundle.channels import FILE, save_channel
from interventions.circuits.circuit import load_circuit
from interventions.cli.options import report_errors
from interventions.finding.by_circuit import channel_from_circuit
from interventions.finding.by_patching import find_channel
from interventions.finding.by_steering import find_steering_channel, read_matters
from interventions.steering.strengths import with_doses
from interventions.tasks.catalogue import get_task


@dataclass(frozen=True, kw_only=True)
class Options:
    """Find the sparse channel that carries a task's feature and name it in RUN/channels.json."""

    run: str = "runs/demo"
    """Run folder."""
    task: str = "single_double_quote"
    """Task whose feature is wanted."""
    source: Annotated[Literal["steering", "patching", "circuit"], tyro.conf.arg(name="from")] = "steering"
    """Take the channels that steer the dense model best, of those that the sparse model uses; those that carry most of
    what patching a read does in the sparse model alone; or those of the task's circuit that the last deciding sublayer
    reads."""
    name: str | None = None
    """Name for the channel; unset: the one that the task proposes, quote_type for single_double_quote."""
    pairs: int = 64
    """Selection prompt pairs."""
    site: int | None = None
    """Residual site; unset: it is chosen among those where the read decides both models' answer."""


def main(options: Options) -> None:
    run = open_run(options.run)
    task = get_task(options.task, run.tokenizer, max_tokens=run.config.sparse.n_ctx)
    name = options.name or task.spec.channel
    batch = task.sample(options.pairs, split="selection", seed=run.config.seed)
    if options.source == "circuit":
        channel = channel_from_circuit(run, name, load_circuit(run, task.name), batch, site=options.site)
    elif options.source == "patching":
        channel = find_channel(run, name, task.name, batch, site=options.site, progress=True)
    else:
        channel = find_steering_channel(run, name, task.name, batch, site=options.site, progress=True)
    if options.source != "steering":
        channel = with_doses(run, channel, batch)
    save_channel(run.folder, channel)
    for effect in channel.selection["site_effects"]:
        mark = "  <- chosen" if effect["site"] == channel.site else ""
        print(
            f"site {effect['site']} ({effect['label']}): dense P(counterfactual answer) with the stream patched "
            f"{effect['p_stream']:.3f}, the read alone {effect['p_read']:.3f}{mark}"
        )
    for n, share in channel.selection["share"].items():
        dose = channel.selection["doses"][n]
        print(
            f"{n} channels {channel.selection['sets'][n]}: {share:.0%} of the whole read's effect in the sparse model; "
            f"P(counterfactual answer) in the dense model {dose['p']:.3f} at strength {dose['strength']:g} (random "
            f"directions {dose['random_p95']:.3f})"
        )
    whole = channel.selection["whole_effect_nats"]
    print(
        f"the whole read of site {channel.site}: {whole:+.3f} nats of log P(counterfactual answer) in the sparse model"
    )
    if not read_matters(whole):
        print("warning: the sparse model's answer does not hang on this read; the channel means little")
    print(f"{channel}\nsaved in {Path(options.run) / FILE}")


if __name__ == "__main__":
    with report_errors():
        main(tyro.cli(Options))

"""Find the sparse channel that carries a task's feature and name it in RUN/channels.json.

It is searched for by what steers the dense model, by patching the sparse model alone, or taken from the task's circuit
(sparse-bridges find-circuit). Only selection prompts are looked at; their strengths are kept with it.

Examples:
    sparse-bridges find-channel --run runs/demo
    sparse-bridges find-channel --run runs/demo --task while_return_true --from patching
    sparse-bridges find-channel --run runs/demo --task while_return_true --from circuit
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from interventions.cli.options import PROMPTS_HELP, TASK_LIST, parse, writing_into
from interventions.tasks.names import PromptKind, check_task_name

if TYPE_CHECKING:
    from interventions.bundle.channels import Channel


@dataclass(frozen=True, kw_only=True)
class Options:
    """Find the sparse channel that carries a task's feature and name it in RUN/channels.json."""

    run: str = "runs/demo"
    """Run folder."""
    device: str = "cpu"
    """Where the models run: cpu, cuda or cuda:N."""
    task: Annotated[str, tyro.conf.arg(help=f"Task whose feature is wanted, {TASK_LIST}.")] = "single_double_quote"
    prompts: Annotated[PromptKind, tyro.conf.arg(help=PROMPTS_HELP)] = "generated"
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


def command(arguments: list[str]) -> None:
    main(parse(Options, "find-channel", arguments, __doc__))


def main(options: Options) -> None:
    from bridges.run_folder import open_run
    from interventions.bundle.channels import FILE, save_channel
    from interventions.finding.channel_search import find_channel

    check_task_name(options.task)
    with writing_into(options.run):
        run = open_run(options.run, options.device)
        channel = find_channel(
            run,
            options.task,
            prompts=options.prompts,
            by=options.source,
            name=options.name,
            pairs=options.pairs,
            site=options.site,
            progress=True,
        )
        save_channel(run.folder, channel)
    describe(channel)
    print(f"saved in {Path(options.run) / FILE}")


def describe(channel: "Channel") -> None:
    """Print how a channel was found."""
    selection = channel.selection
    for effect in selection["site_effects"]:
        mark = "  <- chosen" if effect["site"] == channel.site else ""
        print(
            f"site {effect['site']} ({effect['label']}): dense P(counterfactual answer) with the stream patched "
            f"{effect['p_stream']:.3f}, the read alone {effect['p_read']:.3f}{mark}"
        )
    for n, share in selection["share"].items():
        dose = selection["doses"][n]
        print(
            f"{n} channels {selection['sets'][n]}: {share:.0%} of the whole read's effect in the sparse model; "
            f"P(counterfactual answer) in the dense model {dose['p']:.3f} at strength {dose['strength']:g} (random "
            f"directions {dose['random_p95']:.3f})"
        )
    for n, channels in selection["by_patching"]["sets"].items():
        dose = selection["by_patching"]["doses"][n]
        print(
            f"{n} channels {channels} from the sparse model alone: P(counterfactual answer) in the dense model "
            f"{dose['p']:.3f} at strength {dose['strength']:g}"
        )
    print(
        f"the whole read of site {channel.site}: {selection['whole_effect_nats']:+.3f} nats of log P(counterfactual "
        "answer) in the sparse model"
    )
    print(channel)

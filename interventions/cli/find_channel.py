"""Find the sparse channel that carries a task's feature and name it in RUN/channels.json.

It is searched for by what steers the dense model, by patching the sparse model alone, or taken from the task's circuit
(sparse-bridges find-circuit). Only selection prompts are looked at; their strengths are kept with it. What the name is
worth on natural text is measured last, and kept too.

Examples:
    sparse-bridges find-channel --run runs/demo
    sparse-bridges find-channel --run runs/demo --task while_return_true --from patching
    sparse-bridges find-channel --run runs/demo --from circuit   # after find-circuit
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from interventions.cli.options import PROMPTS_HELP, TASK_LIST, parse, say_next, writing_into
from interventions.tasks.names import PromptKind, check_task_name
from sparse_model.io.tables import paragraph, table

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
    say_next("steer", "--run", options.run, "--channel", channel.name, device=options.device)


def describe(channel: "Channel") -> None:
    """Print how a channel was found."""
    selection = channel.selection
    print(table(_site_rows(channel), left=2))
    print(
        paragraph(
            "dense P(counterfactual answer) with the stream, or only what is read at the site, as on the other prompt: "
            "near 1, the site decides the answer."
        )
    )
    print("\n" + table(_set_rows(selection), left=1, wrap={1: 40}))
    print(
        paragraph(
            "share: of the whole read's effect in the sparse model, near 1 is good. P: dense P(counterfactual answer), "
            "steered at the strength; near 1 is good. random: 95 % of random directions as long stay below it; near 0 "
            "is good."
        )
    )
    print(
        f"\nthe whole read of site {channel.site}: {selection['whole_effect_nats']:+.3f} nats of log P(counterfactual "
        "answer) in the sparse model"
    )
    print(channel)
    print(paragraph(verdict(channel)))
    describe_evidence(channel)


def describe_evidence(channel: "Channel") -> None:
    """Print what a channel's name is worth on natural text."""
    evidence = channel.evidence
    if evidence is None:
        print(paragraph("no evidence of the name on natural text"))
        return
    print(f"\n{evidence.inside}, in {evidence.evaluation.files} {evidence.text}:")
    rows = [["contexts", "read", "AUC", "twin", "precision", "recall", "inside", "in twin", "outside"]]
    for contexts, readings in (("new", evidence.new), ("all", evidence.all)):
        for name, detection in readings.named():
            rows.append([contexts, name, *detection.cells()])
    print(table(rows, left=2))
    print(
        paragraph(
            "new: contexts that the task's templates do not have. AUC: against all other tokens, twin: against those "
            f"{evidence.twin}; near 1 is good, .5 is chance. Precision and recall: at a threshold chosen on other "
            "files. inside, in twin, outside: mean values. probe: a logistic regression on the dense model's stream."
        )
    )
    print(paragraph(evidence.verdict))


def _site_rows(channel: "Channel") -> list[list[str]]:
    rows = [["site", "reader", "P, stream", "P, read", ""]]
    for effect in channel.selection["site_effects"]:
        mark = "<- chosen" if effect["site"] == channel.site else ""
        values = f"{effect['p_stream']:.3f}", f"{effect['p_read']:.3f}"
        rows.append([str(effect["site"]), effect["label"], *values, mark])
    return rows


def _set_rows(selection: dict[str, Any]) -> list[list[str]]:
    """The sets of the search, and those that the sparse model alone names."""
    rows = [["channels", "which", "share", "strength", "P", "random"]]
    for n, share in selection["share"].items():
        rows.append([n, _listed(selection["sets"][n]), f"{share:.0%}", *_dose_cells(selection["doses"][n])])
    for n, channels in selection.get("by_patching", {"sets": {}})["sets"].items():
        dose = selection["by_patching"]["doses"][n]
        rows.append([n, f"{_listed(channels)} (sparse model alone)", "", *_dose_cells(dose)])
    return rows


def _listed(channels: list[int]) -> str:
    return ", ".join(map(str, channels))


def _dose_cells(dose: dict[str, float]) -> tuple[str, str, str]:
    return f"{dose['strength']:g}", f"{dose['p']:.3f}", f"{dose['random_p95']:.3f}"


def verdict(channel: "Channel") -> str:
    """Whether a channel met what its search asked for, in words."""
    broken = [rule.words for rule in channel.rules if not rule.passed]
    if broken:
        return f"weak: {channel.name} misses what its search asks for. {'. '.join(broken)}."
    return f"good: {channel.name} meets all that its search asks for; controls on fresh prompts come with steer."

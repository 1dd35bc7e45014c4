"""A task's channel in a run, in one call: by what steers the dense model, by patching, or from the task's circuit."""

import logging
from dataclasses import replace
from typing import Literal

import torch

from bridges.run_folder import Run
from interventions.bundle.channels import Channel
from interventions.circuits.circuit import load_circuit
from interventions.finding.by_circuit import channel_by_circuit
from interventions.finding.by_patching import channel_by_patching, search_channels
from interventions.finding.by_steering import channel_by_steering, read_matters
from interventions.finding.evidence import with_evidence
from interventions.steering.rivals import difference_of_means
from interventions.steering.steered_prompts import prompts_of
from interventions.steering.strengths import Dosing
from interventions.tasks.base import TaskBatch
from interventions.tasks.catalogue import TaskName
from interventions.tasks.names import PromptKind
from interventions.tasks.of_run import run_task

logger = logging.getLogger(__name__)

_PATCHED_SIZES = (1, 2, 4, 8)

FindBy = Literal["steering", "patching", "circuit"]


def find_channel(
    run: Run,
    task: TaskName,
    *,
    prompts: PromptKind = "generated",
    by: FindBy = "steering",
    name: str | None = None,
    pairs: int = 64,
    site: int | None = None,
    progress: bool = False,
) -> Channel:
    """The channel that carries a task's feature, the strengths at which to steer it, and the evidence of its name.

    Nothing is saved.

    task: one of the twenty, or a file of pairs (`interventions.tasks.files`).
    prompts: generated from templates, or natural, from held-out files.
    by: "steering": of the channels that the sparse model uses, those that steer the dense model best; "patching": those
        that carry most of what patching a read does in the sparse model alone; "circuit": those of the task's circuit
        (see `find_circuit`) that the last deciding sublayer reads.
    name: None: the one that the task proposes, quote_type for single_double_quote.
    pairs: selection prompt pairs, or as many as the task has; no others are looked at.
    site: None: it is chosen among those where the read decides both models' answer.

    Raises what `run_task` raises, FileNotFoundError for a circuit that has not been found, ValueError for a site
    out of range or whose read does not differ between the prompts, and for bridges without scales.
    """
    run.bridges.check_scales()
    bound = run_task(run, task, prompts)
    circuit = load_circuit(run, bound.name) if by == "circuit" else None
    name = name or bound.spec.channel
    batch = bound.sample_up_to(pairs, split="selection", seed=run.config.seed).to(run.bridges.rms_sparse.device)
    if circuit:
        channel = channel_by_circuit(run, name, circuit, batch, site=site)
    elif by == "patching":
        channel = channel_by_patching(run, name, bound.name, batch, site=site, progress=progress)
    else:
        channel = channel_by_steering(run, name, bound.name, batch, site=site, progress=progress)
    channel = freeze(run, channel, batch)
    if not read_matters(channel.selection["whole_effect_nats"]):
        logger.warning("the sparse model's answer does not hang on this read; the channel means little")
    return with_evidence(run, replace(channel, selection=channel.selection | {"prompts": bound.record}))


@torch.no_grad()
def freeze(run: Run, channel: Channel, batch: TaskBatch) -> Channel:
    """A channel with everything that an experiment needs chosen: on selection prompts, at its site, in exact units.

    A strength for each of its sets and for the difference of means; and the sets that the sparse model alone names (the
    paper's way), with theirs.
    """
    dosing = Dosing(run, batch, channel.site)
    sets = channel.selection["sets"]
    patched = search_channels(run, batch, channel.site, beam=1, largest=max(_PATCHED_SIZES)).sets
    patched = {n: channels for n, channels in patched.items() if n in _PATCHED_SIZES}
    means = difference_of_means(run.dense, batch, channel.site, prompts_of(batch))
    known: dict[str, dict[str, float]] = channel.selection.get("doses", {})
    new = {n: dosing.edit(channels) for n, channels in sets.items() if n not in known}
    edits = [*new.values(), *map(dosing.edit, patched.values()), means]
    doses = [dose._asdict() for dose in dosing.edit_doses(edits)]
    chosen = {
        "units": "exact",
        "doses": known | dict(zip(new, doses, strict=False)),
        "by_patching": {
            "sets": {str(n): channels for n, channels in patched.items()},
            "doses": dict(zip(map(str, patched), doses[len(new) :], strict=False)),
        },
        "difference_of_means": doses[-1],
    }
    return replace(channel, selection=channel.selection | chosen)

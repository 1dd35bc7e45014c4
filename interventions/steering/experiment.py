"""A declared experiment made complete: from JSON, with its channel, sets and strengths filled in."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from interventions.bundle.bundle import Bundle
from interventions.bundle.channels import Channel, resolve
from interventions.steering.experiment_config import Experiment
from interventions.steering.strengths import LADDER
from interventions.tasks.catalogue import task_spec
from interventions.tasks.files import is_task_file
from interventions.tasks.names import NATURAL
from interventions.tasks.of_run import change_of, run_task
from sparse_model.config import require
from sparse_model.io.reading import typed

logger = logging.getLogger(__name__)

STRENGTHS = tuple(round(0.1 * i, 1) for i in range(11))
"""Strengths of an experiment that names none; more where larger ones were chosen."""


def read_experiment(data: dict[str, Any]) -> Experiment:
    """An experiment from JSON. Raises ValueError for an unknown key and for a value of another type."""
    return typed(Experiment, data, "the experiment", "correct it, or steer again")


def resolved(experiment: Experiment, bundle: Bundle) -> Experiment:
    """The experiment with its channel, task, sets and seed filled in.

    Its pairs are no more than the task has. Raises what `run_task` raises, KeyError for an unknown channel, ValueError
    where it names no task or has no set of the sizes asked for, and for a set with channels that do not exist.
    """
    proposed = task_spec(experiment.task or "single_double_quote").channel
    name = experiment.channel or proposed
    channel = resolve(name, bundle.channels, bundle.shape)
    task = _task(experiment, channel)
    searched: dict[str, list[int]] = channel.selection.get("sets", {})
    sets = experiment.sets or tuple(tuple(searched[str(n)]) for n in experiment.sizes if str(n) in searched)
    if not searched and not sets:
        sets = (channel.indices,)
    require(len(sets) > 0, "sizes", experiment.sizes, f"the search for {channel.name!r} found {', '.join(searched)}")
    wrong = [c for channels in sets for c in channels if not 0 <= c < bundle.shape.d_model]
    require(not wrong, "sets", wrong, f"the sparse stream has channels 0 .. {bundle.shape.d_model - 1}")
    seed = bundle.run.config.seed if experiment.seed is None else experiment.seed
    pairs = run_task(bundle.run, task).at_most(experiment.pairs, "evaluation", "selection")
    return replace(
        experiment,
        channel=name,
        task=task,
        pairs=pairs,
        sets=sets,
        sizes=tuple(map(len, sets)),
        seed=seed,
    )


def _task(experiment: Experiment, channel: Channel) -> str:
    """The task of an experiment: as it says, or the one that the channel was found for; its prompts are in the name."""
    record = channel.selection.get("prompts", {})
    searched_for = record["file"] if record.get("prompts") == "file" else channel.selection.get("task")
    task = experiment.task or searched_for
    if task is None:
        raise ValueError(f"channel {channel.name!r} was not found for a task: name one")
    if is_task_file(task):
        require(experiment.prompts is None, "prompts", experiment.prompts, f"{task} has its own prompts: leave it out")
        changed = change_of(record) if Path(task).resolve() == Path(str(searched_for)).resolve() else ""
        if changed:
            logger.warning("channel %s: %s", channel.name, changed)
        return task
    if experiment.prompts == "generated":
        return task.removesuffix(NATURAL)
    return task.removesuffix(NATURAL) + NATURAL if experiment.prompts == "natural" else task


def default_strengths(chosen: dict[str, float]) -> tuple[float, ...]:
    """The strengths of an experiment that names none, given those that were chosen on selection prompts."""
    largest = max([1.0, *chosen.values()])
    return tuple(sorted({*STRENGTHS, *chosen.values(), *(s for s in LADDER if 1 < s <= largest)}))


def chosen_strengths(channel: Channel, sets: Sequence[Sequence[int]]) -> dict[str, float]:
    """By size, the strength that was chosen on selection prompts for those of the sets that the search found."""
    searched, doses = (channel.selection.get(part, {}) for part in ("sets", "doses"))
    by_size = {str(len(channels)): list(channels) for channels in sets}
    return {n: doses[n]["strength"] for n, channels in by_size.items() if searched.get(n) == channels and n in doses}


def patching_choices(channel: Channel, sizes: Sequence[int]) -> tuple[dict[str, list[int]], dict[str, float]]:
    """The sets of these sizes that the sparse model alone names, and their strengths, by size."""
    by_patching = channel.selection.get("by_patching", {"sets": {}, "doses": {}})
    sets = {n: list(channels) for n, channels in by_patching["sets"].items() if int(n) in sizes}
    return sets, {n: by_patching["doses"][n]["strength"] for n in sets}

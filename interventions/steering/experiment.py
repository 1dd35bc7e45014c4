"""What a steering experiment is: declared saved with its result, run by `interventions.steering.steer.steer`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from interventions.bundle.bundle import Bundle
from interventions.bundle.channels import Channel, resolve
from interventions.editing.hooks import Where
from interventions.steering.strengths import LADDER
from interventions.tasks.catalogue import get_task
from sparse_model.config import check_choices, from_dict, require

STRENGTHS = tuple(round(0.1 * i, 1) for i in range(11))
"""Strengths of an experiment that names none; more where larger ones were chosen."""

_COUNTS = ("pairs", "draws", "maps", "resamples", "ridge_tokens", "text_tokens", "task_pairs", "new_tokens")


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What is steered, and what it is compared with. No control can be left out."""

    channel: str | None = None
    """Named channel, as scripts/find_channel.py wrote it, or an address such as attn.1.read.7; unset: the name that the
    task proposes, quote_type without a task."""
    task: str | None = None
    """Task whose prompts are steered; unset: the one that the channel was found for."""
    sizes: tuple[int, ...] = (1, 2, 4, 8)
    """Of the sets of channels that the search found, those of these sizes are moved."""
    sets: tuple[tuple[int, ...], ...] = ()
    """Sets to move instead, no two of one size. A channel that was not searched for is a set by itself."""
    strengths: tuple[int | float, ...] = ()
    """1 moves the channels to their counterfactual values. Unset: 0, 0.1 .. 1, and the strengths up to the largest that
    was chosen on selection prompts, for a set when the channel was found or for the difference of means."""
    where: Where = "read"
    """Edit only what the next sublayer reads, or the stream."""
    pairs: int = 64
    """Evaluation prompt pairs, and selection pairs for the difference of means."""
    draws: int = 100
    """Random directions, and random sets of channels."""
    maps: int = 20
    """Shuffled decoders, and untrained bridges."""
    resamples: int = 1000
    """Bootstrap resamples of the prompts."""
    ridge_tokens: int = 32768
    """Training tokens of the ridge regression."""
    text_tokens: int = 8192
    """Held-out tokens on which the KL is measured."""
    task_pairs: int = 32
    """Prompt pairs of each other task."""
    new_tokens: int = 12
    """Tokens generated behind each prompt, as far as the context goes."""
    seed: int | None = None
    """Seeds prompts and random draws; unset: the run's own."""

    def __post_init__(self) -> None:
        check_choices(self)
        for name in _COUNTS:
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        for channels in self.sets:
            require(
                0 < len(channels) == len(set(channels)), "sets", self.sets, "a set needs channels, none of them twice"
            )
        sizes = {len(channels) for channels in self.sets}
        require(len(sizes) == len(self.sets), "sets", self.sets, "no two sets may be of one size")


def read_experiment(data: dict[str, Any]) -> Experiment:
    """An experiment from JSON. Raises ValueError for an unknown key."""
    return from_dict(Experiment, {name: _tuples(value) for name, value in data.items()})


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def resolved(experiment: Experiment, bundle: Bundle) -> Experiment:
    """The experiment with its channel, task, sets and seed filled in.

    Raises KeyError for an unknown channel or task, ValueError where the channel names no task or has no set of the
    sizes asked for, and for a set with channels that the sparse stream does not have.
    """
    proposed = get_task(experiment.task or "single_double_quote", bundle.run.tokenizer).spec.channel
    name = experiment.channel or proposed
    channel = resolve(name, bundle.channels, bundle.shape)
    task = experiment.task or channel.selection.get("task")
    if task is None:
        raise ValueError(f"channel {name!r} was not found for a task: name one")
    searched: dict[str, list[int]] = channel.selection.get("sets", {})
    sets = experiment.sets or tuple(tuple(searched[str(n)]) for n in experiment.sizes if str(n) in searched)
    if not searched and not sets:
        sets = (channel.indices,)
    require(len(sets) > 0, "sizes", experiment.sizes, f"the search for {channel.name!r} found {', '.join(searched)}")
    wrong = [c for channels in sets for c in channels if not 0 <= c < bundle.shape.d_model]
    require(not wrong, "sets", wrong, f"the sparse stream has channels 0 .. {bundle.shape.d_model - 1}")
    seed = bundle.run.config.seed if experiment.seed is None else experiment.seed
    return replace(
        experiment,
        channel=name,
        task=task,
        sets=sets,
        sizes=tuple(map(len, sets)),
        seed=seed,
    )


def default_strengths(chosen: dict[str, float]) -> tuple[float, ...]:
    """The strengths of an experiment that names none, given those that were chosen on selection prompts."""
    largest = max([1.0, *chosen.values()])
    return tuple(sorted({*STRENGTHS, *chosen.values(), *(s for s in LADDER if 1 < s <= largest)}))


def chosen_strengths(channel: Channel, sets: Sequence[Sequence[int]]) -> dict[str, float]:
    """By size, the strength that was chosen on selection prompts for those of the sets that the search found."""
    searched, doses = (channel.selection.get(part, {}) for part in ("sets", "doses"))
    by_size = {str(len(channels)): list(channels) for channels in sets}
    return {n: doses[n]["strength"] for n, channels in by_size.items() if searched.get(n) == channels and n in doses}

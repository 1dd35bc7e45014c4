"""What a steering experiment is. Nothing heavy is imported here: the command line reads it to print its help."""

from dataclasses import dataclass
from typing import get_args

from interventions.editing.where import Where
from interventions.tasks.names import PromptKind
from sparse_model.config import check_choices, require
from sparse_model.io.reading import NOTHING_ELSE

CANDIDATES = 16
"""Channels, or latents of another basis, that a search for sets looks at."""
_COUNTS = ("pairs", "draws", "maps", "searches", "resamples", "ridge_tokens", "text_tokens", "task_pairs", "new_tokens")


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What is steered, and what it is compared with. No control can be left out."""

    __pydantic_config__ = NOTHING_ELSE

    channel: str | None = None
    """Named channel, as sparse-bridges find-channel wrote it, or an address such as attn.1.read.7; unset: the name that
    the task proposes, quote_type without a task."""
    task: str | None = None
    """Task whose prompts are steered, by name or file; unset: the one that the channel was found for."""
    prompts: PromptKind | None = None
    """Prompts from templates (generated), or places in held-out files of the run's corpus (natural); unset: as for the
    channel's search."""
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
    """Evaluation prompt pairs, and selection pairs for the difference of means; or as many as the task has."""
    draws: int = 100
    """Random directions, and random sets of channels."""
    maps: int = 20
    """Shuffled decoders, and untrained bridges."""
    searches: int = 20
    """Equal searches of each control: through shuffled decoders, untrained bridges, rotated bases, of other tasks."""
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
        choices = (None, *get_args(PromptKind))
        require(self.prompts in choices, "prompts", self.prompts, f"use one of {', '.join(get_args(PromptKind))}")
        for name in _COUNTS:
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        for channels in self.sets:
            require(
                0 < len(channels) == len(set(channels)), "sets", self.sets, "a set needs channels, none of them twice"
            )
        sizes = {len(channels) for channels in self.sets}
        require(len(sizes) == len(self.sets), "sets", self.sets, "no two sets may be of one size")

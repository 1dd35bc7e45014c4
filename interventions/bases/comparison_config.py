"""What is compared. Nothing heavy is imported here: the command line reads it to print its help."""

from dataclasses import dataclass
from typing import get_args

from interventions.steering.experiment_config import CANDIDATES, Experiment
from interventions.tasks.names import PromptKind
from sparse_model.config import require
from sparse_model.io.reading import NOTHING_ELSE

_COUNTS = ("pairs", "draws", "ridge_tokens", "text_tokens", "task_pairs", "new_tokens")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is steered, through which bases. Every basis goes through the same search."""

    __pydantic_config__ = NOTHING_ELSE

    channel: str | None = None
    """Named channel, or an address such as attn.1.read.7, whose site is edited; unset: the name that the task
    proposes."""
    task: str | None = None
    """Task whose prompts are steered, by name or file; unset: the one that the channel was found for."""
    prompts: PromptKind | None = None
    """Prompts from templates (generated), or places in held-out files of the run's corpus (natural); unset: as for the
    channel's search."""
    sizes: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of latents that are moved together."""
    kept: tuple[int, ...] = (8,)
    """Latents that a trained sparse autoencoder keeps of each token; one is trained for each number given."""
    coder_tokens: int | None = None
    """Training tokens of the autoencoders and the transcoder; unset: as many as the bridges were trained on."""
    pairs: int = 64
    """Evaluation prompt pairs, and as many for the search; or as many as the task has."""
    draws: int = 100
    """Random directions."""
    ridge_tokens: int = 32768
    """Training tokens of the ridge regression and the principal components."""
    text_tokens: int = 4096
    """Held-out tokens on which the KL is measured."""
    task_pairs: int = 32
    """Prompt pairs of each other task."""
    new_tokens: int = 12
    """Tokens generated behind each prompt, as far as the context goes."""
    seed: int | None = None
    """Seeds prompts, random draws and the autoencoders; unset: the run's own."""

    def __post_init__(self) -> None:
        choices = (None, *get_args(PromptKind))
        require(self.prompts in choices, "prompts", self.prompts, f"use one of {', '.join(get_args(PromptKind))}")
        for name in _COUNTS:
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        for name in ("sizes", "kept"):
            values = getattr(self, name)
            increasing = sorted(set(values)) == list(values) and all(value >= 1 for value in values)
            require(increasing, name, values, "give whole numbers from 1 on, the smallest first, none of them twice")
            require(len(values) > 0, name, values, "give at least one")
        most = f"the search looks at {CANDIDATES} latents of a basis, so at most {CANDIDATES}"
        require(self.sizes[-1] <= CANDIDATES, "sizes", self.sizes, most)
        if self.coder_tokens is not None:
            require(self.coder_tokens >= 1, "coder_tokens", self.coder_tokens, "must be at least 1")

    def experiment(self) -> Experiment:
        """What is steered, as the stages of a steering experiment take it; which set it moves is of no matter."""
        return Experiment(
            channel=self.channel,
            task=self.task,
            prompts=self.prompts,
            pairs=self.pairs,
            draws=self.draws,
            ridge_tokens=self.ridge_tokens,
            text_tokens=self.text_tokens,
            task_pairs=self.task_pairs,
            new_tokens=self.new_tokens,
            seed=self.seed,
            strengths=(1,),
            sets=((0,),),
        )

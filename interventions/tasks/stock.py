"""Tasks with a stock of pairs, found in files or written by hand, where others have templates."""

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from interventions.tasks.base import PROMPT_SPLITS, CannotPresent, PromptSplit, Strings, Task, TaskBatch


class StockPair(NamedTuple):
    """A pair that a tokenizer has read."""

    tokens: tuple[list[int], list[int]]
    """The prompts, without the end-of-text token."""
    answers: tuple[int, int]
    prompt: Strings


@dataclass(frozen=True, kw_only=True)
class StockTask(Task, ABC):
    """A task whose pairs are drawn from a stock."""

    @property
    @abstractmethod
    def stock(self) -> Mapping[PromptSplit, Sequence[StockPair]]:
        """The pairs of each split."""

    @property
    @abstractmethod
    def source(self) -> str:
        """What gives the pairs, as the subject of a sentence; `{split}` stands for the split."""

    @property
    @abstractmethod
    def remedy(self) -> str:
        """How there would be more."""

    def available(self, split: PromptSplit) -> int:
        """How many pairs there are in `split`."""
        return len(self.stock[split])

    def at_most(self, n_pairs: int, *splits: PromptSplit) -> int:
        """`n_pairs`, or as many as each of the splits has. Raises CannotPresent where one has none."""
        for split in splits:
            if not self.available(split):
                raise CannotPresent(
                    f"{self.source.format(split=repr(split))} no pair of task {self.name!r}; {self.remedy}"
                )
        return min(n_pairs, *map(self.available, splits))

    def sample(self, n_pairs: int, *, split: PromptSplit, seed: int) -> TaskBatch:
        """`n_pairs` different pairs of `split`; the same arguments give the same batch.

        Raises:
            ValueError: n_pairs < 1, an unknown split, or more pairs than there are.
        """
        if n_pairs < 1:
            raise ValueError(f"n_pairs={n_pairs}: must be at least 1")
        if split not in PROMPT_SPLITS:
            raise ValueError(f"split={split!r}: use one of {', '.join(PROMPT_SPLITS)}")
        pairs = self.stock[split]
        if n_pairs > len(pairs):
            raise ValueError(
                f"n_pairs={n_pairs}: {self.source.format(split=repr(split))} {len(pairs)} pairs of task"
                f" {self.name!r}; ask for at most that, or {self.remedy}"
            )
        drawn = random.Random(f"{self.name}/{split}/{seed}").sample(pairs, n_pairs)
        end_of_text = self._end_of_text()
        width = 1 + max(len(pair.tokens[0]) for pair in drawn)
        rows = [[[end_of_text, *member] for member in pair.tokens] for pair in drawn]
        padded = [[member + [end_of_text] * (width - len(member)) for member in pair] for pair in rows]
        return TaskBatch(
            tokens=torch.tensor(padded),
            answers=torch.tensor([pair.answers for pair in drawn]),
            last=torch.tensor([len(pair.tokens[0]) for pair in drawn]),
            prompts=[pair.prompt for pair in drawn],
        )

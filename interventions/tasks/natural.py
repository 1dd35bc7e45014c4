"""Tasks whose prompts are places in real, held-out files (`interventions.tasks.mining` finds them).

1. Files are divided into the splits by a hash of their text, so no file gives prompts to two splits.
2. The left context is the file's own, from a line's start, as long as `max_tokens` allows.
3. A pair is kept if its members have the same number of tokens and their answers are two different single tokens.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interventions.tasks.base import (
    PROMPT_SPLITS,
    PromptSplit,
    Strings,
    Task,
    TaskBatch,
    answer_probabilities,
    log_odds,
)
from interventions.tasks.mining import Twins, mine
from sparse_model.data.text_files import stable_fraction

_TRAIN, _SELECTION = 0.4, 0.7  # 40 % of the files train, 30 % selection, 30 % evaluation
_MOST_PER_FILE = 32
_CHARACTERS_PER_TOKEN = 8
DISTANCES = (1, 2, 4, 8, 16, 32)
"""Upper ends of the ranges of `accuracy_by_distance`; a last one has no end."""


class _NaturalPair(NamedTuple):
    tokens: tuple[list[int], list[int]]
    """The prompts, without the end-of-text token."""
    answers: tuple[int, int]
    prompt: Strings


def split_of(text: str) -> PromptSplit:
    """The split that a file's prompts belong to."""
    fraction = stable_fraction(f"natural {text}")
    return "train" if fraction < _TRAIN else "selection" if fraction < _SELECTION else "evaluation"


@dataclass(frozen=True, kw_only=True)
class NaturalTask(Task):
    """A task whose pairs come from `texts`; `get_task(..., prompts="natural", texts=...)` makes one."""

    texts: Sequence[str]
    """Files that the models were not trained on."""

    @cached_property
    def _pairs(self) -> dict[PromptSplit, list[_NaturalPair]]:
        pairs: dict[PromptSplit, list[_NaturalPair]] = {split: [] for split in PROMPT_SPLITS}
        for text in dict.fromkeys(self.texts):
            found = mine(self.name, text)
            random.Random(f"{self.name} {len(text)}").shuffle(found)
            kept = 0
            for twins in found:
                pair = self._encode_twins(twins) if kept < _MOST_PER_FILE else None
                if pair is not None:
                    pairs[split_of(text)].append(pair)
                    kept += 1
        return pairs

    def available(self, split: PromptSplit) -> int:
        """How many pairs the files of `split` give."""
        return len(self._pairs[split])

    def sample(self, n_pairs: int, *, split: PromptSplit, seed: int) -> TaskBatch:
        """`n_pairs` different pairs from the files of `split`; the same arguments give the same batch.

        Raises:
            ValueError: n_pairs < 1, an unknown split, or more pairs than there are.
        """
        if n_pairs < 1:
            raise ValueError(f"n_pairs={n_pairs}: must be at least 1")
        if split not in PROMPT_SPLITS:
            raise ValueError(f"split={split!r}: use one of {', '.join(PROMPT_SPLITS)}")
        pairs = self._pairs[split]
        if n_pairs > len(pairs):
            raise ValueError(
                f"n_pairs={n_pairs}: the held-out files of split {split!r} give {len(pairs)} natural pairs of task"
                f" {self.name!r}; ask for at most that, give more text, or use generated prompts"
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

    def _encode_twins(self, twins: Twins) -> _NaturalPair | None:
        """The pair's tokens and answers; None where this tokenizer cannot present it."""
        head = self._cut(twins)
        if head is None:
            return None
        prompts = (head + twins.deciding[0] + twins.between, head + twins.deciding[1] + twins.between)
        tokens = (self._encode(prompts[0]), self._encode(prompts[1]))
        if len(tokens[0]) != len(tokens[1]) or len(tokens[0]) >= self.max_tokens:
            return None
        answers = [self._first_of(*three) for three in zip(prompts, tokens, twins.completion, strict=True)]
        if answers[0] is None or answers[1] is None or answers[0] == answers[1]:
            return None
        return _NaturalPair(tokens, (answers[0], answers[1]), prompts)

    def _cut(self, twins: Twins) -> str | None:
        """The end of the head, from a line's start, that leaves room for the rest; None where nothing does."""
        room = self.max_tokens - 1 - max(len(self._encode(piece + twins.between)) for piece in twins.deciding) - 1
        if room < 0:
            return None
        head = twins.head[-room * _CHARACTERS_PER_TOKEN :] if room else ""
        whole = len(head) == len(twins.head)
        ids = self._encode(head)
        if whole and len(ids) <= room:
            return head
        tail = self._decode(ids[-room:]) if room else ""
        line = tail.find("\n") + 1
        if line:
            return tail[line:]
        return None  # not even the line's own beginning fits

    def _first_of(self, prompt: str, tokens: list[int], completion: str) -> int | None:
        """The completion's first token, unless it joins the prompt's last one or ends inside a word."""
        ids = self._encode(prompt + completion)
        if ids[: len(tokens)] != tokens or len(ids) == len(tokens):
            return None
        answer = self._decode([ids[len(tokens)]])
        rest = completion[len(answer) :]
        if not completion.startswith(answer) or (_in_word(answer[-1:]) and _in_word(rest[:1])):
            return None
        return ids[len(tokens)]

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids))


def _in_word(character: str) -> bool:
    return character.isalnum() or character == "_"


def distances(batch: TaskBatch) -> Int[Tensor, " pair"]:
    """Tokens from the last one in which a pair's members differ to the answer."""
    differ = batch.tokens[:, 0] != batch.tokens[:, 1]
    places = torch.arange(differ.shape[1])
    last = torch.where(differ, places, -1).amax(dim=1)
    return batch.last.cpu() + 1 - last


class Scores(NamedTuple):
    """How a model does on some pairs."""

    pairs: int
    accuracy: float
    """Share of pairs both of whose members prefer their right answer."""
    p_right: float
    """Mean probability of the right answer under the whole vocabulary."""


@torch.no_grad()
def score(
    logits: Callable[[Int[Tensor, "row pos"]], Float[Tensor, "row pos vocab"]],
    batch: TaskBatch,
    pairs_at_once: int = 16,
) -> dict[str, Scores]:
    """A model's scores on a batch: on all pairs, and by the distance from the deciding token to the answer."""
    right, probability = [], []
    for start in range(0, len(batch.last), pairs_at_once):
        rows = slice(start, start + pairs_at_once)
        part = TaskBatch(batch.tokens[rows], batch.answers[rows], batch.last[rows], batch.prompts[rows])
        flat = logits(part.tokens.flatten(0, 1))
        scores = flat.unflatten(0, part.tokens.shape[:2])
        right.append((log_odds(scores, part) > 0).all(dim=1).float().cpu())
        probability.append(answer_probabilities(scores, part)[0].mean(dim=1).cpu())
    rights, probabilities, far = torch.cat(right), torch.cat(probability), distances(batch)
    table = {"all": torch.ones(len(far), dtype=torch.bool)}
    for low, high in zip((0, *DISTANCES), (*DISTANCES, None), strict=True):
        name = f"over {low}" if high is None else str(high) if high == low + 1 else f"{low + 1} to {high}"
        table[name] = (far > low) if high is None else (far > low) & (far <= high)
    return {
        name: Scores(int(chosen.sum()), float(rights[chosen].mean()), float(probabilities[chosen].mean()))
        for name, chosen in table.items()
        if chosen.any()
    }

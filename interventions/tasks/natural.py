"""Tasks whose prompts are places in real, held-out files (`interventions.tasks.mining` finds them).

1. Files are divided into the splits by a hash of their text, so no file gives prompts to two splits.
2. The left context is the file's own, from a line's start, as long as `max_tokens` allows.
3. A pair is kept if its members have the same number of tokens and their answers are two different single tokens.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from interventions.tasks.base import PROMPT_SPLITS, PromptSplit
from interventions.tasks.mining import Twins, mine
from interventions.tasks.names import NATURAL
from interventions.tasks.stock import StockPair, StockTask
from sparse_model.data.text_files import stable_fraction

_TRAIN, _SELECTION = 0.4, 0.7  # 40 % of the files train, 30 % selection, 30 % evaluation
_MOST_PER_FILE = 32
_CHARACTERS_PER_TOKEN = 8


def split_of(text: str) -> PromptSplit:
    """The split that a file's prompts belong to."""
    fraction = stable_fraction(f"natural {text}")
    return "train" if fraction < _TRAIN else "selection" if fraction < _SELECTION else "evaluation"


@dataclass(frozen=True, kw_only=True)
class NaturalTask(StockTask):
    """A task whose pairs come from `texts`; `get_task(..., prompts="natural", texts=...)` makes one."""

    texts: Sequence[str]
    """Files that the models were not trained on."""
    text: str = "given"
    """What they are, in words."""

    @property
    def name(self) -> str:
        return self.spec.name + NATURAL

    @property
    def record(self) -> dict[str, Any]:
        return {"prompts": "natural", "text": self.text}

    @property
    def source(self) -> str:
        return "the held-out files of split {split} give"

    @property
    def remedy(self) -> str:
        return "give more text, or use generated prompts"

    @cached_property
    def stock(self) -> dict[PromptSplit, list[StockPair]]:
        pairs: dict[PromptSplit, list[StockPair]] = {split: [] for split in PROMPT_SPLITS}
        for text in dict.fromkeys(self.texts):
            found = mine(self.spec.name, text)
            random.Random(f"{self.spec.name} {len(text)}").shuffle(found)
            kept = 0
            for twins in found:
                pair = self._encode_twins(twins) if kept < _MOST_PER_FILE else None
                if pair is not None:
                    pairs[split_of(text)].append(pair)
                    kept += 1
        return pairs

    def _encode_twins(self, twins: Twins) -> StockPair | None:
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
        return StockPair(tokens, (answers[0], answers[1]), prompts)

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

"""What counting alone would score on a task: n-gram tables of the training text.

Only the n-grams that some prompt asks for are counted, those of all tasks in one pass over the text.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from interventions.tasks.base import TaskBatch

ORDERS = (2, 3, 5)
"""Bigram, trigram and 5-gram."""

_CHUNK = 1_000_000
_FILTER_BITS = 22
Key = TypeVar("Key", bound=Hashable)


def ngram_floor(training: Int[Tensor, "..."], batch: TaskBatch, n: int) -> float:
    """Pair accuracy of an n-gram table of `training`: 2 is a bigram, which sees one token of the prompt.

    The answer that followed the last n - 1 tokens more often is preferred. Where neither ever followed them, a shorter
    context decides; a tie is wrong, as it is for a model.

    Raises:
        ValueError: n < 1.
    """
    return float(ngrams_right(training, {"": batch}, (n,))[""][n].float().mean())


def ngrams_right(
    training: Int[Tensor, "..."], batches: Mapping[Key, TaskBatch], orders: Sequence[int] = ORDERS
) -> dict[Key, dict[int, Bool[Tensor, " pair"]]]:
    """Which pairs of each batch n-gram tables get right, for every n of `orders`; rules as in `ngram_floor`.

    Raises:
        ValueError: an order < 1.
    """
    if min(orders) < 1:
        raise ValueError(f"n={min(orders)}: must be at least 1; 2 is a bigram")
    grams = {key: _grams(batch, max(orders)) for key, batch in batches.items()}
    counts = _counts(training.reshape(-1).numpy(), np.concatenate([g.reshape(-1, max(orders)) for g in grams.values()]))
    start, right = 0, {}
    for key, asked in grams.items():
        stop = start + asked[..., 0].size
        right[key] = _decide(counts[:, start:stop].reshape(-1, *asked.shape[:3]), orders)
        start = stop
    return right


def _grams(batch: TaskBatch, longest: int) -> np.ndarray:
    """[pair, member, answer, place]: the right or wrong answer and the tokens before it, backwards; else -1."""
    tokens, last = batch.tokens.cpu().numpy(), batch.last.cpu().numpy()
    places = last[:, None] - np.arange(longest - 1)
    context = np.take_along_axis(tokens, np.maximum(places, 0)[:, None].repeat(2, 1), 2)
    context = np.where(places[:, None] < 0, -1, context)
    answers = batch.answers.cpu().numpy()
    both = np.stack([answers, answers[:, ::-1]], 2)
    return np.concatenate([both[..., None], context[:, :, None].repeat(2, 2)], 3)


def _decide(counts: np.ndarray, orders: Sequence[int]) -> dict[int, Bool[Tensor, " pair"]]:
    """From how often each [order, pair, member, answer] occurred, which pairs are right."""
    right = {}
    for n in orders:
        member_right = np.zeros(counts.shape[1:3], bool)
        undecided = np.ones_like(member_right)
        for order in range(n, 0, -1):
            occurred = counts[order - 1]
            decides = undecided & occurred.any(axis=2)
            member_right[decides] = (occurred[..., 0] > occurred[..., 1])[decides]
            undecided &= ~decides
        right[n] = torch.from_numpy(member_right.all(axis=1))
    return right


def _counts(stream: np.ndarray, grams: np.ndarray) -> np.ndarray:
    """[order, gram]: how often the first 1, 2, ... tokens of each row of `grams`, which runs backwards, occur."""
    longest = grams.shape[1]
    wanted = [_Wanted(keys) for keys in _keys(grams.T)]
    for start in range(0, len(stream), _CHUNK):
        # The chunk's own tokens are the last of their n-grams; what precedes it is only looked back on.
        before = min(start, longest - 1)
        part = stream[start - before : start + _CHUNK]
        ends = len(part) - before
        columns = np.full((longest, ends), -2, np.int64)
        for back in range(longest):
            first = before - back
            columns[back, max(0, -first) :] = part[max(0, first) : first + ends]
        for order, keys in zip(wanted, _keys(columns), strict=True):
            order.add(keys)
    return np.stack([order.counts() for order in wanted])


class _Wanted:
    """Numbers that are looked for among many."""

    def __init__(self, keys: np.ndarray) -> None:
        self._sorted, self._rows = np.unique(keys, return_inverse=True)
        self._count = np.zeros(len(self._sorted), np.int64)
        self._may_be = np.zeros(1 << _FILTER_BITS, bool)  # most of the text is nothing that is asked for
        self._may_be[_low(keys)] = True

    def add(self, keys: np.ndarray) -> None:
        """Count `keys`."""
        keys = keys[self._may_be[_low(keys)]]
        at = np.minimum(np.searchsorted(self._sorted, keys), len(self._sorted) - 1)
        self._count += np.bincount(at[self._sorted[at] == keys], minlength=len(self._count))

    def counts(self) -> np.ndarray:
        """How often each of the numbers was there."""
        return self._count[self._rows.reshape(-1)]


def _low(keys: np.ndarray) -> np.ndarray:
    return (keys >> np.uint64(64 - _FILTER_BITS)).astype(np.int64)


def _keys(columns: np.ndarray) -> list[np.ndarray]:
    """For the first 1, 2, ... rows, a 64-bit number for each column; two that differ share one about never."""
    keys, every = np.zeros(columns.shape[1], np.uint64), []
    for row in columns:
        keys = (keys ^ row.astype(np.int64).astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        keys ^= keys >> np.uint64(29)
        every.append(keys)
    return every

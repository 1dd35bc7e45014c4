"""What counting alone would score on a task: n-gram tables of the training text."""

import numpy as np
from jaxtyping import Int
from torch import Tensor

from interventions.tasks.base import TaskBatch

_CHUNK = 4_000_000


def ngram_floor(training: Int[Tensor, "..."], batch: TaskBatch, n: int) -> float:
    """Pair accuracy of an n-gram table of `training`: 2 is a bigram, which sees one token of the prompt.

    The answer that followed the last n - 1 tokens more often is preferred. Where neither ever followed them, a shorter
    context decides; a tie is wrong, as it is for a model.

    Raises:
        ValueError: n < 1.
    """
    if n < 1:
        raise ValueError(f"n={n}: must be at least 1; 2 is a bigram")
    stream = training.reshape(-1).numpy()
    ends = [(pair, member) for pair in range(len(batch.last)) for member in (0, 1)]
    right = np.zeros((len(batch.last), 2), bool)
    undecided = np.ones((len(batch.last), 2), bool)
    for order in range(n, 0, -1):
        grams = np.array(
            [[_gram(batch, pair, member, order, answer) for answer in (member, 1 - member)] for pair, member in ends]
        )
        counts = _counts(stream, grams.reshape(-1, order)).reshape(-1, 2, 2)
        decides = undecided & counts.any(axis=2)
        right[decides] = (counts[..., 0] > counts[..., 1])[decides]
        undecided &= ~decides
    return float(right.all(axis=1).mean())


def _gram(batch: TaskBatch, pair: int, member: int, order: int, answer: int) -> list[int]:
    """The last tokens of a prompt with an answer, `order` together; -1 before the prompt begins."""
    end = int(batch.last[pair]) + 1
    context = batch.tokens[pair, member, max(0, end - order + 1) : end].tolist()
    return [-1] * (order - 1 - len(context)) + context + [int(batch.answers[pair, answer])]


def _counts(stream: np.ndarray, grams: np.ndarray) -> np.ndarray:
    """How often each row of `grams` occurs in `stream`."""
    wanted, rows = np.unique(grams, axis=0, return_inverse=True)
    found = np.zeros(len(wanted), np.int64)
    keys = _keys(wanted.T)
    order = np.argsort(keys)
    width = grams.shape[1]
    for start in range(0, len(stream) - width + 1, _CHUNK):
        part = stream[start : start + _CHUNK + width - 1]
        length = len(part) - width + 1
        here = _keys(np.stack([part[place : place + length] for place in range(width)]))
        at = np.minimum(np.searchsorted(keys[order], here), len(keys) - 1)
        hits = at[keys[order][at] == here]
        found[order] += np.bincount(hits, minlength=len(keys))
    return found[rows.reshape(-1)]


def _keys(columns: np.ndarray) -> np.ndarray:
    """A 64-bit number for each column of token ids; two that differ share one with a chance of 2**-64 or so."""
    keys = np.zeros(columns.shape[1], np.uint64)
    for row in columns:
        keys = (keys ^ row.astype(np.int64).astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        keys ^= keys >> np.uint64(29)
    return keys

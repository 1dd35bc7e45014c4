"""Held-out files as rows of tokens, each token marked by where it leaves the text: inside, in the twin, outside.

1. A row is a piece of a file from the line on where a statement begins, so that whatever is open was opened in the row.
2. No two rows share text, and no row is among those of another split.
3. A token is marked by the place behind its last character.
"""

import tokenize
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from interventions.tasks.base import PromptSplit
from interventions.tasks.natural import split_of
from interventions.tasks.predicates import OUTSIDE, PREDICATES, Places, places, template_contexts
from interventions.tasks.python_tokens import Piece, python_pieces
from sparse_model.data.duplicates import SeenTexts, signature
from sparse_model.data.text_files import stable_fraction

UNMARKED = -1
_CHARACTERS_PER_TOKEN = 8


class MarkedText(NamedTuple):
    """Rows of tokens, each beginning with end-of-text and padded with it."""

    tokens: Int[Tensor, "row pos"]
    label: Int[Tensor, "row pos"]
    """OUTSIDE, INSIDE or TWIN (`interventions.tasks.predicates`); UNMARKED for end-of-text and padding."""
    new: Bool[Tensor, "row pos"]
    """Whether a token's context is none that the task's templates have; outside it is."""
    files: int


class _Row(NamedTuple):
    tokens: tuple[int, ...]
    label: list[int]
    new: list[bool]


def marked_texts(
    task: str, texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, n_ctx: int, most_tokens: int, of_file: int
) -> dict[PromptSplit, MarkedText]:
    """The selection and the evaluation split of `texts` by the predicate of `task`, about so many tokens each.

    Files are taken in a random order, of each about `of_file` tokens, from all over it. Those that resemble another are
    left out, and those that are no Python.
    """
    order = sorted(_different(tuple(texts)), key=lambda text: stable_fraction(f"marked {text}"))
    seen: set[tuple[int, ...]] = set()
    splits: dict[PromptSplit, MarkedText] = {}
    for split in ("selection", "evaluation"):
        rows: list[_Row] = []
        count = files = 0
        for text in (text for text in order if split_of(text) == split):
            if count >= most_tokens:
                break
            new = [row for row in _rows(task, text, tokenizer, n_ctx, of_file) if row.tokens not in seen]
            seen |= {row.tokens for row in new}
            rows += new
            count += sum(len(row.tokens) for row in new)
            files += bool(new)
        splits[split] = _stacked(rows, n_ctx, tokenizer.eos_token_id, files)
    return splits


@lru_cache(maxsize=2)
def _different(texts: tuple[str, ...]) -> tuple[str, ...]:
    """The texts less those that resemble an earlier one."""
    seen, kept = SeenTexts(), []
    for text in texts:
        marks = signature(text)
        if not seen.resembles(marks):
            seen.add(marks)
            kept.append(text)
    return tuple(kept)


@lru_cache(maxsize=256)
def _pieces(text: str) -> list[Piece]:
    """The tokens of Python of a file; none where it is no Python. Kept, for every task and channel asks again."""
    try:
        return python_pieces(text)
    except (SyntaxError, tokenize.TokenError):
        return []


def _rows(task: str, text: str, tokenizer: PreTrainedTokenizerFast, n_ctx: int, of_file: int) -> list[_Row]:
    pieces = _pieces(text)
    where, known = places(PREDICATES[task], text, pieces), template_contexts(task)
    parts = _cut(text, pieces, tokenizer, n_ctx - 1, of_file)
    rows = [_row(ids, ends, where, known) for ids, ends in parts]
    return list({row.tokens: row for row in rows}.values())


def _cut(
    text: str, pieces: list[Piece], tokenizer: PreTrainedTokenizerFast, room: int, of_file: int
) -> Iterator[tuple[list[int], list[int]]]:
    """Parts of a text that share nothing: their tokens, and the place behind each."""
    starts = [text.rfind("\n", 0, piece.start) + 1 for piece in pieces if piece.statement and piece.text]
    rows = max(1, of_file // room)
    free = 0
    for start in starts[:: max(1, len(starts) // rows)][:rows]:
        if start < free:
            continue
        encoded = tokenizer(
            text[start : start + _CHARACTERS_PER_TOKEN * room],
            add_special_tokens=False,
            split_special_tokens=True,
            return_offsets_mapping=True,
        )
        ids, ends = encoded["input_ids"][:room], [start + end for _, end in encoded["offset_mapping"][:room]]
        if ids:
            yield ids, ends
            free = ends[-1]


def _row(ids: list[int], ends: list[int], where: Places, known: frozenset[str]) -> _Row:
    label = [int(where.label[end]) for end in ends]
    new = [of == OUTSIDE or where.context(end) not in known for of, end in zip(label, ends, strict=True)]
    return _Row(tuple(ids), label, new)


def _stacked(rows: list[_Row], n_ctx: int, end_of_text: int, files: int) -> MarkedText:
    def padded(rows: list[list[int]], first: int, filler: int) -> Int[Tensor, "row pos"]:
        return torch.tensor([[first, *row, *[filler] * (n_ctx - 1 - len(row))] for row in rows]).view(-1, n_ctx)

    return MarkedText(
        padded([list(row.tokens) for row in rows], end_of_text, end_of_text),
        padded([row.label for row in rows], UNMARKED, UNMARKED),
        padded([list(map(int, row.new)) for row in rows], 0, 0).bool(),
        files,
    )

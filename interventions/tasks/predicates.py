"""What a task's feature is in real Python: where in a file it holds, where its twin does.

A *place* lies behind a character of a file, and is named by the number of characters before it: what a causal model
has read there. Behind `("ab` a double-quoted string is open, behind `("ab"` none is. The *context* of a place says how
it came to be: Python's tokens from the one before that which opened it, names, numbers and strings by their kind.
The tasks whose feature is which of two names stood there have no predicate.
"""

import keyword
import random
import re
import tokenize
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np

from interventions.tasks.catalogue import TASKS
from interventions.tasks.python_tokens import (
    FSTRING_ENDS,
    FSTRING_STARTS,
    Bracket,
    Piece,
    Statement,
    brackets,
    next_piece,
    python_pieces,
    statements,
)

OUTSIDE, INSIDE, TWIN = 0, 1, 2
"""Labels of places."""
_OPENING = re.compile("([a-zA-Z]*)(\"\"\"|'''|\"|')")
_FILLINGS = 20


class Span(NamedTuple):
    """Places of one label."""

    first: int
    """The first of them."""
    end: int
    """The first place behind them."""
    label: int
    opened_by: int
    """Index of the piece that opens it."""
    grows: bool = True
    """Whether a place's context goes on to the place; inside a string it ends with the quote that opened it."""


class Predicate(NamedTuple):
    """A task's feature in real Python."""

    inside: str
    """Where it holds, in words."""
    twin: str
    """Where the other member's feature holds."""
    member: Literal[0, 1]
    """Of the task's pairs the one that has it: channels are positive for member 0."""
    spans: Callable[[list[Piece]], Iterator[Span]]
    """Later ones hide what they share with earlier ones."""


class Places(NamedTuple):
    """All places of a text."""

    label: np.ndarray
    """By place."""
    spans: np.ndarray
    """Index of the place's span; -1 outside all."""
    found: list[Span]
    pieces: list[Piece]

    def context(self, place: int) -> str:
        """The context of a place in a span."""
        return context(self.pieces, self.found[self.spans[place]], place)


def places(predicate: Predicate, text: str, pieces: list[Piece]) -> Places:
    """The places of a text with the pieces given, labelled."""
    found = list(predicate.spans(pieces))
    label, spans = np.zeros(len(text) + 1, dtype=np.int8), np.full(len(text) + 1, -1)
    for number, span in enumerate(found):
        label[span.first : span.end] = span.label
        spans[span.first : span.end] = number
    return Places(label, spans, found, pieces)


def context(pieces: Sequence[Piece], span: Span, place: int) -> str:
    """How a place of a span came to be."""
    opened, first = span.opened_by, max(0, span.opened_by - 1)
    last = bisect_left(pieces, place, key=lambda piece: piece.start) if span.grows else opened
    kinds = [_kind(piece) for piece in pieces[first : max(last, opened)]]
    return " ".join([*kinds, *([] if span.grows else [_opening(pieces[opened])])])


def _kind(piece: Piece) -> str:
    mark = "\n" if piece.statement else ""
    if piece.kind == tokenize.NAME and not keyword.iskeyword(piece.text):
        return mark + "name"
    kinds = {tokenize.NUMBER: "number", tokenize.STRING: "string"}
    return mark + kinds.get(piece.kind, piece.text)


def _opening(piece: Piece) -> str:
    """Prefix and quote of a string."""
    match = _OPENING.match(piece.text)
    return "".join(match.groups()).lower() if match else piece.text


@lru_cache(maxsize=32)
def template_contexts(task: str) -> frozenset[str]:
    """The contexts that prompts from a task's templates have, those of every split."""
    spec = TASKS[task]
    rng, predicate = random.Random(f"contexts of {task}"), PREDICATES[task]
    contexts: set[str] = set()
    for template in (template for templates in spec.templates.values() for template in templates):
        for _ in range(_FILLINGS):
            pair = spec.make(rng, template)
            for prompt, completion in zip(pair.prompt, pair.completion, strict=True):
                pieces = python_pieces(prompt + completion)
                for span in predicate.spans(pieces):
                    ends = [piece.end for piece in pieces if span.first <= piece.end < span.end]
                    contexts |= {context(pieces, span, place) for place in (span.first, *ends)}
    return frozenset(contexts)


def _strings(pieces: list[Piece], label: Callable[[str], int]) -> Iterator[Span]:
    """The inside of every string; label: of its prefix and quote. Of nested ones the inner comes later."""
    found, stack = [], []
    for number, piece in enumerate(pieces):
        if piece.kind in FSTRING_STARTS:
            stack.append(number)
        elif piece.kind == tokenize.STRING or (piece.kind in FSTRING_ENDS and stack):
            opened = number if piece.kind == tokenize.STRING else stack.pop()
            opening = _opening(pieces[opened])
            first = pieces[opened].start + len(opening)
            found.append(Span(first, piece.end, label(opening), opened, grows=False))
    yield from sorted(found)


def _quotes(pieces: list[Piece]) -> Iterator[Span]:
    return _strings(pieces, lambda opening: INSIDE if opening[-1] == '"' else TWIN)


def _fstrings(pieces: list[Piece]) -> Iterator[Span]:
    return _strings(pieces, lambda opening: INSIDE if "f" in opening else TWIN)


def _within(pieces: list[Piece], bracket: Bracket, label: int) -> Span:
    return Span(pieces[bracket.opening].end, pieces[bracket.closing].end, label, bracket.opening)


def _depth(pieces: list[Piece]) -> Iterator[Span]:
    return (_within(pieces, bracket, INSIDE if bracket.depth > 1 else TWIN) for bracket in brackets(pieces))


def _bracket_kind(pieces: list[Piece]) -> Iterator[Span]:
    """Of the innermost bracket; one that indexes is neither."""
    for bracket in brackets(pieces):
        text, before = pieces[bracket.opening].text, pieces[max(0, bracket.opening - 1)]
        indexes = before.kind in (tokenize.NAME, tokenize.STRING) and not keyword.iskeyword(before.text)
        indexes = bracket.opening > 0 and (indexes or before.text in (")", "]"))
        label = INSIDE if text == "{" else TWIN if text == "[" and not indexes else OUTSIDE
        yield _within(pieces, bracket, label)


def _headers(pieces: list[Piece], word: str, label: int) -> Iterator[Span]:
    """From behind a header's keyword to before its colon."""
    for statement in statements(pieces):
        if statement.header and pieces[statement.word].text == word:
            yield Span(pieces[statement.word].end, pieces[statement.end - 1].end, label, statement.word)


def _returns(pieces: list[Piece], label: int) -> Iterator[Span]:
    """From behind `return` to behind the last of what is returned."""
    for statement in statements(pieces):
        if pieces[statement.word].text == "return":
            yield Span(pieces[statement.word].end, pieces[statement.end - 1].end + 1, label, statement.word)


def _both(*spans: Iterator[Span]) -> Iterator[Span]:
    return iter(sorted(span for kind in spans for span in kind))


def _for_headers(pieces: list[Piece]) -> Iterator[Span]:
    return _both(_headers(pieces, "for", INSIDE), _headers(pieces, "while", TWIN))


def _while_headers(pieces: list[Piece]) -> Iterator[Span]:
    return _both(_headers(pieces, "while", INSIDE), _returns(pieces, TWIN))


def _with_headers(pieces: list[Piece]) -> Iterator[Span]:
    """Of a `with` up to the first name that it gives."""
    for span in _headers(pieces, "with", INSIDE):
        ends = (piece.end for piece in pieces[span.opened_by :] if piece.text == "as")
        yield span._replace(end=min(span.end, next(ends, span.end)))
    yield from _returns(pieces, TWIN)


def _elses(pieces: list[Piece]) -> Iterator[Span]:
    return _both(_headers(pieces, "else", INSIDE), _headers(pieces, "elif", TWIN))


def _ifs(pieces: list[Piece]) -> Iterator[Span]:
    """The condition of a statement, or that of a conditional expression."""
    yield from _headers(pieces, "if", INSIDE)
    heads = {statement.word for statement in statements(pieces)}
    for number, piece in enumerate(pieces):
        end = _else_of(pieces, number) if piece.text == "if" and number not in heads else None
        if end is not None:
            yield Span(piece.end, pieces[end].end, TWIN, number)


def _else_of(pieces: list[Piece], number: int) -> int | None:
    """The `else` of a conditional expression's `if`; None for that of a comprehension."""
    depth = 0
    for at in range(number + 1, len(pieces)):
        piece = pieces[at]
        depth += piece.step
        if depth < 0 or piece.statement or (depth == 0 and piece.text in (",", "for", "if", ":")):
            return None
        if depth == 0 and piece.text == "else":
            return at
    return None


def _assignments(pieces: list[Piece]) -> Iterator[tuple[Statement, int]]:
    """Statements that assign, and the index of their first `=`."""
    for statement in statements(pieces):
        depth = 0
        for number in range(statement.word, statement.end):
            piece = pieces[number]
            depth += piece.step
            if depth == 0 and piece.text == "=" and not statement.header:
                yield statement, number
                break


def _loop_lines(pieces: list[Piece]) -> Iterator[Span]:
    for span in _headers(pieces, "for", INSIDE):
        yield span._replace(end=span.end + 1)  # the line break comes behind the colon
    for statement, _ in _assignments(pieces):
        first, last = pieces[statement.word], pieces[statement.end - 1]
        yield Span(first.end, last.end + 1, TWIN, statement.word)


def _comparisons(pieces: list[Piece]) -> Iterator[Span]:
    yield from _headers(pieces, "if", INSIDE)
    for statement, equals in _assignments(pieces):
        yield Span(pieces[equals].end, pieces[statement.end - 1].end + 1, TWIN, equals)


def _targets(pieces: list[Piece]) -> Iterator[Span]:
    yield from _headers(pieces, "if", INSIDE)
    for statement, equals in _assignments(pieces):
        yield Span(pieces[statement.word].end, pieces[equals].end, TWIN, statement.word)


def _lambdas(pieces: list[Piece]) -> Iterator[Span]:
    """The parameters of a lambda, or the name of a function."""
    for number, piece in enumerate(pieces):
        if piece.text == "lambda":
            end = next_piece(pieces, number, ":")
            yield from [] if end is None else [Span(piece.end, pieces[end].end, INSIDE, number)]
        elif piece.text == "def":
            end = next_piece(pieces, number, "(")
            yield from [] if end is None else [Span(piece.end, pieces[end].end, TWIN, number)]


def _defaults(pieces: list[Piece]) -> Iterator[Span]:
    """A function's parameters from the first default on, or before it."""
    closings = {bracket.opening: bracket.closing for bracket in brackets(pieces)}
    for number, piece in enumerate(pieces):
        opening = next_piece(pieces, number, "(") if piece.text == "def" else None
        if opening is None or opening not in closings:
            continue
        equals = next_piece(pieces, opening, "=")
        end = pieces[closings[opening]].end
        yield Span(pieces[opening].end, end, TWIN, opening)
        if equals is not None and equals < closings[opening]:
            yield Span(pieces[equals].end, end, INSIDE, opening)


def _loop_variables(pieces: list[Piece]) -> Iterator[Span]:
    """Of a loop or comprehension: two variables from the comma on, one behind its `in`."""
    for number, piece in enumerate(pieces):
        at = next_piece(pieces, number, "in") if piece.text == "for" else None
        if at is None:
            continue
        comma = next((n for n in range(number, at) if pieces[n].text == ","), None)
        label, first = (TWIN, at) if comma is None else (INSIDE, comma)
        yield Span(pieces[first].end, pieces[at].end + 1, label, number)


PREDICATES: Mapping[str, Predicate] = {
    "single_double_quote": Predicate("in a double-quoted string", "in a single-quoted string", 0, _quotes),
    "bracket_counting": Predicate("in two brackets or more", "in one bracket", 1, _depth),
    "final_kwarg": Predicate("in parameters behind a default", "in parameters before any default", 0, _defaults),
    "with_as": Predicate("in a with header before as", "in a return statement", 0, _with_headers),
    "bracket_brace": Predicate("directly in { }", "directly in a list's [ ]", 0, _bracket_kind),
    "for_while": Predicate("in a for header", "in a while header", 0, _for_headers),
    "else_elif": Predicate("between else and its colon", "in an elif header", 0, _elses),
    "fstring_brace": Predicate("in an f-string", "in another string", 0, _fstrings),
    "if_ternary": Predicate("in an if header", "in the condition of an if expression", 0, _ifs),
    "indent_for": Predicate("in the line of a for header", "in an assignment", 0, _loop_lines),
    "lambda_func": Predicate("in a lambda's parameters", "between def and its bracket", 0, _lambdas),
    "if_equals": Predicate("in an if header", "in an assignment before =", 0, _targets),
    "enumerate_range": Predicate("behind two loop variables", "behind one loop variable", 0, _loop_variables),
    "var_if": Predicate("in an if header", "in an assignment behind =", 0, _comparisons),
    "while_return_true": Predicate("in a while header", "in a return statement", 1, _while_headers),
}
"""By task."""

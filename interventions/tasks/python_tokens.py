"""The tokens of Python source with their places in the text, its brackets and its statements."""

import io
import re
import tokenize
from collections.abc import Iterator
from typing import NamedTuple

_STARTS = {tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING}

FSTRING_STARTS = {getattr(tokenize, name, -1) for name in ("FSTRING_START", "TSTRING_START")} - {-1}
FSTRING_ENDS = {getattr(tokenize, name, -1) for name in ("FSTRING_END", "TSTRING_END")} - {-1}
"""Kinds of tokens that exist from Python 3.12 on; before, an f-string is one STRING."""
_COMPOUND = {"if", "elif", "else", "for", "while", "with", "try", "except", "finally", "def", "class", "async"}


class Piece(NamedTuple):
    """One token that is neither a comment nor white space."""

    kind: int
    """As `tokenize` numbers it."""
    text: str
    start: int
    """Characters before it."""
    end: int
    first: bool
    """Whether it is the first of its line."""
    statement: bool
    """Whether it begins a line that goes on with no statement and no bracket of earlier lines."""

    @property
    def step(self) -> int:
        """1 for an opening bracket, -1 for a closing one."""
        return (self.text in ("(", "[", "{")) - (self.text in (")", "]", "}"))


def python_pieces(text: str) -> list[Piece]:
    """The tokens of a text. Raises SyntaxError or tokenize.TokenError where it is no Python."""
    line_starts = [0, *(match.end() for match in re.finditer("\n", text))]
    pieces: list[Piece] = []
    before, statement = tokenize.ENCODING, True
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        start, end = (
            line_starts[row - 1] + column if row <= len(line_starts) else len(text)
            for row, column in (token.start, token.end)
        )
        if token.type not in (tokenize.COMMENT, *_STARTS):
            pieces.append(Piece(token.type, token.string, start, end, before in _STARTS, statement))
            statement = False
        before = token.type
        statement = statement or before == tokenize.NEWLINE  # NL ends no statement
    return pieces


class Bracket(NamedTuple):
    opening: int
    """Index of the piece."""
    closing: int
    depth: int
    """How many brackets are open inside it."""


def brackets(pieces: list[Piece]) -> list[Bracket]:
    """All brackets, in the order in which they open; those in the fields of f-strings aside."""
    found, stack, strings = [], [], 0
    for number, piece in enumerate(pieces):
        strings += (piece.kind in FSTRING_STARTS) - (piece.kind in FSTRING_ENDS)
        if piece.kind != tokenize.OP or strings:
            continue
        if piece.text in "([{":
            stack.append(number)
        elif piece.text in ")]}" and stack:
            opening = stack.pop()
            found.append(Bracket(opening, number, len(stack) + 1))
    return sorted(found)


class Statement(NamedTuple):
    """A simple statement, or the header of a compound one."""

    word: int
    """Index of its first piece, `async` aside."""
    end: int
    """Index behind its last piece; of a header that is the colon."""
    header: bool


def statements(pieces: list[Piece]) -> Iterator[Statement]:
    """The statements of a text in its order; those behind a header's colon, or a semicolon, are statements too."""
    first, depth, lambdas = 0, 0, 0

    def ended(end: int, header: bool = False) -> Iterator[Statement]:
        if first < end:
            word = first + (pieces[first].text == "async" and first + 1 < end)
            yield Statement(word, end, header)

    for number, piece in enumerate(pieces):
        if piece.statement:
            yield from ended(number)
            first, depth, lambdas = number, 0, 0
        depth += piece.step
        if depth:
            continue
        lambdas += piece.text == "lambda"
        if piece.text == ";":
            yield from ended(number)
            first = number + 1
        elif piece.text == ":" and lambdas:
            lambdas -= 1
        elif piece.text == ":" and pieces[first].text in _COMPOUND:
            yield from ended(number + 1, header=True)
            first = number + 1


def next_piece(pieces: list[Piece], number: int, wanted: str) -> int | None:
    """The next such piece outside brackets that open behind `number`."""
    depth = 0
    for at in range(number + 1, len(pieces)):
        piece = pieces[at]
        if depth == 0 and piece.text == wanted:
            return at
        depth += piece.step
    return None

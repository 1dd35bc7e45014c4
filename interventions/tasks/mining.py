"""Pairs of prompts in real Python: places in a file where exchanging a keyword, quote, bracket or name alone decides
what comes next, and what then comes next in either case.

One of the two members is the file's own text. The other is that text with the deciding piece exchanged.
"""

import ast
import re
import tokenize
import warnings
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import NamedTuple

from interventions.tasks.python_tokens import Piece, python_pieces

Strings = tuple[str, str]

_SIMPLE_STRING = re.compile(r"""([rbuRBU]*)(["'])([^"'\\\n]+)\2""")
_SWAP = re.compile(r"(?m)^([ \t]*)(\w+), (\w+) = \3,( \2)$")
_CLOSING = {"(": ")", "[": "]"}
_LONGEST_BETWEEN = 400
_AFTER = 40


class Twins(NamedTuple):
    """A place in a file, and its two readings."""

    head: str
    """The file up to the deciding piece."""
    deciding: Strings
    """The deciding piece in member 0 and member 1."""
    between: str
    """What stands between it and the answer, the same in both."""
    completion: Strings
    """What follows; begins with the answer."""


def _quotes(text: str, pieces: list[Piece]) -> Iterator[Twins]:
    for piece in pieces:
        match = piece.kind == tokenize.STRING and _SIMPLE_STRING.fullmatch(piece.text)
        if match:
            rest = text[piece.end : piece.end + _AFTER]
            head = text[: piece.start + len(match[1])]
            yield Twins(head, ('"', "'"), match[3], ('"' + rest, "'" + rest))


def _brackets(text: str, pieces: list[Piece]) -> Iterator[Twins]:
    """Two brackets that open and close side by side; member 0 lacks the inner one."""
    closing, stack = {}, []
    for piece in pieces:
        if piece.kind == tokenize.OP and piece.text in "([{":
            stack.append(piece.start)
        elif piece.kind == tokenize.OP and piece.text in ")]}" and stack:
            closing[stack.pop()] = piece.start
    for outer, inner in pairwise(pieces):
        if outer.text not in _CLOSING or inner.text not in _CLOSING or outer.end != inner.start:
            continue
        end = closing.get(inner.start, -1)
        if closing.get(outer.start) == end + 1 and inner.end < end < inner.end + _LONGEST_BETWEEN:
            rest = text[end + 2 : end + 2 + _AFTER]
            flat = _CLOSING[outer.text]
            yield Twins(
                text[: outer.start],
                (outer.text, outer.text + inner.text),
                text[inner.end : end],
                (flat + rest, _CLOSING[inner.text] + flat + rest),
            )


def _braces(text: str, pieces: list[Piece]) -> Iterator[Twins]:
    """The first key of a dict, which in a list would be the first element."""
    for opening, key, colon in zip(pieces, pieces[1:], pieces[2:], strict=False):
        if (
            opening.text != "{"
            or colon.text != ":"
            or key.kind not in (tokenize.STRING, tokenize.NAME, tokenize.NUMBER)
        ):
            continue
        if key.kind == tokenize.STRING and not _SIMPLE_STRING.fullmatch(key.text):
            continue
        quote = key.text[-1] if key.kind == tokenize.STRING else ""
        end = key.end - len(quote)
        rest = text[colon.end : colon.end + _AFTER]
        yield Twins(text[: opening.start], ("{", "["), text[opening.end : end], (f"{quote}:{rest}", f"{quote},{rest}"))


def _loops(text: str, pieces: list[Piece]) -> Iterator[Twins]:
    for keyword, name, after in zip(pieces, pieces[1:], pieces[2:], strict=False):
        if (
            keyword.statement
            and name.kind == tokenize.NAME
            and (keyword.text, after.text) in (("for", "in"), ("while", ":"))
        ):
            own = text[name.end : name.end + _AFTER]
            completion = (own, ":\n") if keyword.text == "for" else (" in items:\n", own)
            yield Twins(text[: keyword.start], ("for", "while"), text[keyword.end : name.end], completion)


def _true(text: str, pieces: list[Piece]) -> Iterator[Twins]:
    for keyword, name in pairwise(pieces):
        rest = text[name.end : name.end + _AFTER]
        if keyword.statement and keyword.text == "return" and name.text == "True" and rest.lstrip(" ").startswith("\n"):
            yield Twins(text[: keyword.start], ("return", "while"), text[keyword.end : name.end], (rest, ":\n"))


def _with(text: str, pieces: list[Piece]) -> Iterator[Twins]:
    """`with ... as`; after `return ...` the next line is one level less deep, or nothing follows."""
    for number, keyword in enumerate(pieces):
        indent = keyword.start - 1 - text.rfind("\n", 0, keyword.start)
        if keyword.text != "with" or not keyword.statement or indent < 8:
            continue
        for before, word in pairwise(pieces[number : number + 60]):
            if word.first:
                break
            if word.text == "as" and word.start == before.end + 1:
                rest = (text[before.end : before.end + _AFTER], "\n" + " " * (indent - 4) + "x")
                yield Twins(text[: keyword.start], ("with", "return"), text[keyword.end : before.end], rest)
                break


def _branches(text: str, pieces: list[Piece]) -> Iterator[Twins]:
    for piece in pieces:
        if piece.statement and piece.text == "elif":
            yield Twins(text[: piece.start], ("else", "elif"), "", (":\n", text[piece.end : piece.end + _AFTER]))


def _attributes(text: str, pieces: list[Piece]) -> Iterator[Twins]:
    """`self.x = x` in `__init__`; the other member names another parameter that has no attribute so far."""
    lines = text.split("\n")
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line) + 1)
    for node in ast.walk(_parse(text)):
        if not isinstance(node, ast.FunctionDef) or node.name != "__init__":
            continue
        left = [argument.arg for argument in (*node.args.args[1:], *node.args.kwonlyargs)]
        for statement in node.body:
            match = re.fullmatch(r"( +self\.)(\w+) = \2", lines[statement.lineno - 1])
            if not match or match[2] not in left:
                continue
            left.remove(match[2])
            if left:
                names = (match[2], left[0])
                head = text[: starts[statement.lineno - 1]] + match[1]
                yield Twins(head, names, " =", (f" {names[0]}\n", f" {names[1]}\n"))


def _parse(text: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(text)


def _swaps(text: str, pieces: list[Piece]) -> Iterator[Twins]:
    for match in _SWAP.finditer(text):
        a, b = match[2], match[3]
        if a != b:
            deciding = (f"{a}, {b} = {b},", f"{b}, {a} = {a},")
            yield Twins(text[: match.end(1)], deciding, "", (f" {a}\n", f" {b}\n"))


MINERS: Mapping[str, Callable[[str, list[Piece]], Iterator[Twins]]] = {
    "single_double_quote": _quotes,
    "bracket_counting": _brackets,
    "bracket_brace": _braces,
    "for_while": _loops,
    "while_return_true": _true,
    "with_as": _with,
    "else_elif": _branches,
    "class_init": _attributes,
    "var_swap": _swaps,
}
"""The tasks that real text contains often enough, each with what finds it."""


def mine(task: str, text: str) -> list[Twins]:
    """The pairs of `task` in the text of a file, in its order; none where the text is not Python."""
    try:
        return list(MINERS[task](text, python_pieces(text)))
    except (SyntaxError, ValueError, tokenize.TokenError, RecursionError):
        return []

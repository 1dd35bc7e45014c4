"""A document's text in bounded pieces, so that no file is ever held whole.

Pieces are cut before a line end that follows a letter or digit, where the tokenizers of this library, of GPT-2 and of
its successors cut too: the pieces' tokens, one after another, are the document's. Only a document of over `PIECE`
characters has more than one piece.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

PIECE = 2**18
"""Most characters of a piece."""
LONGEST_WORD = 4096
"""Most characters without a blank, or of nothing but blanks, that a tokenizer is given at once."""

_LONG_WORD = re.compile(rf"\S{{{LONGEST_WORD + 1},}}|\s{{{LONGEST_WORD + 1},}}")
_WORD_END = re.compile(r"(?<=\w)\W")


def read_pieces(path: Path) -> Iterator[str]:
    """The text of a UTF-8 file, with or without a mark, and with any line ends."""
    with path.open(encoding="utf-8-sig") as file:
        yield from _cut(iter(lambda: file.read(PIECE), ""))


def pieces_of(text: str) -> Iterator[str]:
    """The pieces of a text that is in memory."""
    yield from _cut(text[start : start + PIECE] for start in range(0, len(text), PIECE))


def _cut(blocks: Iterable[str]) -> Iterator[str]:
    text = ""
    for block in blocks:
        text += block
        while len(text) > PIECE:
            end = _end(text)
            yield text[:end]
            text = text[end:]
    if text:
        yield text


def _end(text: str) -> int:
    """Where to cut the first `PIECE` characters: before a line end, else before a space, else at their end."""
    for blank, may_precede in (("\n", str.isalnum), (" ", str.isprintable)):
        end = text.rfind(blank, PIECE // 2, PIECE)
        while end > 0:
            if may_precede(text[end - 1]) and text[end - 1] != " ":
                return end
            end = text.rfind(blank, PIECE // 2, end)
    return PIECE


def head_of(document: Iterable[str], characters: int) -> str:
    """The beginning of a document, reading no more of it."""
    pieces, length = [], 0
    for piece in document:
        pieces.append(piece)
        length += len(piece)
        if length >= characters:
            break
    return "".join(pieces)[:characters]


def parts_of(text: str, names: Sequence[str] = ()) -> list[str]:
    """A text cut inside words of over `LONGEST_WORD` characters: tokenizers take time that grows with a word's square.

    Joined, the parts are the text. A word with punctuation is cut where a run of letters and digits ends, and none of
    `names` (special tokens that are to be read as ids) is cut.
    """
    cuts = [0]
    for match in _LONG_WORD.finditer(text):
        start = match.start()
        while match.end() - start > LONGEST_WORD:
            end = start + LONGEST_WORD
            ends = [found.start() for found in _WORD_END.finditer(text, end - LONGEST_WORD // 2, end)]
            start = _outside(names, text, ends[-1] if ends else end)
            cuts.append(start)
    return [text[start:end] for start, end in zip(cuts, [*cuts[1:], len(text)], strict=True)]


def _outside(names: Sequence[str], text: str, cut: int) -> int:
    """`cut`, or where the name begins that it would divide."""
    for name in names:
        begin = text.rfind(name, max(0, cut - len(name) + 1), cut + len(name) - 1)
        if 0 <= begin < cut:
            return begin
    return cut

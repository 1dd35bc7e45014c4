"""Documents from local text files and the running interpreter's standard library."""

import hashlib
import json
import math
import os
import re
import stat
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from sparse_model.data.pieces import pieces_of, read_pieces

Split = Literal["train", "val"]
SPLITS: tuple[Split, Split] = ("train", "val")

Document = Iterable[str]
"""The text of a document in pieces, to be read once."""

TEXT_FIELDS = ("text", "content", "code")
TEXT_SUFFIXES = (".py", ".txt", ".md", ".jsonl")

_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_TEST_FILE = re.compile(r"(test_.*|.*_test|conftest)\.py")
GENERATED_HEAD = re.compile(r"auto-?generated|generated from '|file (is|was) generated|do not edit", re.I)
_LITERAL_LINE = re.compile(r"""\s*['"0-9(\[{]""")
MOST_CHARACTERS = 200_000
"""Longest file that is taken from the standard library or an installed package."""
LONGEST_ROW = 2**25
"""Most bytes of a line of a .jsonl file, which can only be read whole."""
_BYTES_LOOKED_AT = 4096
_NO_FILE = "named pipe, socket or device"


class DistributionReport(NamedTuple):
    """One installed distribution whose files are used."""

    name: str
    version: str
    licence: str
    """As its metadata states it: an SPDX expression, the classifiers, or free text."""
    files: int
    """How many of its files are used."""


class SourceReport(NamedTuple):
    """What one source will use, and what it leaves out."""

    name: str
    """The source as the spec names it."""
    train_documents: int | None
    """Documents on the train side; None where there is no end to count to."""
    val_documents: int | None
    """Documents on the val side; None likewise."""
    left_out: dict[str, int]
    """Reason -> number of files (or whole folders) that are not used for it."""
    note: str
    """How the documents were divided, or what was counted."""
    distributions: tuple[DistributionReport, ...] = ()
    """The installed distributions that the files belong to, where they belong to any."""
    files: int | None = None
    """Files that are read; None where the source has none."""

    def as_json(self) -> dict[str, Any]:
        """The report as it stands in a run's record."""
        return self._asdict() | {"distributions": [distribution._asdict() for distribution in self.distributions]}


def stable_fraction(identity: str) -> float:
    """A number in [0, 1) that depends on nothing but `identity`: the same on every machine, in every run."""
    digest = hashlib.blake2b(identity.encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def text_of_row(row: object, text_field: str | None, place: str) -> str:
    """The text of a row: its `text_field`, or the first of `TEXT_FIELDS` that it has.

    Raises:
        ValueError: the row, found at `place`, has no such field or no string in it.
    """
    if not isinstance(row, dict):
        raise ValueError(f"{place}: a row must be an object with a text field, not {type(row).__name__}")
    field = text_field or next((name for name in TEXT_FIELDS if name in row), None)
    if field is None or not isinstance(row.get(field), str):
        wanted = repr(field) if field else f"field among {', '.join(TEXT_FIELDS)}"
        raise ValueError(f"{place}: no text in {wanted}; set text_field to one of {', '.join(map(str, row))}")
    return row[field].encode(errors="replace").decode()  # a lone surrogate from JSON has no UTF-8 form


class Division(NamedTuple):
    """Which documents are val: those whose fraction is below `threshold`, or the tail of the only one."""

    threshold: float | None
    train: int
    val: int
    note: str


def divide(identities: Sequence[str], val_fraction: float) -> Division:
    """Which of a source's documents are val; each stays on its side whatever the others are.

    Where the hash leaves train or val empty, the document with the smallest hash becomes val. The only
    document of a source is divided inside it (`part_of_single`).
    """
    fractions = [stable_fraction(identity) for identity in identities]
    val = sum(fraction < val_fraction for fraction in fractions)
    if len(fractions) == 1:
        return Division(None, 1, 1, "a single document, divided at a line boundary")
    if 0 < val < len(fractions):
        return Division(val_fraction, len(fractions) - val, val, "divided by a hash of each document's name")
    note = f"only {len(fractions)} documents: the one with the smallest hash is val"
    return Division(math.nextafter(min(fractions), 1), len(fractions) - 1, 1, note)


@dataclass(frozen=True)
class FileSource:
    """Text files below a folder, or one file; every line of a .jsonl file is a document."""

    name: str
    root: Path
    val_fraction: float
    seed: int
    text_field: str | None
    stdlib: bool = False

    @cached_property
    def _listing(self) -> tuple[list[str], Counter[str]]:
        """Identities of the files (paths relative to the root) in a seeded order, and what was left out."""
        if not self.root.is_dir():
            self._check_file()
            return [self.root.name], Counter()
        kept, left_out = self._walk()
        if not kept:
            raise ValueError(
                f"corpus folder {self.name!r} holds no usable {', '.join(TEXT_SUFFIXES)} file"
                f" (left out: {dict(left_out) or 'none'}); give a folder that does"
            )
        return sorted(kept, key=lambda file: stable_fraction(f"{self.seed} {file}")), left_out

    def _check_file(self) -> None:
        reason = self._reason_to_leave_out(self.root)
        if reason == _NO_FILE:
            raise ValueError(f"corpus {self.name!r} is a {reason}, which may never end; give a file or a folder")
        if self.root.suffix.lower() not in TEXT_SUFFIXES:
            raise ValueError(f"corpus file {self.name!r} is none of {', '.join(TEXT_SUFFIXES)}; convert it to one")
        if reason:
            raise ValueError(f"corpus file {self.name!r} is {reason}; give a readable UTF-8 file with text in it")

    def _walk(self) -> tuple[list[str], Counter[str]]:
        """The files that are used, and how many others there are for each reason not to use them."""
        kept, left_out = [], Counter[str]()

        def note(_: OSError) -> None:
            left_out["folder that is not readable"] += 1

        for folder, subfolders, files in os.walk(self.root, onerror=note):
            hidden = {name for name in subfolders if name.startswith(".")}
            if self.stdlib:
                skipped = hidden | {name for name in subfolders if name in _SKIPPED_FOLDERS}
                left_out["folder of tests or packages"] += len(skipped - {"__pycache__"})
            else:
                links = {name for name in subfolders if Path(folder, name).is_symlink()}
                left_out["hidden folder"] += len(hidden)
                left_out["link to a folder"] += len(links - hidden)
                skipped = hidden | links
            subfolders[:] = sorted(set(subfolders) - skipped)
            for file in sorted(files):
                path = Path(folder, file)
                suffix = path.suffix.lower()
                if self.stdlib and suffix != ".py":
                    continue
                if suffix not in TEXT_SUFFIXES:
                    left_out[f"suffix {suffix}" if suffix else "no suffix"] += 1
                elif reason := self._reason_to_leave_out(path):
                    left_out[reason] += 1
                else:
                    kept.append(path.relative_to(self.root).as_posix())
        return kept, +left_out

    def _reason_to_leave_out(self, path: Path) -> str | None:
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                return _NO_FILE
            if path.suffix.lower() == ".jsonl":
                return None if os.access(path, os.R_OK) else "not readable"
            if _is_utf16(path):
                return "not UTF-8"
            if self.stdlib:
                text = "".join(read_pieces(path))
                return _stdlib_reason(path.name, text) if text.strip() else "empty"
            blank = [not piece.strip() for piece in read_pieces(path)]  # all of them, for what cannot be decoded
            return "empty" if all(blank) else None
        except UnicodeDecodeError:
            return "not UTF-8"
        except FileNotFoundError:
            return "link to nothing"
        except OSError:
            return "not readable"

    @cached_property
    def _division(self) -> Division:
        identities = [identity for identity, _ in self.identified()]
        if not identities:
            raise ValueError(f"corpus {self.name!r} holds no document that is not empty")
        return divide(identities, self.val_fraction)

    def identified(self) -> Iterator[tuple[str, Document]]:
        """(identity, text) of every document that is not empty."""
        for file, path in self._files():
            if path.suffix.lower() != ".jsonl":
                yield file, read_pieces(path)
                continue
            for identity, text in _jsonl_documents(path, file, self.text_field):
                if text.strip():
                    yield identity, pieces_of(text)

    def _files(self) -> Iterator[tuple[str, Path]]:
        for file in self._listing[0]:
            yield file, self.root / file if self.root.is_dir() else self.root

    def documents(self, split: Split) -> Iterator[Document]:
        threshold = self._division.threshold
        for identity, document in self.identified():
            if threshold is None:
                yield part_of_single(self.name, self._only_document, self.val_fraction, split)
            elif (stable_fraction(identity) < threshold) == (split == "val"):
                yield document

    def _only_document(self) -> Document:
        (document,) = (document for _, document in self.identified())
        return document

    def report(self) -> SourceReport:
        division, left_out = self._division, Counter(self._listing[1])
        for file, path in self._files():
            if path.suffix.lower() == ".jsonl":
                rows = _jsonl_documents(path, file, self.text_field)
                left_out["empty row"] += sum(not text.strip() for _, text in rows)
        counts = dict((+left_out).most_common())
        return SourceReport(self.name, division.train, division.val, counts, division.note, files=len(self._listing[0]))

    def identity(self) -> str:
        if self.stdlib:
            return sys.version
        files = [(file, path.stat()) for file, path in sorted(self._files())]
        stats = [(file, found.st_mtime_ns, found.st_size) for file, found in files]
        return json.dumps([self.text_field, sorted(self._listing[1].items()), *stats])


def _stdlib_reason(name: str, text: str) -> str | None:
    """Why a file of the standard library is not the kind of Python a person writes."""
    if _TEST_FILE.fullmatch(name):
        return "test"
    if name.startswith("_sysconfigdata") or GENERATED_HEAD.search(text[:600]):
        return "generated file"
    if len(text) > MOST_CHARACTERS:
        return f"over {MOST_CHARACTERS} characters"
    return "data table" if is_data_table(text) else None


def is_data_table(text: str) -> bool:
    """Whether most lines of a longer text begin with a literal."""
    lines = [line for line in text.splitlines() if line.strip()]
    return len(lines) > 50 and sum(bool(_LITERAL_LINE.match(line)) for line in lines) > len(lines) / 2


def stdlib_source(val_fraction: float, seed: int) -> FileSource:
    """The running interpreter's standard library, less tests, generated files and tables of data."""
    return FileSource("stdlib", Path(sysconfig.get_path("stdlib")), val_fraction, seed, None, stdlib=True)


def _is_utf16(path: Path) -> bool:
    """Whether a file without a mark is UTF-16, which may pass for UTF-8: zeros at every other byte and only there."""
    with path.open("rb") as file:
        head = file.read(_BYTES_LOOKED_AT)
    fewer, more = sorted((head[::2].count(0), head[1::2].count(0)))
    return more > len(head) // 8 and fewer < more // 8


def part_of_single(name: str, read: Callable[[], Document], val_fraction: float, split: Split) -> Iterator[str]:
    """The head (train) or tail (val) of a source's only document, cut at the line end nearest to the fraction.

    read: gives the document from its beginning, as often as it is asked.
    """
    length = sum(map(len, read()))
    cut = _line_end_near((1 - val_fraction) * length, length, read())
    if cut is None:
        raise ValueError(f"corpus {name!r} is one document of one line, which leaves nothing for val; add text to it")
    return _range(read(), 0, cut) if split == "train" else _range(read(), cut, length)


def _line_end_near(wanted: float, length: int, pieces: Document) -> int | None:
    """Characters up to the end of the line that ends nearest to `wanted`, the last line aside."""
    before = after = None
    start = 0
    for piece in pieces:
        middle = max(0, int(wanted) - start)
        left, right = piece.rfind("\n", 0, middle) + 1, piece.find("\n", middle) + 1
        before = start + left if left else before
        after = start + right if right and after is None else after
        start += len(piece)
    ends = [end for end in (before, after) if end is not None and end < length]
    return min(ends, key=lambda end: abs(end - wanted), default=None)


def _range(pieces: Document, first: int, end: int) -> Iterator[str]:
    """The characters from `first` to `end`, in pieces."""
    start = 0
    for piece in pieces:
        if start >= end:
            return
        part = piece[max(0, first - start) : end - start]
        start += len(piece)
        if part:
            yield part


def _jsonl_documents(path: Path, file: str, text_field: str | None) -> Iterator[tuple[str, str]]:
    with path.open("rb") as lines:
        for number, line in enumerate(iter(lambda: lines.readline(LONGEST_ROW + 1), b""), start=1):
            if len(line) > LONGEST_ROW:
                raise ValueError(f"{path}, line {number} is longer than {LONGEST_ROW} bytes: cut its text into rows")
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: not valid JSON ({error}); fix or remove it") from error
            yield f"{file}:{number}", text_of_row(row, text_field, f"{path}, line {number}")

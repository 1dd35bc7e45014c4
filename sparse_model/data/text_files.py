"""Documents from local text files and the running interpreter's standard library."""

import hashlib
import json
import math
import os
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

Split = Literal["train", "val"]
SPLITS: tuple[Split, Split] = ("train", "val")

TEXT_FIELDS = ("text", "content", "code")
TEXT_SUFFIXES = (".py", ".txt", ".md", ".jsonl")

_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_TEST_FILE = re.compile(r"(test_.*|.*_test|conftest)\.py")
GENERATED_HEAD = re.compile(r"auto-?generated|generated from '|file (is|was) generated|do not edit", re.I)
_LITERAL_LINE = re.compile(r"""\s*['"0-9(\[{]""")
MOST_CHARACTERS = 200_000
"""Longest file that is taken from the standard library or an installed package."""


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
        left_out: Counter[str] = Counter()
        if self.root.is_file():
            if self.root.suffix not in TEXT_SUFFIXES:
                raise ValueError(f"corpus file {self.name!r} is none of {', '.join(TEXT_SUFFIXES)}; convert it to one")
            reason = self._reason_to_leave_out(self.root)
            if reason:
                raise ValueError(f"corpus file {self.name!r} is {reason}; give a readable UTF-8 file with text in it")
            return [self.root.name], left_out
        kept = []
        for folder, subfolders, files in os.walk(self.root):
            skipped = {s for s in subfolders if s.startswith(".") or (self.stdlib and s in _SKIPPED_FOLDERS)}
            subfolders[:] = sorted(set(subfolders) - skipped)
            if self.stdlib:
                left_out["folder of tests or packages"] += len(skipped - {"__pycache__"})
            for file in sorted(files):
                path = Path(folder, file)
                if path.suffix not in ((".py",) if self.stdlib else TEXT_SUFFIXES):
                    continue
                reason = self._reason_to_leave_out(path)
                if reason:
                    left_out[reason] += 1
                else:
                    kept.append(path.relative_to(self.root).as_posix())
        if not kept:
            raise ValueError(
                f"corpus folder {self.name!r} holds no usable {', '.join(TEXT_SUFFIXES)} file"
                f" (left out: {dict(left_out) or 'none'}); give a folder that does"
            )
        return sorted(kept, key=lambda file: stable_fraction(f"{self.seed} {file}")), left_out

    def _reason_to_leave_out(self, path: Path) -> str | None:
        if not os.access(path, os.R_OK):
            return "not readable"
        if path.suffix == ".jsonl":
            return None
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            return "not UTF-8"
        if not text.strip():
            return "empty"
        return _stdlib_reason(path.name, text) if self.stdlib else None

    @cached_property
    def _division(self) -> Division:
        identities = [identity for identity, _ in self.identified()]
        if not identities:
            raise ValueError(f"corpus {self.name!r} holds no document that is not empty")
        return divide(identities, self.val_fraction)

    def identified(self) -> Iterator[tuple[str, str]]:
        """(identity, text) of every document that is not empty."""
        for file in self._listing[0]:
            path = self.root if self.root.is_file() else self.root / file
            if path.suffix == ".jsonl":
                documents = _jsonl_documents(path, file, self.text_field)
            else:
                documents = iter([(file, path.read_text(encoding="utf-8-sig"))])
            yield from ((identity, text) for identity, text in documents if text.strip())

    def documents(self, split: Split) -> Iterator[str]:
        threshold = self._division.threshold
        for identity, text in self.identified():
            if threshold is None:
                yield part_of_single(self.name, text, self.val_fraction, split)
            elif (stable_fraction(identity) < threshold) == (split == "val"):
                yield text

    def report(self) -> SourceReport:
        division = self._division
        return SourceReport(self.name, division.train, division.val, dict(self._listing[1]), division.note)

    def identity(self) -> str:
        if self.stdlib:
            return sys.version
        files = [self.root if self.root.is_file() else self.root / file for file in sorted(self._listing[0])]
        stats = [(file.relative_to(self.root).as_posix(), file.stat()) for file in files]
        return json.dumps([self.text_field, *((name, stat.st_mtime_ns, stat.st_size) for name, stat in stats)])


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


def part_of_single(name: str, text: str, val_fraction: float, split: Split) -> str:
    """The head (train) or tail (val) of a source's only document, cut at the line end nearest to the fraction."""
    boundaries = [match.end() for match in re.finditer("\n", text) if match.end() < len(text)]
    if not boundaries:
        raise ValueError(f"corpus {name!r} is one document of one line, which leaves nothing for val; add text to it")
    wanted = (1 - val_fraction) * len(text)
    cut = min(boundaries, key=lambda boundary: abs(boundary - wanted))
    return text[:cut] if split == "train" else text[cut:]


def _jsonl_documents(path: Path, file: str, text_field: str | None) -> Iterator[tuple[str, str]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: not valid JSON ({error}); fix or remove it") from error
            yield f"{file}:{number}", text_of_row(row, text_field, f"{path}, line {number}")

"""The Python source of the distributions that are installed in the running environment.

1. Every .py file that an installed distribution lists is a candidate, in the order of distribution and path.
2. Left out, and counted by reason: vendored copies, generated files, tables of data, lines too long to be written
   by hand, what does not parse, and near-duplicates of an earlier file or of a file of the standard library.
3. The result is kept in the cache folder under a name derived from the filter and the distributions' versions.
"""

import difflib
import hashlib
import json
import re
import symtable
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from importlib import metadata
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from sparse_model.data.duplicates import SeenTexts, signature
from sparse_model.data.pieces import pieces_of
from sparse_model.data.text_files import (
    GENERATED_HEAD,
    MOST_CHARACTERS,
    DistributionReport,
    Division,
    Document,
    SourceReport,
    Split,
    divide,
    is_data_table,
    part_of_single,
    stable_fraction,
    stdlib_source,
)
from sparse_model.io.atomic import write_text
from sparse_model.io.progress import progress_bar

FILTER_VERSION = 1
"""Part of the cache's name: raise it when the same distributions should give other files."""

_OWN = "sparse-bridges"
_VENDORED = re.compile(r"_?(vendor(ed|s)?|third_?party|extern(als?)?)", re.I)
_GENERATED_BY = re.compile(r"^\s*#.*\bgenerated (automatically )?(by|from|with|using)\b", re.I | re.M)
_HEAD = 600
_LONGEST_LINE = 1000


class Scan(NamedTuple):
    """What the installed distributions give."""

    files: list[tuple[int, str]]
    """Number of the distribution, and path as the distribution lists it."""
    left_out: dict[str, int]
    """Reason -> number of files."""


def open_packages(spec: str, val_fraction: float, seed: int, cache: Path) -> "PackagesSource":
    """The source that `packages` or `packages=numpy+scipy` stands for.

    Raises:
        ValueError: a distribution that is not installed, none at all, or one named twice.
    """
    _, equals, listed = spec.partition("=")
    every = {_normal(distribution.metadata["Name"]): distribution for distribution in _installed()}
    names = [_normal(name) for name in listed.split("+")] if equals else sorted(every)
    for name in names:
        if not name or names.count(name) > 1:
            problem = f"names {name!r} twice" if name else "has an empty name"
            raise ValueError(f"corpus {spec!r} {problem}; write it as e.g. 'packages=numpy+networkx'")
        if name not in every:
            close = difflib.get_close_matches(name, every, n=3)
            remedy = f"did you mean {' or '.join(close)}?" if close else "install it, or name one that pip list shows"
            raise ValueError(f"corpus {spec!r}: no distribution {name!r} is installed here; {remedy}")
    return PackagesSource(spec, tuple(every[name] for name in sorted(names)), val_fraction, seed, cache)


def _installed() -> Iterator[metadata.Distribution]:
    """The installed distributions less this project's own; the first of a name is the one that is imported."""
    seen = {_normal(_OWN)}
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"]
        if name and _normal(name) not in seen:
            seen.add(_normal(name))
            yield distribution


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


@dataclass(frozen=True)
class PackagesSource:
    """The files of installed distributions; a document's identity is its path below site-packages."""

    name: str
    installed: tuple[metadata.Distribution, ...]
    val_fraction: float
    seed: int
    cache: Path

    @cached_property
    def _scan(self) -> Scan:
        path = self.cache / f"packages-{hashlib.sha256(self.identity().encode()).hexdigest()[:24]}.json"
        scan = _read_scan(path) if path.exists() else None
        if scan is None:
            scan = scan_files(self.name, self.installed)
            write_text(path, json.dumps(scan._asdict()))
        if not scan.files:
            raise ValueError(
                f"corpus {self.name!r} holds no usable .py file (left out: {scan.left_out}); name other distributions"
            )
        return scan

    @cached_property
    def _division(self) -> Division:
        return divide([file for _, file in self._scan.files], self.val_fraction)

    def documents(self, split: Split) -> Iterator[Document]:
        threshold = self._division.threshold
        for number, file in sorted(self._scan.files, key=lambda entry: stable_fraction(f"{self.seed} {entry[1]}")):
            if threshold is None or (stable_fraction(file) < threshold) == (split == "val"):
                text = Path(str(self.installed[number].locate_file(file))).read_text(encoding="utf-8-sig")
                if threshold is None:
                    yield part_of_single(self.name, partial(pieces_of, text), self.val_fraction, split)
                else:
                    yield pieces_of(text)

    def report(self) -> SourceReport:
        division, counts = self._division, Counter(number for number, _ in self._scan.files)
        distributions = tuple(
            DistributionReport(found.metadata["Name"], found.version, licence(found.metadata), counts[number])
            for number, found in enumerate(self.installed)
        )
        return SourceReport(
            self.name,
            division.train,
            division.val,
            dict(self._scan.left_out),
            division.note,
            distributions,
            len(self._scan.files),
        )

    def identity(self) -> str:
        versions = [
            (_normal(d.metadata["Name"]), d.version, _digest(d.read_text("RECORD") or "")) for d in self.installed
        ]
        return json.dumps([FILTER_VERSION, sys.version, versions])


def licence(fields: Any) -> str:
    """What a distribution's metadata (an email message, in effect) says of its licence, in one line."""
    expression, text = (fields[key].strip() if key in fields else "" for key in ("License-Expression", "License"))
    classified = [line for line in fields.get_all("Classifier") or [] if line.startswith("License ::")]
    if expression:
        return expression
    if text not in ("", "UNKNOWN") and "\n" not in text:
        return text
    if classified:
        return "; ".join(line.rpartition(" :: ")[2] for line in classified)
    return "not stated" if text in ("", "UNKNOWN") else text.partition("\n")[0]


def scan_files(name: str, installed: Sequence[metadata.Distribution]) -> Scan:
    """Read every .py file of `installed` and choose."""
    seen = SeenTexts()
    for _, document in stdlib_source(0.05, 0).identified():
        seen.add(signature("".join(document)))
    left_out: Counter[str] = Counter()
    candidates: dict[str, int] = {}  # path -> distribution; where two list a file it is the first one's
    for number, distribution in enumerate(installed):
        for file in distribution.files or ():
            reason = _reason_of_path(file)
            if reason:
                left_out[reason] += 1
            elif file.suffix == ".py":
                candidates.setdefault(file.as_posix(), number)
    kept = []
    order = sorted(candidates.items(), key=lambda entry: (entry[1], entry[0]))
    for file, number in progress_bar(order, desc=f"reading {name}", unit=" files", disable=None):
        reason = _reason_of_file(Path(str(installed[number].locate_file(file))), seen)
        if reason:
            left_out[reason] += 1
        else:
            kept.append((number, file))
    return Scan(kept, dict(left_out.most_common()))


def _reason_of_path(file: PurePath) -> str | None:
    """Why a listed file is not read."""
    if "__pycache__" in file.parts or file.parts[0].endswith((".dist-info", ".egg-info")):
        return None  # neither source nor data: not worth counting
    if file.suffix != ".py":
        return "not a .py file"
    if ".." in file.parts:
        return "outside site-packages"
    return "vendored copy" if any(map(_VENDORED.fullmatch, file.parts)) else None


def _reason_of_file(path: Path, seen: SeenTexts) -> str | None:
    """Why a file is not used; one that is joins `seen`."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError:
        return "not readable"
    except UnicodeDecodeError:
        return "not UTF-8"
    reason = _reason_of_text(text)
    if reason:
        return reason
    marks = signature(text)
    if seen.resembles(marks):
        return "near-duplicate"
    if not _parses(text):
        return "not Python of this version"
    seen.add(marks)
    return None


def _reason_of_text(text: str) -> str | None:
    if not text.strip():
        return "empty"
    if len(text) > MOST_CHARACTERS:
        return f"over {MOST_CHARACTERS} characters"
    if GENERATED_HEAD.search(text[:_HEAD]) or _GENERATED_BY.search(text[:_HEAD]):
        return "generated file"
    if max(map(len, text.splitlines())) > _LONGEST_LINE:
        return f"a line of over {_LONGEST_LINE} characters"
    return "data table" if is_data_table(text) else None


def _parses(text: str) -> bool:
    """Whether `text` is valid Python. The symbol table needs half the time of `ast`, which builds every node."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            symtable.symtable(text, "<corpus>", "exec")
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return False
    return True


def _read_scan(path: Path) -> Scan | None:
    """The scan in a file; if damaged, a warning and None."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return Scan([(int(number), str(file)) for number, file in data["files"]], dict(data["left_out"]))
    except (ValueError, KeyError, TypeError) as error:
        warnings.warn(f"list of installed files {path} is damaged ({error!r}); reading them again", stacklevel=2)
        return None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()

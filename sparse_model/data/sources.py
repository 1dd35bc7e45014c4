"""Where the documents of a corpus come from: the generator, installed code, local files, the hub.

Every source divides its documents into train and val by a hash of each document's identity (its relative
path, its file and line, its number), so it stays on its side whatever the order or the other documents.
"""

import hashlib
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

from typing_extensions import TypedDict

from sparse_model.data.cache import cache_folder
from sparse_model.data.packages import open_packages
from sparse_model.data.pieces import pieces_of
from sparse_model.data.text_files import (
    Document,
    FileSource,
    SourceReport,
    Split,
    stable_fraction,
    stdlib_source,
    text_of_row,
)
from sparse_model.io.local import local_path
from sparse_model.io.reading import typed_line

SELF = "self"
"""Name of the source of documents that the dense model samples."""


class WeightedSource(NamedTuple):
    """One entry of a corpus spec."""

    name: str
    """`generated`, `stdlib`, `packages`, `self`, a local path, or a data set's name on the hub."""
    share: float
    """Its share of the corpus's tokens; the shares of a spec sum to 1."""


@runtime_checkable
class Source(Protocol):
    """A supply of documents."""

    def documents(self, split: Split) -> Iterator[Document]:
        """The documents of one side, in the same order every time."""

    def report(self) -> SourceReport:
        """What is used and what is not."""

    def identity(self) -> str:
        """Changes whenever the documents may have changed; part of the cache's name."""


def parse_spec(spec: str) -> tuple[WeightedSource, ...]:
    """Read `"name"` or `"name:weight,name:weight"`; weights are scaled to shares that sum to 1.

    A file or folder whose name has commas or colons is known by its existence, before anything is split there.

    Raises:
        ValueError: an empty or repeated name, a weight that is no positive number, or weights for only some.
    """
    names: list[str] = []
    weights: list[float | None] = []
    for name, text in _entries(spec):
        if not name or name in names:
            problem = f"names {name!r} twice" if name else "has an empty entry"
            raise ValueError(f"spec={spec!r} {problem}; write it as e.g. 'generated:0.4,stdlib:0.6'")
        names.append(name)
        weights.append(_parse_weight(spec, name, text) if text is not None else None)
    given = [weight for weight in weights if weight is not None]
    if given and len(given) < len(names):
        bare = names[weights.index(None)]
        raise ValueError(f"spec={spec!r} gives no weight to {bare!r}; give every source a weight, or none")
    shares = given or [1.0] * len(names)
    return tuple(WeightedSource(name, share / sum(shares)) for name, share in zip(names, shares, strict=True))


def _entries(spec: str) -> Iterator[tuple[str, str | None]]:
    """Name and weight as they are written; the longest run of fields that is an existing path is one name."""
    fields, start = spec.split(","), 0
    while start < len(fields):
        for end in range(len(fields), start, -1):
            entry = ",".join(fields[start:end]).strip()
            name, colon, weight = entry.rpartition(":")
            if _exists(entry):
                name, colon = entry, ""
            if end == start + 1 or ("," not in weight and _exists(name)) or name == entry:
                yield (name, weight) if colon else (entry, None)
                start = end
                break


def _exists(name: str) -> bool:
    try:
        return bool(name) and Path(name).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # no possible path: too long, a zero in it, a home that is not known
        return False


def _parse_weight(spec: str, name: str, text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise ValueError(f"spec={spec!r}: weight {text!r} of {name!r} is not a positive number; e.g. '{name}:0.5'")
    return weight


def open_source(
    name: str,
    *,
    val_fraction: float,
    seed: int,
    text_field: str | None,
    samples: str | Path | None = None,
    cache_dir: str | Path | None = None,
) -> Source:
    """The source that a spec's name stands for. The network is first asked when its documents are.

    samples: the file that `self` stands for.

    Raises:
        ValueError: a distribution that is not installed, or `self` without samples.
        FileNotFoundError: a name that looks like a path (starts with `.`, `/` or `~`, has more than
            one slash or a file suffix) and does not exist.
    """
    if name == "generated":
        return GeneratedSource(seed)
    if name == "stdlib":
        return stdlib_source(val_fraction, seed)
    if name.partition("=")[0] == "packages":
        return open_packages(name, val_fraction, seed, cache_folder(cache_dir))
    if name == SELF:
        if samples is None:
            raise ValueError(
                "corpus 'self' is text sampled from a dense model, and there is none to sample from: name one with"
                " --dense (train-bridge), or take another source"
            )
        return SampledSource(name, Path(samples), val_fraction, seed, "text")
    path = local_path(name)
    if path is not None and path.exists():
        return FileSource(name, path, val_fraction, seed, text_field)
    if path is not None or Path(name).suffix[1:2].isalpha():  # "notes.txt" is a file that is not there
        raise FileNotFoundError(
            f"corpus path {name!r} does not exist (working folder: {Path.cwd()}); give an existing file or"
            " folder, 'generated', 'stdlib', 'packages', or the name of a data set on the hub"
        )
    return HubSource(name, val_fraction, text_field)


@dataclass(frozen=True)
class GeneratedSource:
    """Endless documents from `sparse_model.data.generated_python`; train and val are separately seeded streams."""

    seed: int

    def documents(self, split: Split) -> Iterator[Document]:
        from sparse_model.data.generated_python import generate_document

        index = 0
        while True:
            yield pieces_of(generate_document(random.Random(f"{self.seed}:{split}:{index}")))
            index += 1

    def report(self) -> SourceReport:
        return SourceReport("generated", None, None, {}, "endless; train and val are separately seeded streams")

    def identity(self) -> str:
        spec = find_spec("sparse_model.data.generated_python")
        assert spec is not None
        assert spec.origin is not None
        return f"{self.seed} {hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()}"


class _Sampled(TypedDict):
    """What a row of samples says beside its text."""

    __pydantic_config__ = {"extra": "allow"}  # type: ignore[misc]  # noqa: RUF012

    ended: bool
    same: bool


class SampledSource(FileSource):
    """Documents that the dense model sampled: rows of a file that say how each was drawn."""

    def report(self) -> SourceReport:
        report, ended, same, count = super().report(), 0, 0, 0
        with self.root.open(encoding="utf-8") as rows:
            for count, line in enumerate(rows, start=1):
                row = typed_line(_Sampled, line, f"{self.root}, line {count}", "copy the file again")
                ended, same = ended + row["ended"], same + row["same"]
        return report._replace(
            note=f"sampled from the dense model: of {count} documents {ended} ended by themselves, the others were cut,"
            f" and the text of {count - same} is tokenized otherwise than it was sampled; {report.note}"
        )


@dataclass(frozen=True)
class HubSource:
    """The `train` split of a data set on the hub, streamed; a document's identity is its row number."""

    name: str
    val_fraction: float
    text_field: str | None

    def documents(self, split: Split) -> Iterator[Document]:
        from datasets import load_dataset  # a second, which the other sources do without

        try:
            stream = load_dataset(self.name, split="train", streaming=True)
        except Exception as error:  # a dozen types: no network, no such name, gated, needs a configuration
            raise ConnectionError(
                f"corpus {self.name!r} is neither built in nor a local path, and streaming it from the hub"
                f" failed ({type(error).__name__}: {str(error).partition(chr(10))[0]});"
                " check the name, the network and your hub login"
            ) from error
        for index, row in enumerate(stream):
            if (stable_fraction(str(index)) < self.val_fraction) == (split == "val"):
                yield pieces_of(text_of_row(row, self.text_field, f"{self.name}, row {index}"))

    def report(self) -> SourceReport:
        return SourceReport(self.name, None, None, {}, "streamed from the hub; divided by a hash of the row number")

    def identity(self) -> str:
        return f"{self.name} {self.text_field}"

"""What makes a run folder a bundle that others can load: bundle.json, and a dense model that may lie on the hub.

bundle.json states the version of the format and the bundle's files. A dense model by reference is dense/reference.json
in place of its files: a hub name, a commit, and a digest of the weights.
"""

import json
from pathlib import Path
from typing import NamedTuple, NotRequired

import torch
from transformers import PreTrainedModel
from typing_extensions import TypedDict

from bridges.dense import cast_parameters
from bridges.loading import load_lm
from sparse_model.io.atomic import write_text
from sparse_model.io.hub import download
from sparse_model.io.reading import read_typed
from sparse_model.training.identity import digest_of
from sparse_model.version import __version__

FILE = "bundle.json"
FORMAT = 1
"""Raised when a bundle that was written before would be read wrongly."""
_REFERENCE = Path("dense", "reference.json")
_AGAIN = "download or copy the bundle again"

_Bundle = TypedDict("_Bundle", {"format": int | str, "sparse-bridges": NotRequired[str], "files": list[str]})
_Bundle.__pydantic_config__ = {"extra": "allow"}  # type: ignore[attr-defined]  # another format may have more


class DenseReference(NamedTuple):
    """A dense model that a bundle names and does not hold."""

    name: str
    """On the hub."""
    revision: str
    """A commit, so that it cannot change."""
    digest: str
    """Of its weights in float32."""


def write_format(folder: Path) -> None:
    """Make a folder of a run's parts a bundle: state the format and every file."""
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    stated = {"format": FORMAT, "sparse-bridges": __version__, "files": files}
    write_text(folder / FILE, json.dumps(stated, indent=1) + "\n")


def check_format(folder: Path) -> None:
    """Raise ValueError for a bundle of another format, FileNotFoundError for one without all its files.

    A folder without bundle.json is a run that nobody has made a bundle of.
    """
    path = folder / FILE
    if not path.is_file():
        return
    stated = read_typed(_Bundle, path, _AGAIN)
    if stated["format"] != FORMAT:
        by = f"sparse-bridges {stated.get('sparse-bridges', 'of an unknown version')}"
        raise ValueError(
            f"{folder} is a bundle of format {stated['format']!r}, written by {by}, and sparse-bridges {__version__} "
            f"reads format {FORMAT}: install the version that wrote it, or ask its owner to push it again with this one"
        )
    missing = [name for name in stated["files"] if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {missing[0]}, which its {FILE} lists: {_AGAIN}")


def pin(name: str, digest: str) -> DenseReference:
    """A reference to what a hub name stands for now. Raises ValueError unless its weights have the digest."""
    source = download(name)
    _check_digest(load_lm(source), digest, f"{name} at commit {source.name}", "the run's dense model", "dense='inside'")
    return DenseReference(name, source.name, digest)


def write_reference(folder: Path, reference: DenseReference) -> None:
    """Put a reference in the place of a dense model's files."""
    write_text(folder / _REFERENCE, json.dumps(reference._asdict(), indent=1) + "\n")


def read_reference(folder: Path) -> DenseReference | None:
    """The dense model that a folder names; None where it holds one. A damaged file is a ValueError."""
    path = folder / _REFERENCE
    return read_typed(DenseReference, path, _AGAIN) if path.is_file() else None


def dense_files(folder: Path) -> Path:
    """Where the dense model's files lie: dense/, or the download that it names. Raises OSError as `download`."""
    reference = read_reference(folder)
    return download(reference.name, revision=reference.revision) if reference else folder / "dense"


def load_dense_part(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The dense model of a run or bundle. Raises as `load_lm`, and ValueError for weights that are not those named."""
    reference = read_reference(folder)
    if reference is None:
        return load_lm(folder / "dense", dtype)
    model = load_lm(dense_files(folder))
    what = f"{reference.name} at commit {reference.revision}"
    _check_digest(model, reference.digest, what, f"the one that {folder} was made with", "a bundle that holds its own")
    cast_parameters(model, dtype)
    return model


def _check_digest(model: PreTrainedModel, wanted: str, what: str, of: str, remedy: str) -> None:
    found = digest_of(model.parameters())
    if found != wanted:
        raise ValueError(f"{what} has weights of digest {found}, {of} of {wanted}: they are two models; use {remedy}")

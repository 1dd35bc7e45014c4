"""digests.json in a run folder: what every part of a finished run was, so that a flipped bit is named on opening.

A file up to 64 MiB is digested whole. A larger one, which only a dense model from elsewhere has, by its size and 64
pieces of 256 KiB spread evenly over it: reading gigabytes twice would take longer than loading them.
"""

import hashlib
import json
import logging
from collections.abc import Iterable
from pathlib import Path

from sparse_model.io.atomic import write_text
from sparse_model.io.reading import read_typed

logger = logging.getLogger(__name__)

FILE = "digests.json"
_WHOLE = 64 * 2**20
_PIECES, _PIECE = 64, 2**18

_said: set[Path] = set()


def digest_file(path: Path) -> str:
    """Hex digest of a file; of a large one, of its size and parts."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= _WHOLE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        sha = hashlib.sha256(str(size).encode())
        for piece in range(_PIECES):
            file.seek(piece * (size - _PIECE) // (_PIECES - 1))
            sha.update(file.read(_PIECE))
        return sha.hexdigest()


def write_manifest(folder: Path, parts: Iterable[str]) -> None:
    """Write the digests of files, and of those right below folders, into FOLDER/digests.json."""
    paths = [
        path
        for part in parts
        for path in (sorted((folder / part).iterdir()) if (folder / part).is_dir() else [folder / part])
        if path.is_file() and path.name[0] != "."
    ]
    digests = {path.relative_to(folder).as_posix(): digest_file(path) for path in paths}
    write_text(folder / FILE, json.dumps(digests, indent=1) + "\n")


def check_manifest(folder: Path, parts: Iterable[str] = ("",)) -> None:
    """Raise where a file whose name begins with one of `parts` is not as its run was finished; read before it is used.

    FileNotFoundError for one that is gone, ValueError for one that has changed. A folder of an earlier version has no
    digests: that is said once.
    """
    path, starts = folder / FILE, tuple(parts)
    if not path.is_file():
        if path.resolve() not in _said:
            _said.add(path.resolve())
            logger.warning("%s has no %s (an earlier version made it): damage is not noticed", folder, FILE)
        return
    digests = read_typed(dict[str, str], path, "remove it to open the run without this check")
    for name, digest in digests.items():
        part = folder / name
        if not name.startswith(starts) or Path(name).is_absolute() or ".." in Path(name).parts:
            continue
        if not part.is_file():
            raise FileNotFoundError(f"{part} does not exist, but {path} lists it: copy it there again")
        if digest_file(part) != digest:
            raise ValueError(
                f"{part} is not as it was when training ended (another digest than in {path}): copy it again; if you "
                f"changed it on purpose, remove {path}"
            )

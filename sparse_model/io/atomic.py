"""Writing so that a reader sees the old content or the new, never half of it.

What is written lies beside its place under a name of its own until it is whole; `clean_up` removes what killed
processes left. A write that fails is one sentence that names the file, whichever library wrote it.
"""

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# `.NAME.1a2b3c4d.sb-new` is not yet in its place, or no longer; `.sb-old` has made room for what follows it.
_OURS = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{8}\.sb-(?P<kind>new|old)")
_REFUSED = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EIO", "EROFS", "EACCES", "EPERM", "EMFILE", "ENFILE")
}


class WriteFailed(OSError):
    """A file that could not be written; the message names it and the reason."""


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.sb-{kind}")


@contextmanager
def failed_writes_named(path: Path) -> Iterator[None]:
    """Turn a full disk and its like, as Python, safetensors, torch and tokenizers report them, into a WriteFailed."""
    try:
        yield
    except WriteFailed:
        raise
    except Exception as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise WriteFailed(
            f"{path} could not be written ({reason}); what was there before is as it was: free some space, or allow "
            "the write, and give the same command again, a training with --resume"
        ) from error


def _reason(error: Exception) -> str | None:
    if isinstance(error, OSError):
        return os.strerror(error.errno) if error.errno and error.errno in _REFUSED else None
    number = re.search(r"\(os error (\d+)\)", str(error))  # Rust: safetensors, tokenizers
    if number and int(number[1]) in _REFUSED:
        return os.strerror(int(number[1]))
    if re.search("database or disk is full|readonly database|unable to open database", f"{error} {error.__cause__}"):
        return "the disk took no more of it, or does not allow it"  # sqlite, below optuna
    if isinstance(error, RuntimeError) and re.search("inline_container|PytorchStreamWriter", str(error)):
        return "the disk took no more of it"
    return None


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; what is written there takes its place, on failure it is removed."""
    temporary = _beside(path, "new")
    with failed_writes_named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Raise WriteFailed, before hours of work, where a file or folder of this name could not be written.

    Nothing is made: what is asked is whether the nearest folder that there is takes a file.
    """
    folder = path if path.is_dir() else path.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise WriteFailed(f"{path} cannot be written: {folder} is a file, name another place")
    trial = _beside(folder / "trial", "new")
    try:
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise WriteFailed(
            f"{path} cannot be written ({error.strerror}): allow it in {folder}, or name another place"
        ) from error


def check_writable_file(path: Path) -> None:
    """As `check_writable`, and a folder of that name is none either."""
    if path.is_dir():
        raise WriteFailed(f"{path} is a folder: name a file in it")
    check_writable(path)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with replace_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path` that is removed at the end, where it has not been moved away."""
    temporary = _beside(path, "new")
    with failed_writes_named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        try:
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def replace_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder; on success it takes the place of `path`, on failure it is removed.

    A kill between the two renames leaves the old folder under another name, from which `recover_folder` takes it back.
    """
    recover_folder(path)
    with temporary_folder(path) as temporary:
        yield temporary
        old = _beside(path, "old")
        while True:
            if path.exists():
                path.rename(old)
            try:
                temporary.rename(path)
                break
            except OSError:
                if not path.exists():  # otherwise a reader parts nothing here and took the old one back
                    raise
        shutil.rmtree(old, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Remove a folder in one rename: a kill leaves it whole, or not at all under its name."""
    gone = _beside(path, "new")
    with suppress(FileNotFoundError):
        path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def recover_folder(path: Path) -> None:
    """Undo a `replace_folder` that was killed between its two renames."""
    if path.exists() or not path.parent.is_dir():
        return
    for old in path.parent.iterdir():
        parts = _OURS.fullmatch(old.name)
        if parts and parts["name"] == path.name and parts["kind"] == "old":
            with suppress(OSError):  # another reader was first
                old.rename(path)
            return


def clean_up_beside(path: Path) -> None:
    """Remove what killed processes left of one file or folder, once nobody else writes it."""
    for leftover in [] if not path.parent.is_dir() else list(path.parent.iterdir()):
        parts = _OURS.fullmatch(leftover.name)
        if parts and parts["name"] == path.name:
            recover_folder(path)
            _remove(leftover)


def clean_up(folder: Path) -> None:
    """Remove what killed processes left in a folder and in those right below it, once nobody else writes there."""
    for place in (folder, *(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink())):
        if place != folder and (place / LOCK).exists():  # a run of its own
            continue
        for leftover in [] if not place.is_dir() else list(place.iterdir()):
            parts = _OURS.fullmatch(leftover.name)
            if parts:
                recover_folder(place / parts["name"])
                _remove(leftover)


def _remove(leftover: Path) -> None:
    if leftover.is_dir():
        shutil.rmtree(leftover, ignore_errors=True)
    else:
        leftover.unlink(missing_ok=True)


LOCK = ".lock"
"""Name of the file by which a folder's writer is known (`sparse_model.io.lock`)."""

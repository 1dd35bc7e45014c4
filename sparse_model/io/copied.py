"""Whether a file that others wrote arrived whole: an empty file and a Git LFS pointer are refused by name."""

from pathlib import Path

_POINTER = b"version https://git-lfs.github.com/spec/"


def check_copied(path: Path) -> None:
    """Raise ValueError for an empty file or one that only says where Git LFS keeps the real one."""
    with path.open("rb") as file:
        head = file.read(len(_POINTER))
    if not head:
        raise ValueError(f"{path} is empty: copy it again")
    if head == _POINTER:
        raise ValueError(f"{path} is a Git LFS pointer, not the file itself: run git lfs pull in {path.parent}")

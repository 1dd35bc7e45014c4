"""Whether a name means something on this machine or on the Hugging Face hub: one rule for all options and calls."""

from pathlib import Path


def local_path(name: str | Path) -> Path | None:
    """The local file or folder that a name means, whether or not it exists; None for a name on the hub.

    Local is a `Path`, what exists or would lie in a folder that does, what starts with `.`, `/` or `~`, and what has
    more than one slash.
    """
    path = Path(name).expanduser()
    looks_local = isinstance(name, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1
    in_a_folder = "/" in str(name) and path.parent.is_dir()
    return path if looks_local or path.exists() or in_a_folder else None

"""Commands in messages, as one can type them."""

import shlex
from pathlib import Path


def command_line(*words: str | Path) -> str:
    """A command of sparse-bridges; what a shell would take apart is quoted."""
    return shlex.join(["sparse-bridges", *map(str, words)])

"""Progress bars, the same everywhere: drawn in a terminal or notebook; a line a minute where output goes to a file."""

import sys
import time
from typing import Any

from tqdm.auto import tqdm
from tqdm.std import tqdm as Bar

SECONDS = 60.0
"""Between two lines."""

_LINE = "{desc}: {n_fmt} of {total_fmt} {unit}, {elapsed} so far, {remaining} left{postfix}"


class ProgressLines(Bar):
    """A bar whose states are lines of their own; one that stays ends with a line however short it was."""

    disable: bool

    def __init__(self, *args: Any, **options: Any) -> None:
        self._written = time.monotonic()
        super().__init__(*args, **options | {"maxinterval": SECONDS, "bar_format": _LINE})

    @property
    def format_dict(self) -> dict[str, Any]:
        """What the line says: a last document may go beyond the total, which tqdm would then forget."""
        said = super().format_dict
        total = max(said["n"], said["total"]) if said["total"] is not None else None
        return said | {"total": total, "unit": said["unit"].strip()}

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        now = time.monotonic()
        if now - self._written >= SECONDS:  # whoever changes the text asks for more
            self._written = now
            self._write()
        return True

    def clear(self, *_: Any, **__: Any) -> None:
        pass  # a line stays

    def close(self) -> None:
        if not self.disable:
            self.disable = True
            self._decr_instances(self)
            if self.leave:
                self._write()

    def _write(self) -> None:
        self.fp.write(f"{self}\n")
        self.fp.flush()


def progress_bar(*args: Any, **options: Any) -> Bar:
    """A bar; the arguments are those of tqdm."""
    drawn = sys.stderr.isatty() or any(kind.__module__ == "tqdm.notebook" for kind in tqdm.__mro__)
    return (tqdm if drawn else ProgressLines)(*args, **options)

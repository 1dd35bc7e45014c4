"""Stopping between steps: SIGTERM and Ctrl-C are noted, and acted on once a checkpoint is written."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


class Interrupted(KeyboardInterrupt):
    """SIGTERM or Ctrl-C, raised once the checkpoint is written."""


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT instead of dying in the middle of a step; a second one acts at once."""
    caught: list[int] = []
    old: dict[signal.Signals, object] = {}

    def note(number: int, _frame: object) -> None:
        caught.append(number)
        for name, handler in old.items():
            signal.signal(name, handler)  # type: ignore[arg-type]

    try:
        for name in (signal.SIGTERM, signal.SIGINT):
            old[name] = signal.signal(name, note)
    except ValueError:  # not the main thread: leave the process' handlers alone
        old = {}
    try:
        yield caught
    finally:
        for name, handler in old.items():
            signal.signal(name, handler)  # type: ignore[arg-type]

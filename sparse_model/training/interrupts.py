"""Stopping on SIGINT, SIGTERM and SIGHUP: between the steps of a training, or at once with a word on what is lost."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# accelerate's launchers set the first, torchrun the second.
_LAUNCHED = ("ACCELERATE_DYNAMO_BACKEND", "TORCHELASTIC_RUN_ID")
_PATIENCE = 120.0
"""Seconds from the launcher's death until a process ends without its checkpoint, such as one that waits for others."""


NOTHING_WRITTEN = "nothing of the run was written; the same command starts again, with the text that is ready by then"
RESUMES = "what this stage had done so far is lost, the earlier ones are kept; --resume goes on from there"


class Interrupted(KeyboardInterrupt):
    """A signal, raised where nothing more can be kept; the message says what is and what is not."""


@contextmanager
def stop_signals(*signals: signal.Signals) -> Iterator[list[int]]:
    """Collect signals, all three unless some are named, instead of dying in the middle of a step.

    A second one does what it would do outside.
    """
    caught: list[int] = []

    def note(number: int, _frame: object) -> None:
        caught.append(number)
        _restore(old)

    with _handled(note, signals or SIGNALS) as old:
        yield caught


@contextmanager
def interruptible(lost: str) -> Iterator[None]:
    """End what runs inside with Interrupted, whose message says what is lost, on any of the three signals."""

    def stop(number: int, _frame: object) -> None:
        raise Interrupted(f"stopped by {signal.Signals(number).name}: {lost}")

    with _handled(stop, SIGNALS):
        yield


@contextmanager
def _handled(handler: Callable, signals: tuple[signal.Signals, ...]) -> Iterator[dict]:
    old: dict[signal.Signals, object] = {}
    try:
        for number in signals:
            before = signal.getsignal(number)
            if before is None or (number is signal.SIGHUP and before is signal.SIG_IGN):  # nohup
                continue
            old[number] = signal.signal(number, handler)
    except ValueError:  # not the main thread: leave the process' handlers alone
        old = {}
    try:
        yield old
    finally:
        _restore(old)


def _restore(old: dict) -> None:
    for number, handler in old.items():
        signal.signal(number, handler)


@contextmanager
def end_with_launcher() -> Iterator[None]:
    """Where a launcher started this process, its death, of whatever kind, is a SIGTERM to this one within a second."""
    if not any(name in os.environ for name in _LAUNCHED):
        yield
        return
    launcher, ended = os.getppid(), threading.Event()

    def watch() -> None:
        while not ended.wait(1.0):
            if os.getppid() != launcher:
                os.kill(os.getpid(), signal.SIGTERM)
                if not ended.wait(_PATIENCE):
                    os._exit(128 + signal.SIGTERM)
                return

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        ended.set()

"""Signals: noted between steps, or acted on at once with a word; ignored ones stay so; a launcher's death is one."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sparse_model.training.interrupts import SIGNALS, Interrupted, end_with_launcher, interruptible, stop_signals

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("number", SIGNALS)
def test_each_signal_ends_at_once_with_what_is_lost(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=f"stopped by {number.name}: the inner loss"), interruptible("the outer one"):  # noqa: SIM117
        with interruptible("the inner loss"):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", SIGNALS)
def test_each_signal_is_noted_between_steps_and_a_second_one_acts(number: signal.Signals) -> None:
    with interruptible("the outer one"), stop_signals() as caught:
        os.kill(os.getpid(), number)
        assert caught == [number]
        with pytest.raises(Interrupted, match="the outer one"):
            os.kill(os.getpid(), number)


def test_only_the_named_signals_are_noted() -> None:
    with interruptible("all"), stop_signals(signal.SIGINT) as caught:
        os.kill(os.getpid(), signal.SIGINT)
        assert caught == [signal.SIGINT]
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGTERM)


def test_nohup_stays_nohup() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruptible("nothing"), stop_signals() as caught:
            os.kill(os.getpid(), signal.SIGHUP)
        assert caught == []
    finally:
        signal.signal(signal.SIGHUP, before)


CHILD = """
import sys, time
from sparse_model.training.interrupts import Interrupted, end_with_launcher, stop_signals
with end_with_launcher(), stop_signals() as caught:
    print("training", flush=True)
    for _ in range(1200):
        if caught:
            open(sys.argv[1], "w").write("checkpoint")
            break
        time.sleep(0.05)
print("ended", flush=True)
"""
LAUNCHER = """
import subprocess, sys
subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2]]).wait()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_death_of_a_launcher_ends_its_children_with_their_checkpoint(
    number: signal.Signals, tmp_path: Path
) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_DYNAMO_BACKEND": "no"}
    command = [sys.executable, "-c", LAUNCHER, CHILD, str(tmp_path / "checkpoint")]
    launcher = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    assert launcher.stdout.readline() == "training\n"
    launcher.send_signal(number)
    assert launcher.wait() == -number
    assert launcher.stdout.readline() == "ended\n"  # from the child, which has the same pipe
    assert (tmp_path / "checkpoint").read_text() == "checkpoint"


def test_without_a_launcher_nobody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ACCELERATE_DYNAMO_BACKEND", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getppid", lambda: pytest.fail("asked"))
    with end_with_launcher():
        pass

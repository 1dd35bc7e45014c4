"""One writer: who it is, that it ends with its process, and that a folder made for nothing goes again."""

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from sparse_model.io.lock import InUse, hold, one_writer

ROOT = Path(__file__).parents[3]


def other_writer(folder: Path) -> subprocess.Popen[str]:
    """A process that writes into a folder until its standard input ends."""
    code = f"""
import sys
from sparse_model.io.lock import one_writer
with one_writer({str(folder)!r}):
    print("writing", flush=True)
    sys.stdin.read()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    child = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, **pipes
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "writing\n"
    return child


def test_the_second_comer_learns_who_the_first_is_and_a_dead_process_keeps_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "one"
    child = other_writer(folder)
    with pytest.raises(
        InUse, match=rf"one is in use by process {child.pid} on {socket.gethostname()} \(-c\): wait for"
    ):
        one_writer(folder).__enter__()
    assert [path.name for path in folder.iterdir()] == [".lock"]
    child.send_signal(signal.SIGKILL)
    child.communicate()
    half = folder / ".weights.01234567.sb-new"
    half.write_text("left by the killed one")
    with one_writer(folder):
        assert not half.exists()
        assert f"process {os.getpid()} on" in (folder / ".lock").read_text()
        (folder / "kept").write_text("a file")
    assert [path.name for path in folder.iterdir()] == ["kept"]


def test_a_folder_in_which_nothing_is_written_is_not_left(tmp_path: Path) -> None:
    def refuse() -> None:
        with one_writer(tmp_path / "runs" / "one"):
            raise ValueError("refused")

    with pytest.raises(ValueError, match="refused"):
        refuse()
    assert list(tmp_path.iterdir()) == []


def test_what_is_called_inside_may_enter_again_and_another_thread_may_not(tmp_path: Path) -> None:
    refused: list[BaseException] = []

    def enter() -> None:
        try:
            one_writer(tmp_path).__enter__()
        except InUse as error:
            refused.append(error)

    with one_writer(tmp_path), one_writer(tmp_path / "." / ""):
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
        assert (tmp_path / ".lock").exists()
    assert "another thread" in str(refused[0])
    with one_writer(tmp_path):
        pass


def test_who_waits_gets_the_lock_once_the_other_has_ended(tmp_path: Path) -> None:
    child = other_writer(tmp_path)
    taken = threading.Event()

    def wait() -> None:
        with hold(tmp_path / ".lock", wait=True):
            taken.set()

    thread = threading.Thread(target=wait)
    thread.start()
    assert not taken.wait(0.3)
    child.communicate("")
    thread.join()
    assert taken.is_set()
    assert list(tmp_path.iterdir()) == []

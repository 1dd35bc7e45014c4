"""A sample of what `python tests/kill_points.py --all` tries."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_sample_of_kills_second_writers_and_full_disks() -> None:
    command = [sys.executable, Path(__file__).with_name("kill_points.py")]
    sample = {"points": 4, "kills": 1, "pairs": 2, "disks": 3}
    attacks = [word for name, count in sample.items() for word in (f"--{name}", str(count))]
    done = subprocess.run([*command, *attacks], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": right") == sum(sample.values()), done.stdout

"""A sample of what `python tests/damaged_files.py --copies 2000` tries."""

import re
import subprocess
import sys
from pathlib import Path


def test_a_sample_of_damaged_files() -> None:
    command = [sys.executable, Path(__file__).with_name("damaged_files.py"), "--copies", "15"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    assert sum(map(int, re.findall(r"\d+", last))) == 15, last
    assert "named" in last

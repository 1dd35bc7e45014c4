"""torch.compile of the sublayers: the same numbers, and one graph per kind of sublayer however many sites there are."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_compiled_sublayers() -> None:
    script = Path(__file__).parents[2] / "support" / "compiled.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]

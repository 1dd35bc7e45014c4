"""Run the README's first block of Python, as a new user would, and compare what it prints with the block below it.

With the installed package, in an empty directory: `make newest` does so from a plain install.
"""

import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.compile(r"^```python\n(?P<code>.*?)^```\n\n```\n(?P<output>.*?)^```$", re.MULTILINE | re.DOTALL)


def main() -> str:
    """What is wrong, in words; nothing where nothing is."""
    found = BLOCKS.search(README.read_text(encoding="utf-8"))
    assert found, "the README has no block of Python with its output below"
    with tempfile.TemporaryDirectory() as empty:
        command = [sys.executable, "-P", "-c", found["code"]]
        done = subprocess.run(command, cwd=empty, capture_output=True, text=True)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "transformer-lens"))
    if done.returncode or done.stdout != found["output"]:
        return f"with {versions} the README's first block does not print what is below it:\n{done.stdout}{done.stderr}"
    print(f"the README's first block prints what is below it, with {versions}")
    return ""


if __name__ == "__main__":
    sys.exit(main() or 0)

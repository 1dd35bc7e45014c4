"""Known advisories on the versions of a file of pins, by pip-audit: `python scripts/audit.py constraints.txt`.

`make audit` calls this. Ends with 0 where there is none, 1 where there are some, 2 where nobody could look.
"""

import shutil
import subprocess
import sys
from pathlib import Path

_SKIPPED = "could not be audited"


def audit(constraints: str) -> int:
    """Print what pip-audit finds, or one sentence where it could not look; returns the exit status."""
    tool = shutil.which("pip-audit", path=".venv/bin") or shutil.which("pip-audit")
    if tool is None:
        print("not audited: pip-audit is not installed; pipx install pip-audit, or .venv/bin/pip install pip-audit")
        return 2
    if not Path(constraints).is_file():
        print(f"not audited: there is no {constraints}; make lock writes it")
        return 2
    command = [tool, "--requirement", constraints, "--no-deps", "--disable-pip", "--progress-spinner", "off"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    skipped, pins = done.stdout.count(_SKIPPED), Path(constraints).read_text(encoding="utf-8").count("==")
    looked = done.returncode == 0 or bool(done.stdout.strip())  # what it finds is a table, and the status 1
    if not looked or skipped >= pins:
        said = " ".join((done.stderr + done.stdout).strip().splitlines()[-1:]) or "it said nothing"
        print(f"not audited: pip-audit could not look ({said[:200]}); try again where the package index can be reached")
        return 2
    print(done.stdout.strip() or done.stderr.strip())
    if skipped:
        print(f"not audited: {skipped} of {pins} packages")
    return done.returncode or (2 if skipped else 0)


if __name__ == "__main__":
    sys.exit(audit(sys.argv[1]))

"""Write constraints.txt from a report of `pip install --dry-run --report`: `python scripts/lock.py REPORT CONSTRAINTS`.

`make lock` calls this. Only the standard library, for it runs before anything is installed.
"""

import json
import sys
from pathlib import Path
from typing import Any

HEAD = """\
# One tested set of versions for `make`, every installed package of it; pyproject.toml keeps the ranges. Made by
# `make lock`. torch is pinned because the registry's newest build brings several gigabytes of CUDA packages where this
# version may be had as a CPU build; no build's own packages (nvidia-*) are here, for torch pins them itself.
"""
_OWN = "sparse-bridges"


def pins(report: dict[str, Any]) -> list[str]:
    """`name==version` of everything that would be installed, whichever build of it this machine takes."""
    found = {item["metadata"]["name"]: item["metadata"]["version"].partition("+")[0] for item in report["install"]}
    kept = [name for name in found if name != _OWN and not name.lower().startswith("nvidia-")]
    return [f"{name}=={found[name]}" for name in sorted(kept, key=str.lower)]


def main(report: Path, constraints: Path) -> None:
    lines = pins(json.loads(report.read_text(encoding="utf-8")))
    constraints.write_text(HEAD + "\n".join(lines) + "\n", encoding="utf-8")
    print(f"{constraints}: {len(lines)} packages pinned")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

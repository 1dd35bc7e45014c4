"""The lock file and its audit: every package is pinned, and an audit that did not look does not pass."""

import json
import os
import stat
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def script(name: str, *arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / name), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=os.environ | environment, check=False)


def test_the_lock_pins_what_would_be_installed(tmp_path: Path) -> None:
    packages = {"torch": "2.13.0+cpu", "Mako": "1.4", "sparse-bridges": "0.1", "nvidia-cudnn": "9", "attrs": "25.1"}
    report = {"install": [{"metadata": {"name": n, "version": v}} for n, v in packages.items()]}
    (tmp_path / "report.json").write_text(json.dumps(report))
    done = script("lock.py", "report.json", "constraints.txt", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "constraints.txt").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == ["attrs==25.1", "Mako==1.4", "torch==2.13.0"]


def test_every_dependency_of_the_project_is_pinned() -> None:
    pinned = {line.partition("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    seen, waiting = set(), ["sparse-bridges"]
    while waiting:
        name = waiting.pop()
        try:
            wanted = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # an extra or a platform that is not installed
            continue
        for line in wanted:
            if "extra ==" not in line and not line.lower().startswith("nvidia"):
                found = "".join(c if c.isalnum() or c in "-_." else " " for c in line).split()[0].lower()
                waiting += [] if found in seen else [found]
                seen.add(found)
    installed = {name for name in seen if _installed(name)}
    normal = {name.replace("_", "-").replace(".", "-") for name in pinned}
    assert len(installed) > 50
    assert {name.replace("_", "-").replace(".", "-") for name in installed} <= normal


def _installed(name: str) -> bool:
    try:
        return bool(metadata.version(name))
    except metadata.PackageNotFoundError:
        return False


@pytest.mark.parametrize(
    ("said", "ends", "wanted", "message"),
    [
        ("echo 'No known vulnerabilities found' >&2", 0, 0, "No known vulnerabilities found"),
        ("echo 'idna 3.6 PYSEC-1'", 1, 1, "idna 3.6 PYSEC-1"),
        ("echo 'ConnectionError: no network' >&2", 1, 2, "not audited: pip-audit could not look (ConnectionError"),
        ("echo 'a could not be audited'; echo 'b could not be audited'", 0, 2, "not audited: pip-audit could not look"),
        ("echo 'a could not be audited'", 0, 2, "not audited: 1 of 2 packages"),
    ],
)
def test_an_audit_that_did_not_look_does_not_pass(
    tmp_path: Path, said: str, ends: int, wanted: int, message: str
) -> None:
    (tmp_path / "constraints.txt").write_text("a==1\nb==2\n")
    tool = tmp_path / "pip-audit"
    tool.write_text(f"#!/bin/sh\n{said}\nexit {ends}\n")
    tool.chmod(tool.stat().st_mode | stat.S_IEXEC)
    done = script("audit.py", "constraints.txt", cwd=tmp_path, PATH=f"{tmp_path}:/usr/bin:/bin")
    assert (done.returncode, message in done.stdout) == (wanted, True), done


def test_a_missing_tool_is_one_sentence(tmp_path: Path) -> None:
    done = script("audit.py", "constraints.txt", cwd=tmp_path, PATH=str(tmp_path))
    assert done.returncode == 2
    assert done.stdout.startswith("not audited: pip-audit is not installed; ")

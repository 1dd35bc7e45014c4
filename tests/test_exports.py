"""The public names of the packages: all there, and free until one is used."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGES = ("sparse_model", "bridges", "interventions")
ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_resolves_and_no_other_does(package: str) -> None:
    module = importlib.import_module(package)
    assert module.__all__ == sorted(set(module.__all__))
    assert [name for name in module.__all__ if getattr(module, name) is None] == []
    with pytest.raises(AttributeError, match="has no attribute 'absent'"):
        getattr(module, "absent")  # noqa: B009 (no name that a type checker knows)


def test_importing_the_packages_brings_in_neither_torch_nor_transformers() -> None:
    code = f"import sys, {', '.join(PACKAGES)}; print(*sorted({{'torch', 'transformers'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_the_versions_agree() -> None:
    import sparse_model

    written = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    cited = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert written
    assert cited
    assert sparse_model.__version__ == written[1] == cited[1]

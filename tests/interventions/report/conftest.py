"""What the tests of the report share: a run that has every part, and its page."""

from pathlib import Path

import pytest
from support.helpers import make_tiny_run
from support.report_page import Page, page_of
from support.report_runs import (
    full_run,
)

from bridges.run_folder import Run


@pytest.fixture(scope="session")
def full(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that has every part of the report."""
    return full_run(tmp_path_factory.mktemp("full") / "run")


@pytest.fixture(scope="session")
def page(full: Run) -> Page:
    return page_of(full)


@pytest.fixture
def bare(tmp_path: Path) -> Run:
    """A run straight after training, not even evaluated."""
    return make_tiny_run(tmp_path / "run", n_layers=1)

"""Fixtures shared by the tests. Nothing here reaches a network or a user's cache."""

import os
import signal
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import pytest
import torch

if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # tests under nohup send it too
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Without a GPU the Triton kernels run in Triton's interpreter; they ask when they are imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


# What the tests of interventions share; files that need other models define fixtures of the same names.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of random weights with one named channel."""
    from support.helpers import CHANNEL, make_tiny_run

    from interventions.bundle.channels import save_channel

    folder = tmp_path_factory.mktemp("runs") / "run"
    make_tiny_run(folder)
    save_channel(folder, CHANNEL)
    return folder


@pytest.fixture(scope="module")
def dense(folder: Path):
    """Its dense model."""
    from interventions import load_dense

    return load_dense(folder)


@pytest.fixture
def run(dense):
    """The opened run of `dense`."""
    from interventions.bundle.bundle import get_bundle

    return get_bundle(dense).run


@pytest.fixture
def tokens() -> torch.Tensor:
    """Two prompts of random tokens."""
    return torch.randint(384, (2, 12))

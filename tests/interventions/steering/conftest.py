"""What the tests of steering share: one run of random weights, steered once."""

import pytest
from support.steering_runs import SMALL, TASK, steerable_dense

from bridges.run_folder import Run
from interventions.bundle.bundle import get_bundle
from interventions.steering.result import Steering
from interventions.steering.steer import steer
from interventions.steering.steered_prompts import Prompts, prompts_of
from interventions.tasks.catalogue import get_task


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSE_BRIDGES_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory):
    return steerable_dense(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="session")
def run(dense) -> Run:
    return get_bundle(dense).run


@pytest.fixture(scope="session")
def result(dense) -> Steering:
    return steer(dense, SMALL, progress=False)


@pytest.fixture
def prompts(run: Run) -> Prompts:
    """Of several lengths, whose edits begin at different tokens."""
    return prompts_of(get_task(TASK, run.tokenizer).sample(6, split="evaluation", seed=0))

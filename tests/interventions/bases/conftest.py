"""One run of random weights whose bases are compared once."""

import pytest
from support.steering_runs import CHANNEL, SMALL_COMPARISON, steerable_dense

from bridges.run_folder import Run
from interventions.bases.compare import compare_bases
from interventions.bases.result import Bases
from interventions.bundle.bundle import get_bundle
from interventions.steering.experiment_config import Experiment
from interventions.steering.setting import Setting, prepare_setting


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
def result(dense) -> Bases:
    return compare_bases(dense, SMALL_COMPARISON, progress=False)


@pytest.fixture(scope="session")
def setting(dense) -> Setting:
    """What the comparison worked with."""
    return prepare_setting(
        dense,
        Experiment(channel=CHANNEL.name, sets=((0,),), strengths=(1,), pairs=6, ridge_tokens=512, text_tokens=128),
    )

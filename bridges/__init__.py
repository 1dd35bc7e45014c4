"""Bridges between a frozen dense model and a weight-sparse transformer: training, hybrids, evaluation."""

from typing import TYPE_CHECKING

from sparse_model.exports import lazy_names

if TYPE_CHECKING:
    from bridges.bridge import BridgeSet
    from bridges.config import BridgeConfig, DenseTrainConfig, LossWeights, RunConfig
    from bridges.dense import DenseModel
    from bridges.evaluation import SiteReport, evaluate
    from bridges.halving import halve_run
    from bridges.hybrid import mixed_path, random_path, residuals, single_crossing, suffix
    from bridges.loading import load_lm
    from bridges.losses import kl, nmse
    from bridges.pipeline import evaluate_run, make_dense, train_bridge
    from bridges.run_folder import Run, open_run
    from bridges.shape import fit_to
    from bridges.sites import Site, all_sites
    from sparse_model.version import __version__

__all__ = [
    "BridgeConfig",
    "BridgeSet",
    "DenseModel",
    "DenseTrainConfig",
    "LossWeights",
    "Run",
    "RunConfig",
    "Site",
    "SiteReport",
    "__version__",
    "all_sites",
    "evaluate",
    "evaluate_run",
    "fit_to",
    "halve_run",
    "kl",
    "load_lm",
    "make_dense",
    "mixed_path",
    "nmse",
    "open_run",
    "random_path",
    "residuals",
    "single_crossing",
    "suffix",
    "train_bridge",
]

__getattr__ = lazy_names(
    __name__,
    {
        "bridges.bridge": "BridgeSet",
        "bridges.config": "BridgeConfig DenseTrainConfig LossWeights RunConfig",
        "bridges.dense": "DenseModel",
        "bridges.evaluation": "SiteReport evaluate",
        "bridges.halving": "halve_run",
        "bridges.hybrid": "mixed_path random_path residuals single_crossing suffix",
        "bridges.loading": "load_lm",
        "bridges.losses": "kl nmse",
        "bridges.pipeline": "evaluate_run make_dense train_bridge",
        "bridges.run_folder": "Run open_run",
        "bridges.shape": "fit_to",
        "bridges.sites": "Site all_sites",
    },
)


def __dir__() -> list[str]:
    return __all__

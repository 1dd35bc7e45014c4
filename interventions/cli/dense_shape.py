"""--dense alone says enough: the rest of the sparse model's shape follows from the dense model's."""

import dataclasses
import logging
import os
from pathlib import Path

from bridges.config import RunConfig
from interventions.cli.options import RunOptions

logger = logging.getLogger(__name__)


def fit(preset: RunConfig, dense: str, folder: Path) -> RunConfig:
    """A preset whose sparse model fits a dense one. Raises what `bridges.loading.read_config` raises."""
    from bridges.loading import read_config
    from bridges.shape import fit_to

    return fit_to(dataclasses.replace(preset, dense=dense), read_config(_source(dense, folder)))


def say_shape(options: RunOptions[RunConfig]) -> None:
    """Log the sparse model's shape where it followed from the dense model's, in one process."""
    dense = options.config.dense
    if dense and int(os.environ.get("RANK", "0")) == 0:
        from bridges.loading import read_config
        from bridges.shape import describe_shape

        logger.info("%s", describe_shape(options.config, read_config(_source(dense, options.folder))))


def _source(dense: str, folder: Path) -> str | Path:
    """The dense model, or the run's copy of it, which is all there may be left when the run goes on."""
    from bridges.packaged import dense_source

    copy = folder / "dense"
    return copy if (copy / "config.json").is_file() else dense_source(dense)

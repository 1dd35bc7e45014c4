"""Trained bundles that come with the package: dense model, tokenizer, sparse model, bridges, channels and circuits."""

import logging
from pathlib import Path

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent / "bundles"


def packaged_bundles() -> list[str]:
    """Names of the bundles in the package; `load_dense` and `load_hf` take them instead of a folder."""
    return sorted(path.parent.name for path in FOLDER.glob("*/config.json"))


def find_run(folder: str | Path) -> Path:
    """The folder of a packaged bundle whose name this is, or else of a run.

    A `Path`, and a string with a slash in it, is never a bundle's name. A folder beside which a bundle was taken is
    logged. Raises FileNotFoundError naming the folder and the packaged bundles.
    """
    path = Path(folder).expanduser()
    if isinstance(folder, str) and folder in packaged_bundles():
        if path.is_dir():
            logger.warning(
                "%s is the bundle that comes with the package, not the folder here: write ./%s for that", folder, folder
            )
        return FOLDER / folder
    if path.is_dir():
        return path  # whoever opens it says what is missing
    raise FileNotFoundError(
        f"no run at {folder}: train one with sparse-bridges train-bridge --run {folder}, or use a packaged bundle "
        f"({', '.join(packaged_bundles())})"
    )

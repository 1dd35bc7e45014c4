"""Where a bundle lies: in a run folder, in the package, or on the hub."""

import logging
from functools import cache
from pathlib import Path

from sparse_model.io.commands import command_line
from sparse_model.io.hub import download
from sparse_model.io.local import local_path

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent / "bundles"


def packaged_bundles() -> list[str]:
    """Names of the bundles in the package; `load_dense` and `load_hf` take them instead of a folder."""
    return sorted(path.parent.name for path in FOLDER.glob("*/config.json"))


def packaged(name: str | Path) -> Path | None:
    """The folder of a bundle in the package by its name; None for everything else, a `Path` among it.

    A folder of that name beside which the bundle is taken is logged.
    """
    if not isinstance(name, str) or name not in packaged_bundles():
        return None
    if Path(name).is_dir():
        _say_which(name, Path.cwd())
    return FOLDER / name


@cache
def _say_which(name: str, _here: Path) -> None:
    """Once, however often a run's name is looked up."""
    logger.warning("%s is the bundle that comes with the package, not the folder here: write ./%s for that", name, name)


def dense_source(name: str) -> str:
    """What `load_lm` takes for the dense model of a run's config: that of a packaged bundle, a folder or a hub name."""
    bundle = packaged(name)
    return str(bundle / "dense") if bundle else name


def find_run(folder: str | Path, revision: str | None = None) -> Path:
    """The folder of a packaged bundle whose name this is; of a run; or of the download of a bundle on the hub.

    The first of them that there is. A `Path`, and a string with a slash in it, is never a packaged bundle's name.
    revision: a branch, tag or commit on the hub.

    Raises FileNotFoundError naming the folder and the bundles, OSError for a bundle that the hub does not give.
    """
    bundle = packaged(folder)
    if bundle:
        return bundle
    path = Path(folder).expanduser()
    if path.is_dir():
        return path  # whoever opens it says what is missing
    none = (
        f"no run at {folder}: train one with {command_line('train-bridge', '--run', folder)}, or use a packaged "
        f"bundle ({', '.join(packaged_bundles())})"
    )
    if local_path(folder) is None and "/" in str(folder):
        found = download(str(folder), tried=f"{none}; it is no local folder", revision=revision)
        logger.info("%s is no folder here: taken from the hub", folder)
        return found
    raise FileNotFoundError(none)

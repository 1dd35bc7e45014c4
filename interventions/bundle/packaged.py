"""Where a bundle lies: in a run folder, in the package, or on the hub."""

import logging
from pathlib import Path

from sparse_model.io.commands import command_line
from sparse_model.io.hub import download
from sparse_model.io.local import local_path

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent / "bundles"


def packaged_bundles() -> list[str]:
    """Names of the bundles in the package; `load_dense` and `load_hf` take them instead of a folder."""
    return sorted(path.parent.name for path in FOLDER.glob("*/config.json"))


def find_run(folder: str | Path, revision: str | None = None) -> Path:
    """The folder of a packaged bundle whose name this is; of a run; or of the download of a bundle on the hub.

    The first of them that there is. A `Path`, and a string with a slash in it, is never a packaged bundle's name. A
    folder beside which a bundle was taken is logged. revision: a branch, tag or commit on the hub. Raises
    FileNotFoundError naming the folder and the packaged bundles, OSError for a bundle that the hub does not give.
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
    none = (
        f"no run at {folder}: train one with {command_line('train-bridge', '--run', folder)}, or use a packaged "
        f"bundle ({', '.join(packaged_bundles())})"
    )
    if local_path(folder) is None and "/" in str(folder):
        found = download(str(folder), tried=f"{none}; it is no local folder", revision=revision)
        logger.info("%s is no folder here: taken from the hub", folder)
        return found
    raise FileNotFoundError(none)

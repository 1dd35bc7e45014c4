"""Trained bundles that come with the package: dense model, tokenizer, sparse model, bridges, channels and circuits."""

from pathlib import Path

FOLDER = Path(__file__).parent / "bundles"


def packaged_bundles() -> list[str]:
    """Names of the bundles in the package; `load_dense` and `load_hf` take them instead of a folder."""
    return sorted(path.parent.name for path in FOLDER.glob("*/config.json"))


def find_run(folder: str | Path) -> Path:
    """The folder of a run, or of a packaged bundle where the name is one and no folder of that name is a run.

    Raises FileNotFoundError naming the folder and the packaged bundles.
    """
    path = Path(folder).expanduser()
    if (path / "config.json").is_file():
        return path
    if str(folder) in packaged_bundles():
        return FOLDER / str(folder)
    if path.is_dir():
        return path  # whoever opens it says what is missing
    raise FileNotFoundError(
        f"no run at {folder}: train one with sparse-bridges train-bridge --run {folder}, or use a packaged bundle "
        f"({', '.join(packaged_bundles())})"
    )

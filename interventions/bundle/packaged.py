"""Trained bundles that come with the package: dense model, tokenizer, sparse model, bridges, channels and circuits."""

import dataclasses
import json
import shutil
from pathlib import Path

from bridges.config import RunConfig
from interventions.bundle.channels import FILE as CHANNELS
from interventions.bundle.channels import load_channels
from sparse_model.config import from_json
from sparse_model.io.atomic import replace_folder

FOLDER = Path(__file__).parent / "bundles"
LARGEST = 8 * 2**20
"""Bytes of a bundle, so that the package stays small."""


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


def package_run(run: str | Path, out: str | Path) -> Path:
    """Copy what interventions need of a finished run to `out`, whole or not at all.

    Raises what `bridges.run_folder.open_run` raises, ValueError for a run without named channels and for more than 8
    MB.
    """
    # Both need TransformerLens, which load_hf does without.
    from bridges.run_folder import open_run
    from interventions.circuits.circuit import FOLDER as CIRCUITS

    run, out = Path(run), Path(out)
    open_run(run)
    if not load_channels(run):
        raise ValueError(f"{run} names no channel: run sparse-bridges find-channel --run {run} first")
    with replace_folder(out) as temporary:
        for part in ("tokenizer", "dense", "sparse", "bridges"):
            shutil.copytree(run / part, temporary / part)
        # Where the models lay on the machine that trained is nobody's business.
        config = dataclasses.asdict(from_json(RunConfig, run / "config.json")) | {"dense": None, "tokenizer": None}
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        circuits = (path for kind in ("json", "safetensors") for path in (run / CIRCUITS).glob(f"*.{kind}"))
        for path in (run / CHANNELS, run / "metrics.json", *circuits):
            if path.exists():
                copy = temporary / path.relative_to(run)
                copy.parent.mkdir(exist_ok=True)
                shutil.copy(path, copy)
        size = sum(path.stat().st_size for path in temporary.rglob("*"))
        if size > LARGEST:
            raise ValueError(
                f"{run} takes {size / 2**20:.1f} MB, a bundle at most {LARGEST / 2**20:g}: use a smaller model"
            )
    return out

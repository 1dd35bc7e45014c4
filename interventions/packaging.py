"""A finished run made into a bundle that comes with the package; `interventions.bundle.packaged` finds it there."""

import dataclasses
import json
import shutil
from pathlib import Path

from bridges.config import RunConfig
from bridges.run_folder import open_run, write_digests
from interventions.bundle.channels import FILE as CHANNELS
from interventions.bundle.channels import load_channels
from interventions.circuits.circuit import FOLDER as CIRCUITS
from sparse_model.config import from_json
from sparse_model.io.atomic import replace_folder

LARGEST_BUNDLE = 8 * 2**20
"""Bytes, so that the package stays small."""


def package_run(run: str | Path, out: str | Path) -> Path:
    """Copy what interventions need of a finished run to `out`, whole or not at all.

    Raises what `bridges.run_folder.open_run` raises, ValueError for a run without named channels and for more than 8
    MB.
    """
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
        write_digests(temporary)
        size = sum(path.stat().st_size for path in temporary.rglob("*"))
        if size > LARGEST_BUNDLE:
            raise ValueError(
                f"{run} takes {size / 2**20:.1f} MB, a bundle at most {LARGEST_BUNDLE / 2**20:g}: use a smaller model"
            )
    return out

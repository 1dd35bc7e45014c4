"""A finished run made into a bundle: a folder for others, or one that comes with the package."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from bridges import bundle_format
from bridges.bundle_format import DenseReference, dense_files, pin, read_reference, write_format, write_reference
from bridges.config import RunConfig
from bridges.packaged import dense_source, find_run
from bridges.run_folder import Run, open_run, write_digests
from interventions.bundle.channels import FILE as CHANNELS
from interventions.bundle.channels import load_channels
from interventions.circuits.circuit import FOLDER as CIRCUITS
from interventions.report.labels import FOLDER as LABELS
from interventions.sharing.card import bundle_card
from sparse_model.config import from_json
from sparse_model.io.atomic import replace_folder
from sparse_model.io.commands import command_line
from sparse_model.io.local import local_path
from sparse_model.training.identity import digest_of

LARGEST_BUNDLE = 20 * 2**20
"""Bytes of a bundle in the package, so that the package stays small."""

PARTS = ("tokenizer", "dense", "sparse", "bridges", CIRCUITS, LABELS)
"""The folders of a bundle."""

DensePart = Literal["inside", "reference"]


def save_pretrained(
    run: str | Path, folder: str | Path, *, dense: DensePart = "inside", repo_id: str | None = None
) -> Path:
    """Write what others need of a finished run to a folder, whole or not at all, with a card; returns the folder.

    It holds the dense model, the tokenizer, the sparse model, the bridges, the channels, the circuits with their
    controls and labels, the figures and README.md, and is read by `load_dense` and `load_hf`. `dense="reference"` names
    the dense model by hub name, commit and digest instead; `repo_id` is the name by which the card loads the bundle.

    Raises what `find_run` and `open_run` raise; FileExistsError for a folder that holds something else than a bundle;
    ValueError for a circuit that does not read, and for a reference to a model that is not on the hub or has other
    weights there.
    """
    folder = Path(folder).expanduser()
    if folder.exists() and not (folder / bundle_format.FILE).is_file() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} holds something else than a bundle: name another folder")
    opened = open_run(find_run(run))
    reference = _reference(opened) if dense == "reference" else None
    with _written(opened, folder, reference) as temporary:
        card = bundle_card(opened, repo_id or str(folder), reference)
        (temporary / "README.md").write_text(card, encoding="utf-8")
    return folder


def package_run(run: str | Path, out: str | Path) -> Path:
    """Copy what interventions need of a finished run to `out`, whole or not at all.

    Raises what `bridges.run_folder.open_run` raises, ValueError for a run without named channels and for more than 20
    MB.
    """
    opened = open_run(run)
    if not load_channels(opened.folder):
        raise ValueError(f"{run} names no channel: run {command_line('find-channel', '--run', run)} first")
    with _written(opened, Path(out), None) as temporary:
        size = sum(path.stat().st_size for path in temporary.rglob("*"))
        if size > LARGEST_BUNDLE:
            raise ValueError(
                f"{run} takes {size / 2**20:.1f} MB, a bundle at most {LARGEST_BUNDLE / 2**20:g}: make it smaller "
                f"with {command_line('halve', '--run', run, '--out', f'{run}-half')}, or train a smaller one"
            )
    return Path(out)


@contextmanager
def _written(run: Run, out: Path, reference: DenseReference | None) -> Iterator[Path]:
    """A bundle in a temporary folder, which takes the place of `out` when nothing went wrong."""
    source = run.folder
    with replace_folder(out) as temporary:
        for part in ("tokenizer", "sparse", "bridges"):
            shutil.copytree(source / part, temporary / part)
        if reference:
            write_reference(temporary, reference)
        else:
            shutil.copytree(dense_files(source), temporary / "dense")
        # Where the models lay on the machine that trained is nobody's business.
        config = dataclasses.asdict(from_json(RunConfig, source / "config.json")) | {"dense": None, "tokenizer": None}
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        wanted = ((CIRCUITS, "json"), (CIRCUITS, "safetensors"), (LABELS, "json"))
        others = (path for part, kind in wanted for path in (source / part).glob(f"*.{kind}"))
        for path in (source / CHANNELS, source / "metrics.json", *others):
            if path.exists():
                copy = temporary / path.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                shutil.copy(path, copy)
        write_format(temporary)
        write_digests(temporary)  # not among the bundle's files, so that it may be removed
        yield temporary


def _reference(run: Run) -> DenseReference:
    known = read_reference(run.folder)
    if known:
        return known
    name = run.config.dense
    if name is None or local_path(dense_source(name)) is not None:
        where = "was trained here" if name is None else f"was read from {name}"
        raise ValueError(f"dense='reference': the dense model of {run.folder} {where}, not the hub: use dense='inside'")
    return pin(name, digest_of(run.dense.hf.parameters()))

"""Token blocks on disk: an Arrow DatasetDict plus the report and a digest of every split."""

import hashlib
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int32

from sparse_model.data.text_files import SPLITS, Split
from sparse_model.io.atomic import clean_up_beside, remove_folder, replace_folder
from sparse_model.io.lock import hold

if TYPE_CHECKING:  # a second of imports that nothing but a corpus needs: loading a run does without
    from datasets import Dataset
    from datasets.table import InMemoryTable

Blocks = dict[Split, Int32[np.ndarray, "block n_ctx"]]


def cache_folder(chosen: str | Path | None = None) -> Path:
    """Where corpora are kept: `chosen`, else `$SPARSE_BRIDGES_CACHE`, else `~/.cache/sparse-bridges`."""
    return Path(chosen or os.environ.get("SPARSE_BRIDGES_CACHE") or "~/.cache/sparse-bridges").expanduser()


def lock_file(folder: Path) -> Path:
    """What the process that builds the blocks of `folder` holds."""
    return folder.with_name(f"{folder.name}.lock")


@contextmanager
def one_builder(folder: Path) -> Iterator[None]:
    """Wait until no other process builds the blocks of `folder`; what a killed one left of them is removed."""
    with hold(lock_file(folder), wait=True):
        clean_up_beside(folder)
        yield


def write_cache(folder: Path, blocks: Blocks, report: dict[str, Any]) -> None:
    """Write `folder` whole or not at all."""
    import datasets

    quiet = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with replace_folder(folder) as temporary:
            dataset = datasets.DatasetDict({split: datasets.Dataset(_table(array)) for split, array in blocks.items()})
            dataset.save_to_disk(temporary)
            facts = {"digests": {split: _digest(array) for split, array in blocks.items()}, "report": report}
            (temporary / "blocks.json").write_text(json.dumps(facts, indent=1))
    finally:
        if not quiet:
            datasets.enable_progress_bars()


def read_cache(folder: Path) -> tuple[Blocks, dict[str, Any]] | None:
    """The blocks and report in `folder`; if damaged, a warning, the folder's removal, and None."""
    import datasets

    try:
        facts = json.loads((folder / "blocks.json").read_text())
        dataset = datasets.load_from_disk(str(folder))
        blocks = {split: _array(dataset[split]) for split in SPLITS}
        for split, array in blocks.items():
            if _digest(array) != facts["digests"][split]:
                raise ValueError(f"{split} is not what was written")
        return blocks, facts["report"]
    except (MemoryError, PermissionError):  # the files may be whole
        raise
    except Exception as error:  # whatever a damaged file makes of the JSON and Arrow readers
        warnings.warn(f"corpus cache {folder} is damaged ({error}); building it again", stacklevel=3)
        remove_folder(folder)
        return None


def _table(blocks: Int32[np.ndarray, "block n_ctx"]) -> "InMemoryTable":
    import pyarrow as pa
    from datasets.table import InMemoryTable

    rows = pa.FixedSizeListArray.from_arrays(pa.array(blocks.reshape(-1)), blocks.shape[1])
    return InMemoryTable(pa.table({"tokens": rows}))


def _array(dataset: "Dataset") -> Int32[np.ndarray, "block n_ctx"]:
    column = dataset.data.column("tokens").combine_chunks()
    # A copy: Arrow's memory map is read-only, which torch tensors cannot be.
    return np.array(column.flatten(), dtype=np.int32).reshape(len(column), -1)


def _digest(blocks: Int32[np.ndarray, "block n_ctx"]) -> str:
    return hashlib.sha256(np.ascontiguousarray(blocks).data).hexdigest()

"""Saving and loading a model folder in one call; `sparse_model.model.weight_files` says what is in it."""

from pathlib import Path

from sparse_model.io.atomic import replace_folder
from sparse_model.model.transformer import SparseTransformer
from sparse_model.model.weight_files import read_model, write_files


def save_sparse(model: SparseTransformer, folder: Path, *, compress: bool = True) -> None:
    """Write a model folder in one rename; `compress=False` stores every tensor whole."""
    with replace_folder(folder) as temporary:
        write_files(temporary, model.cfg, model.state_dict(), model.measured, compress=compress)


def load_sparse(folder: Path) -> SparseTransformer:
    """Read a model that `save_sparse` wrote.

    Raises FileNotFoundError for a missing folder or file, ValueError for a damaged or truncated one or for tensors
    that do not fit the config, naming the file and the tensor.
    """
    return read_model(SparseTransformer, folder)

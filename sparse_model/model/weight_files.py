"""The files of a model folder: safetensors only, sparse matrices as their nonzeros, nothing half-written.

A parameter with few nonzeros is stored as `NAME.values` and `NAME.indices` (flat, int32 or int64), so that a model
folder is about as large as its L0; others are stored whole. Loading restores every weight bit for bit.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sparse_model.config import SparseConfig, from_json, to_json
from sparse_model.io.atomic import recover_folder, replace_file, write_text
from sparse_model.io.tensors import load_checked, read_tensors

WEIGHTS, MEASURED = "model.safetensors", "measured.json"

Model = TypeVar("Model", bound=nn.Module)


def write_files(
    folder: Path, cfg: SparseConfig, state: dict[str, Tensor], measured: dict[str, Any], *, compress: bool = True
) -> None:
    """Write model.safetensors, config.json, and measured.json where there are figures, each in one rename."""
    if cfg.tied:  # stored once
        state = {name: t for name, t in state.items() if name != "unembedding.weight"}
    with replace_file(folder / WEIGHTS) as temporary:
        save_file(pack_nonzeros(state) if compress else _contiguous(state), temporary)
    (folder / MEASURED).unlink(missing_ok=True)
    if measured:
        write_measured(measured, folder)
    to_json(cfg, folder / "config.json")


def write_measured(measured: dict[str, Any], folder: Path) -> None:
    """Write the figures measured on a model that is already in its folder."""
    write_text(folder / MEASURED, json.dumps(measured, indent=1) + "\n")


def read_model(build: Callable[[SparseConfig], Model], folder: Path) -> Model:
    """The model that `build` makes of the config in a folder, with the weights and figures that are there.

    Raises FileNotFoundError for a missing folder or file, ValueError for a damaged or truncated one or for tensors
    that do not fit the config, naming the file and the tensor.
    """
    recover_folder(folder)
    cfg = from_json(SparseConfig, folder / "config.json")
    model = build(cfg)
    shapes = {name: t.shape for name, t in model.state_dict().items()}
    state = unpack_nonzeros(read_tensors(folder / WEIGHTS), shapes, folder / WEIGHTS)
    if cfg.tied and "token_embed.weight" in state:
        state["unembedding.weight"] = state["token_embed.weight"]
    load_checked(model, state, folder / WEIGHTS)
    if (folder / MEASURED).exists():
        model.measured = json.loads((folder / MEASURED).read_text(encoding="utf-8"))
    return model


def pack_nonzeros(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Replace each tensor that is smaller as nonzeros by its values and flat indices."""
    packed = {}
    for name, t in _contiguous(state).items():
        # Compared as bits: -0.0 is a value that must come back.
        flat = t.reshape(-1)
        kept = ((flat != 0) | flat.signbit()).nonzero().squeeze(1)
        index_type = torch.int32 if flat.numel() < 2**31 else torch.int64
        index_bytes = torch.empty(0, dtype=index_type).element_size()
        if kept.numel() * (flat.element_size() + index_bytes) < flat.numel() * flat.element_size():
            packed[f"{name}.values"], packed[f"{name}.indices"] = flat[kept], kept.to(index_type)
        else:
            packed[name] = t
    return packed


def unpack_nonzeros(tensors: dict[str, Tensor], shapes: dict[str, torch.Size], source: Path) -> dict[str, Tensor]:
    """Invert `pack_nonzeros`. A packed tensor of unknown name or with indices out of range is a ValueError."""
    state = {}
    for name, t in tensors.items():
        base = name.removesuffix(".values")
        if name.endswith(".indices") and name.removesuffix(".indices") + ".values" in tensors:
            continue
        if base == name or f"{base}.indices" not in tensors:
            state[name] = t
            continue
        indices = tensors[f"{base}.indices"].long()
        if base not in shapes:
            raise ValueError(f"{source}: unknown tensor {base}")
        full = torch.zeros(shapes[base].numel(), dtype=t.dtype)
        if indices.shape != t.shape or (len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < len(full)):
            raise ValueError(f"{source}: the indices of {base} do not fit its shape {tuple(shapes[base])}")
        full[indices] = t
        state[base] = full.view(shapes[base])
    return state


def _contiguous(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().cpu().contiguous() for name, t in state.items()}

"""The files of a model folder: safetensors only, sparse matrices as their nonzeros, nothing half-written.

A parameter with few nonzeros is stored as `NAME.values` and `NAME.indices` (flat, int32 or int64), so that a model
folder is about as large as its L0; others are stored whole. Numbers take fewer bytes where that loses nothing
(`sparse_model.io.narrow`). Loading restores every weight bit for bit.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sparse_model.config import SparseConfig, from_json
from sparse_model.io.atomic import recover_folder, replace_file, write_text
from sparse_model.io.narrow import narrowed, read_weights
from sparse_model.io.reading import read_typed
from sparse_model.io.tensors import Shape, check_sizes, load_checked, read_shapes

WEIGHTS, MEASURED = "model.safetensors", "measured.json"

Model = TypeVar("Model", bound=nn.Module)
_FEW, _LARGEST_EMPTY = 64, 2**28
"""Nonzeros from which on they show how large their tensor is; with fewer it has at most so many entries."""


def write_files(
    folder: Path, cfg: SparseConfig, state: dict[str, Tensor], measured: dict[str, Any], *, compress: bool = True
) -> None:
    """Write model.safetensors, config.json, and measured.json where there are figures, each in one rename.

    Weights and config are whole before the first takes its place: a full disk leaves the earlier model.
    """
    if cfg.tied:  # stored once
        state = {name: t for name, t in state.items() if name != "unembedding.weight"}
    with replace_file(folder / "config.json") as described, replace_file(folder / WEIGHTS) as temporary:
        described.write_text(json.dumps(asdict(cfg), indent=2) + "\n", encoding="utf-8")
        save_file(smallest(state) if compress else _contiguous(state), temporary)
    (folder / MEASURED).unlink(missing_ok=True)
    if measured:
        write_measured(measured, folder)


def write_measured(measured: dict[str, Any], folder: Path) -> None:
    """Write the figures measured on a model that is already in its folder."""
    write_text(folder / MEASURED, json.dumps(measured, indent=1) + "\n")


def read_model(build: Callable[[SparseConfig], Model], folder: Path) -> Model:
    """The model that `build` makes of the config in a folder, with the weights and figures that are there.

    Raises FileNotFoundError for a missing folder or file, ValueError for a damaged or truncated one or for tensors
    that do not fit the config, naming the file and the tensor. Nothing as large as the config says is allocated before
    it is compared with the weights.
    """
    recover_folder(folder)
    cfg, weights = from_json(SparseConfig, folder / "config.json"), folder / WEIGHTS
    check_layers(cfg, read_shapes(weights), weights)
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in build(cfg).state_dict().items()}
    state = unpack_nonzeros(read_weights(weights), shapes, weights)
    model = build(cfg)
    if cfg.tied and "token_embed.weight" in state:
        state["unembedding.weight"] = state["token_embed.weight"]
    load_checked(model, state, weights)
    if (folder / MEASURED).exists():
        remedy = "remove it, only the model's card shows it"
        setattr(model, "measured", read_typed(dict[str, int | float | str | None], folder / MEASURED, remedy))  # noqa: B010
    return model


def check_layers(cfg: SparseConfig, stored: Mapping[str, Shape], weights: Path) -> None:
    """Raise ValueError where the layers, the width or the tying of a config are not those of the weights."""
    numbers = {name.split(".")[1] for name in stored if name.startswith("blocks.")}
    width = stored.get("ln_final.weight", ())
    untied = any(name.startswith("unembedding.weight") for name in stored)
    sizes = {"n_layers": (cfg.n_layers, len(numbers))}
    sizes |= {"d_model": (cfg.d_model, width[0])} if len(width) == 1 else {}
    check_sizes(weights, sizes)
    if cfg.tied and untied:
        raise ValueError(f"{weights}: tied=True in the config, but there is an unembedding of its own: set it to false")


def smallest(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor whole or as its values and flat indices, whichever takes fewer bytes."""
    stored: dict[str, Tensor] = {}
    for name, t in _contiguous(state).items():
        whole, nonzeros = narrowed({name: t}), narrowed(_nonzeros(name, t))
        stored |= nonzeros if _bytes(nonzeros) < _bytes(whole) else whole
    return stored


def _nonzeros(name: str, t: Tensor) -> dict[str, Tensor]:
    # Compared as bits: -0.0 is a value that must come back.
    flat = t.reshape(-1)
    kept = ((flat != 0) | flat.signbit()).nonzero().squeeze(1)
    indices = kept.to(torch.int32 if flat.numel() < 2**31 else torch.int64)
    return {f"{name}.values": flat[kept], f"{name}.indices": indices}


def _bytes(tensors: dict[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())


def unpack_nonzeros(tensors: dict[str, Tensor], shapes: dict[str, torch.Size], source: Path) -> dict[str, Tensor]:
    """Whole tensors; a packed one of unknown name or with indices out of range is a ValueError."""
    state = {}
    for name, t in tensors.items():
        base = name.removesuffix(".values")
        if name.endswith(".indices") and name.removesuffix(".indices") + ".values" in tensors:
            continue
        if base == name or f"{base}.indices" not in tensors:
            state[name] = t
            continue
        if base not in shapes:
            raise ValueError(f"{source}: unknown tensor {base}")
        indices = tensors[f"{base}.indices"]
        _check_indices(indices, t, shapes[base], f"{source}: the indices of {base}")
        full = torch.zeros(shapes[base].numel(), dtype=t.dtype)
        full[indices.long()] = t
        state[base] = full.view(shapes[base])
    return state


def _check_indices(indices: Tensor, values: Tensor, shape: torch.Size, words: str) -> None:
    """Before the whole tensor is allocated; nonzeros that all lie in its first hundredth are another shape's."""
    entries, count = shape.numel(), values.numel()
    whole = indices.dtype in (torch.int32, torch.int64) and indices.shape == values.shape == (count,)
    if whole and count:
        last = int(indices.max())
        whole = int(indices.min()) >= 0 and last < entries and bool((indices[1:] > indices[:-1]).all())
        whole = whole and (count < _FEW or entries < 100 * last)
    if not whole or (count < _FEW and entries > _LARGEST_EMPTY):
        raise ValueError(f"{words} do not fit its shape {tuple(shape)}: take config.json and weights from one model")


def _contiguous(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().cpu().contiguous() for name, t in state.items()}

"""Interventions on disk: a folder with intervention.json and intervention.safetensors, for one run's models only.

An activation's unit and the decoder's direction mean nothing in another model, so the file carries the layer count and
digests of the weights it was made with, and a model that differs is refused.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from interventions.bundle.bundle import Bundle
from interventions.bundle.channels import Channel
from interventions.editing.arguments import check_channel, site
from interventions.editing.build import acting, make_fixed, make_source
from interventions.editing.hooks import Edit
from interventions.editing.positions import Positions
from interventions.editing.vectors import Delta, Fixed, SetTo, Toward
from sparse_model.io.atomic import recover_folder, replace_folder

SETTINGS, TENSORS = "intervention.json", "intervention.safetensors"


def save_edits(path: Path, bundle: Bundle, edits: tuple[Edit, ...]) -> None:
    """Write a folder in one rename. Raises FileExistsError where something else is, ValueError for a callable."""
    if path.exists() and not (path / SETTINGS).is_file():
        raise FileExistsError(f"{path} exists and is no saved intervention: choose another path")
    tensors: dict[str, Tensor] = {}
    entries = [_pack(edit, f"{i}.", tensors) for i, edit in enumerate(edits)]
    settings = {"run": str(bundle.folder), "models": bundle.identity(), "edits": entries}
    with replace_folder(path) as temporary:
        save_file(tensors, temporary / TENSORS)
        (temporary / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def load_edits(path: Path, bundle: Bundle) -> tuple[Edit, ...]:
    """Read what `save_edits` wrote.

    Raises FileNotFoundError where nothing is, ValueError for a damaged file and for another model, naming what differs.
    """
    recover_folder(path)
    for name in (SETTINGS, TENSORS):
        if not (path / name).is_file():
            raise FileNotFoundError(
                f"{path / name} does not exist: save an intervention with handle.save({str(path)!r})"
            )
    here = bundle.identity()
    try:
        settings = json.loads((path / SETTINGS).read_text(encoding="utf-8"))
        tensors = load_file(path / TENSORS)
        models, run = settings["models"], settings["run"]
        differences = _differences(models, here)
        earlier = any(entry["kind"] != "vector" and "units" not in entry for entry in settings["edits"])
        if not differences and not earlier:
            return tuple(_unpack(entry, f"{i}.", tensors, bundle) for i, entry in enumerate(settings["edits"]))
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, SafetensorError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): save the intervention again") from error
    if not differences:
        raise ValueError(
            f"{path} is of an earlier version, which moved channels by the sparse stream's mean scale and not by "
            "each token's own: build the intervention again and save that"
        )
    raise ValueError(
        f"{path} was saved for other models: {'; '.join(differences)}. Load it onto those of {run}, or build the "
        "intervention again on this model"
    )


def _differences(saved: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """What differs, in words."""
    differences = []
    if saved["layers"] != here["layers"]:
        differences.append(f"{saved['layers']} layers there, {here['layers']} here")
    if saved["dense dtype"] != here["dense dtype"]:
        differences.append(f"the dense model is in {saved['dense dtype']} there, {here['dense dtype']} here")
    elif saved["dense"] != here["dense"]:
        differences.append("the dense model's weights differ")
    if saved["sparse"] != here["sparse"]:
        differences.append("the sparse model's weights differ")
    if saved["bridges"] != here["bridges"]:
        differences.append("the bridges differ")
    return differences


def _pack(edit: Edit, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """An edit as JSON; tensors go to `tensors` under the prefix."""

    def number(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        # A clone: safetensors refuses tensors that share memory, and several edits may hold the same one.
        tensors[prefix + name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return None

    source: dict[str, Any] = {"strength": getattr(edit.source, "strength", None)}
    match edit.source:
        case Delta():
            source |= {"kind": "delta", "delta": number("delta", edit.source.delta)}
        case SetTo():
            source |= {"kind": "set_to", "set_to": number("set_to", edit.source.value)}
        case Toward():
            source |= {"kind": "toward", "toward": number("toward", edit.source.tokens)}
        case Fixed():
            source |= {"kind": "vector", "vector": number("vector", edit.source.vector)}
    channel = getattr(edit.source, "channel", None)
    return {
        "site": edit.site.index,
        "reads": edit.site.label,
        "where": edit.where,
        "steps": edit.steps,
        "prompt_length": edit.prompt_length,
        "positions": _pack_positions(edit.positions, number),
        "channel": None if channel is None else asdict(channel),
        "units": edit.source.units,
        **source,
    }


def _pack_positions(positions: Positions, number: Any) -> Any:
    if isinstance(positions, slice):
        return {"slice": [positions.start, positions.stop, positions.step]}
    if isinstance(positions, Tensor):
        return {"tensor": number("positions", positions)}
    if positions is None or isinstance(positions, int):
        return positions
    if callable(positions):
        raise ValueError("positions is a callable, which cannot be saved: give numbers, a slice or a mask")
    return [int(p) for p in positions]


def _unpack(entry: dict[str, Any], prefix: str, tensors: dict[str, Tensor], bundle: Bundle) -> Edit:
    """Invert `_pack`."""
    positions, kind, strength = entry["positions"], entry["kind"], entry["strength"]
    if isinstance(positions, dict):
        positions = slice(*positions["slice"]) if "slice" in positions else tensors[prefix + "positions"]
    device = bundle.bridges.rms_sparse.device
    given: Any = tensors[prefix + kind].to(device) if prefix + kind in tensors else entry.get(kind)
    acts = acting(bundle, positions, entry["steps"], entry["where"], entry.get("prompt_length"))
    place = site(entry["site"], bundle.shape.n_layers)
    if kind == "vector":
        return acts(place, make_fixed(bundle, given, strength))
    channel = Channel.from_dict(entry["channel"])
    check_channel(channel, bundle.shape)
    if channel.site != place.index:
        raise ValueError(f"the edit is at {place.label}, its channel at site {channel.site}")
    return acts(place, make_source(bundle, channel, kind, given, strength, units=entry["units"]))

"""Interventions on disk: a folder with intervention.json and intervention.safetensors, for one run's models only.

An activation's unit and the decoder's direction mean nothing in another model, so the file carries the layer count and
digests of the weights it was made with, and a model that differs is refused.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NotRequired

import torch
from safetensors.torch import save_file
from torch import Tensor
from typing_extensions import TypedDict

from interventions.bundle.bundle import Bundle
from interventions.bundle.channels import Channel
from interventions.editing.arguments import check_channel, site
from interventions.editing.build import acting, make_fixed, make_source
from interventions.editing.hooks import Edit
from interventions.editing.positions import Positions
from interventions.editing.units import Units
from interventions.editing.vectors import Delta, Fixed, SetTo, Toward
from interventions.editing.where import Where
from sparse_model.io.atomic import recover_folder, replace_folder
from sparse_model.io.manifest import digest_file
from sparse_model.io.reading import NOTHING_ELSE, read_sealed, sealed, typed
from sparse_model.io.tensors import read_tensors

SETTINGS, TENSORS = "intervention.json", "intervention.safetensors"


_Models = TypedDict(
    "_Models", {"layers": int, "dense": str, "dense dtype": str, "sparse": str, "bridges": str}
)  # `Bundle.identity`


class _Slice(TypedDict):
    __pydantic_config__ = NOTHING_ELSE  # type: ignore[misc]

    slice: tuple[int | None, int | None, int | None]


class _InTensors(TypedDict):
    __pydantic_config__ = NOTHING_ELSE  # type: ignore[misc]

    tensor: None


class _Entry(TypedDict):
    """An edit; a number that is None is a tensor."""

    __pydantic_config__ = NOTHING_ELSE  # type: ignore[misc]

    site: int
    reads: str
    where: Where
    steps: Literal["all", "prompt", "generated"]
    prompt_length: NotRequired[int | None]
    positions: int | list[int] | _Slice | _InTensors | None
    channel: Channel | None
    rms_sparse: NotRequired[float]
    kind: Literal["delta", "set_to", "toward", "vector"]
    strength: int | float | None
    units: NotRequired[Units]
    delta: NotRequired[int | float | None]
    set_to: NotRequired[int | float | None]
    toward: NotRequired[None]
    vector: NotRequired[None]


class _Stored(TypedDict):
    """What intervention.json holds."""

    __pydantic_config__ = NOTHING_ELSE  # type: ignore[misc]

    run: str
    models: _Models
    edits: list[_Entry]
    tensors_sha256: NotRequired[str]


def save_edits(path: Path, bundle: Bundle, edits: tuple[Edit, ...]) -> None:
    """Write a folder in one rename. Raises FileExistsError where something else is, ValueError for a callable."""
    if path.exists() and not (path / SETTINGS).is_file():
        raise FileExistsError(f"{path} exists and is no saved intervention: choose another path")
    tensors: dict[str, Tensor] = {}
    entries = [_pack(edit, f"{i}.", tensors) for i, edit in enumerate(edits)]
    settings = {"run": str(bundle.folder), "models": bundle.identity(), "edits": entries}
    with replace_folder(path) as temporary:
        save_file(tensors, temporary / TENSORS)
        settings["tensors_sha256"] = digest_file(temporary / TENSORS)
        (temporary / SETTINGS).write_text(sealed(settings), encoding="utf-8")


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
    again = "save the intervention again"
    stored = typed(_Stored, read_sealed(path / SETTINGS, again), path / SETTINGS, again)
    tensors = read_tensors(path / TENSORS)
    differences = _differences(stored["models"], bundle.identity())
    if differences:
        raise ValueError(
            f"{path} was saved for other models: {'; '.join(differences)}. Load it onto those of {stored['run']}, or "
            "build the intervention again on this model"
        )
    if any(entry["kind"] != "vector" and "units" not in entry for entry in stored["edits"]):
        raise ValueError(
            f"{path} is of an earlier version, which moved channels by the sparse stream's mean scale and not by "
            "each token's own: build the intervention again and save that"
        )
    if "tensors_sha256" in stored and stored["tensors_sha256"] != digest_file(path / TENSORS):
        raise ValueError(f"{path / TENSORS} does not belong to the {SETTINGS} beside it (other digest): {again}")
    try:
        return tuple(_unpack(entry, f"{i}.", tensors, bundle) for i, entry in enumerate(stored["edits"]))
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(f"{path} is damaged ({error}): {again}") from error


def _differences(saved: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
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


def _unpack(entry: "_Entry", prefix: str, tensors: dict[str, Tensor], bundle: Bundle) -> Edit:
    """Invert `_pack`."""
    positions: Any = entry["positions"]
    kind, strength = entry["kind"], entry["strength"]
    if isinstance(positions, dict):
        positions = slice(*positions["slice"]) if "slice" in positions else tensors[prefix + "positions"]
    device = bundle.bridges.rms_sparse.device
    given: Any = tensors[prefix + kind].to(device) if prefix + kind in tensors else entry.get(kind)
    acts = acting(bundle, positions, entry["steps"], entry["where"], entry.get("prompt_length"))
    place = site(entry["site"], bundle.shape.n_layers)
    if entry["reads"] != place.label:
        raise ValueError(f"the edit {prefix.rstrip('.')} reads {entry['reads']}, but its site is {place.label}")
    if kind == "vector":
        return acts(place, make_fixed(bundle, given, strength))
    channel = entry["channel"]
    if channel is None:
        raise ValueError(f"the edit {prefix.rstrip('.')} has no channel")
    check_channel(channel, bundle.shape)
    if channel.site != place.index:
        raise ValueError(f"the edit is at {place.label}, its channel at site {channel.site}")
    return acts(place, make_source(bundle, channel, kind, given, strength, units=entry["units"]))

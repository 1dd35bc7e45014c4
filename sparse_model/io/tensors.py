"""Reading tensors from disk into modules, with errors that name the file and the tensor; digests of weights."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

Shape = tuple[int, ...]


_TYPES = {
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool),
}
"""What torch computes with; of the others it knows little more than the name."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises FileNotFoundError or ValueError (damaged, truncated, numbers of a type that nothing computes with), which
    name the file.
    """
    with _damage_named(path):
        tensors = load_file(path)
    for name, t in tensors.items():
        if t.dtype not in _TYPES:
            kind = str(t.dtype).removeprefix("torch.")
            raise ValueError(f"{path} is damaged or not of this library ({name} holds {kind}): copy or train it again")
    return tensors


def read_shapes(path: Path) -> dict[str, Shape]:
    """The shapes of the tensors in a safetensors file, from its header, which is checked against the file's size.

    Raises as `read_tensors`.
    """
    with _damage_named(path), safe_open(path, "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: is {path.parent} a complete model folder?")
    try:
        yield
    except (SafetensorError, TypeError, ValueError, AttributeError, RuntimeError, KeyError) as error:
        raise ValueError(f"{path} is damaged or truncated ({error}): copy or train it again") from error


def check_sizes(source: Path, sizes: Mapping[str, tuple[int, int]]) -> None:
    """Raise ValueError where sizes of a config, by key, are not those of the weights beside it: (said, stored)."""
    for key, (said, found) in sizes.items():
        if said != found:
            raise ValueError(
                f"{source}: {key}={said} in the config, {found} in these weights: take both from the same model"
            )


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to a device without waiting for it: to a GPU through pinned memory."""
    if device.type == "cuda":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def load_checked(module: nn.Module, state: dict[str, Tensor], source: Path, *, assign: bool = False) -> None:
    """Load a state dict strictly; missing, unknown or misshaped tensors are one ValueError that names them.

    `assign` takes the tensors themselves instead of copying them, which a module on the meta device needs.
    """
    expected = module.state_dict()
    problems = [f"missing {name}" for name in expected if name not in state]
    problems += [f"unknown {name}" for name in state if name not in expected]
    problems += [
        f"{name} has shape {tuple(state[name].shape)} instead of {tuple(t.shape)}"
        for name, t in expected.items()
        if name in state and state[name].shape != t.shape
    ]
    problems += [
        f"{name} holds {str(state[name].dtype).removeprefix('torch.')}, not numbers like {t.dtype}"
        for name, t in expected.items()
        if name in state and state[name].is_floating_point() != t.is_floating_point()
    ]
    if problems:
        raise ValueError(f"{source} does not fit its config: {'; '.join(problems[:5])}")
    module.load_state_dict(state, assign=assign)


def check_finite(state: Mapping[str, Tensor], source: Path) -> None:
    """Raise ValueError for weights that are not finite."""
    for name, t in state.items():
        if t.is_floating_point() and not bool(t.isfinite().all()):
            raise ValueError(f"{source}: {name} holds numbers that are not finite: copy the file again")


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Hex digest of named tensors, the same whether they are whole or stored as nonzeros."""
    sha = hashlib.sha256()
    for name, indices, values in sorted(_nonzeros(tensors), key=lambda entry: entry[0]):
        sha.update(name.encode())
        for t in (indices, values):
            sha.update(t.contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]


def _nonzeros(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, flat indices, values) of each tensor, whole or stored as `sparse_model.model.checkpoint` packs it."""
    for name, t in tensors.items():
        base = name.removesuffix(".values")
        if name.endswith(".indices") and f"{name.removesuffix('.indices')}.values" in tensors:
            continue
        flat = t.detach().cpu().reshape(-1)
        kept = flat.nonzero().squeeze(1)
        indices = tensors[f"{base}.indices"].long()[kept] if f"{base}.indices" in tensors else kept
        yield base, indices, flat[kept]

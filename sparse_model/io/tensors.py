"""Reading tensors from disk into modules, with errors that name the file and the tensor; digests of weights."""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file; FileNotFoundError or ValueError (damaged, truncated) name the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: is {path.parent} a complete model folder?")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or truncated ({error}): copy or train it again") from error


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
    if problems:
        raise ValueError(f"{source} does not fit its config: {'; '.join(problems[:5])}")
    module.load_state_dict(state, assign=assign)


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

"""Checkpoints of a training: weights, moments, step. The last two that were written are kept."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sparse_model.config import differing, from_json, to_json
from sparse_model.io.atomic import remove_folder, replace_folder
from sparse_model.io.reading import read_json
from sparse_model.io.tensors import load_checked, read_tensors
from sparse_model.training.identity import Identity, check_identity

logger = logging.getLogger(__name__)

CHECKPOINT = "checkpoint"
_KEPT = 2
_FREE = {"log_every", "checkpoint_every", "eval_tokens"}
"""Settings that shape no weight."""


class Checkpoints:
    """The checkpoints of one training, as FOLDER/step-N, each whole or not there."""

    def __init__(
        self, folder: Path, modules: Mapping[str, nn.Module], optimizers: Mapping[str, torch.optim.Optimizer]
    ) -> None:
        self.folder, self.modules, self.optimizers = folder, modules, optimizers

    def save(self, config: Any, state: dict[str, Any]) -> None:
        """Write a checkpoint; `state` holds at least its step, and its identity."""
        with replace_folder(self.folder / f"step-{state['step']}") as folder:
            for name, module in self.modules.items():
                save_file(_unshared(module.state_dict()), folder / f"{name}.safetensors")
            for name, optimizer in self.optimizers.items():
                torch.save(optimizer.state_dict(), folder / f"{name}_optimizer.pt")
            to_json(config, folder / "config.json")
            (folder / "step.json").write_text(json.dumps(state))
        before = [path for path in self._newest_first() if _step(path) < state["step"]]
        later = [path for path in self._newest_first() if _step(path) > state["step"]]  # damaged, or it were this one
        for path in later + before[_KEPT - 1 :]:
            remove_folder(path)

    def load(self, config: Any, steps: int, identity: Identity) -> dict[str, Any] | None:
        """Restore the newest checkpoint that is whole, with a word where that is not the newest; returns its state.

        None where there is none. Raises ValueError for one of other settings or made from something else, naming
        what differs, and where every one is damaged.
        """
        damages = []
        for path in self._newest_first():
            try:
                made, state = _facts(path, config, steps)
            except (ValueError, OSError) as error:
                damages.append(str(error))
                continue
            different = set(differing(made, config)) - _FREE
            if different:
                names = ", ".join(sorted(different))
                raise ValueError(f"{path} was made with other settings ({names}): resume with the same ones")
            check_identity(state["identity"], identity, path)
            try:
                self._restore(path)
            except (ValueError, OSError) as error:
                damages.append(str(error))
                continue
            if damages:
                logger.warning("%s; going on from %s", "; ".join(damages), path)
            return state
        if damages:
            raise ValueError(f"{'; '.join(damages)}: remove {self.folder} and --resume begins this training again")
        if (self.folder / "step.json").exists():
            raise ValueError(
                f"{self.folder} is of an earlier version, which did not keep what it was made from: finish with that "
                f"version, or remove the folder, and --resume begins this training again"
            )
        return None

    def remove(self) -> None:
        """Drop all, once the final weights are saved."""
        remove_folder(self.folder)

    def _newest_first(self) -> list[Path]:
        folders = [path for path in self.folder.glob("step-*") if path.name[len("step-") :].isdigit()]
        return sorted(folders, key=_step, reverse=True)

    def _restore(self, folder: Path) -> None:
        for name, module in self.modules.items():
            path = folder / f"{name}.safetensors"
            state = read_tensors(path)
            shared = {n: state[m] for n, m in _shared(module.state_dict()).items() if m in state}
            load_checked(module, state | shared, path)
        for name, optimizer in self.optimizers.items():
            path = folder / f"{name}_optimizer.pt"
            try:
                state = torch.load(path, weights_only=True, map_location="cpu")
                _check_moments(optimizer, state)
                optimizer.load_state_dict(state)
            except Exception as error:  # truncated zip, pickle and I/O errors are of many kinds
                raise ValueError(f"{path} is damaged: {error}") from error


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _facts(folder: Path, config: Any, steps: int) -> tuple[Any, dict[str, Any]]:
    """The configuration and the state of a checkpoint; ValueError and OSError for damaged ones name the file."""
    made, path = from_json(type(config), folder / "config.json"), folder / "step.json"
    state = read_json(path, "it is left out")
    whole = isinstance(state, dict) and isinstance(state.get("identity"), dict)
    if not whole or type(state.get("step")) is not int or state["step"] != _step(folder) or state["step"] > steps:
        raise ValueError(f"{path} is damaged: no step from 0 to {steps} with what it was made from")
    return made, state


def _check_moments(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Moments of another shape than their parameter's would end the process."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, values in state["state"].items():
        for key, value in values.items():
            if value.shape not in (parameters[index].shape, torch.Size([])):
                raise ValueError(f"{key} of parameter {index} has shape {tuple(value.shape)}")


def _shared(state: dict[str, Tensor]) -> dict[str, str]:
    """Names of tensors that are another name's tensor (tied embeddings), with that name."""
    first: dict[int, str] = {}
    return {n: first[t.data_ptr()] for n, t in state.items() if first.setdefault(t.data_ptr(), n) != n}


def _unshared(state: dict[str, Tensor]) -> dict[str, Tensor]:
    again = _shared(state)
    return {name: t for name, t in state.items() if name not in again}

"""Which number of a training is no longer finite, by name."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

Named = Iterable[tuple[str, Tensor]]


class TrainingDiverged(RuntimeError):
    """A number of the training became NaN or infinite; the message names it, with step and learning rate."""


def first_not_finite(named: Named) -> str | None:
    """The name of the first tensor that holds NaN or infinity; None where all are finite. Waits for the device once."""
    entries = list(named)
    if not entries:
        return None
    finite = torch.stack([t.isfinite().all() for _, t in entries]).tolist()
    return next((name for (name, _), ok in zip(entries, finite, strict=True) if not ok), None)


def parameters_of(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of named modules, as `sparse.blocks.0.mlp.fc.weight`."""
    for module, of in modules.items():
        for name, p in of.named_parameters():
            yield f"{module}.{name}", p


def gradients_of(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, Tensor]]:
    """The gradients that there are."""
    for name, p in parameters_of(modules):
        if p.grad is not None:
            yield f"the gradient of {name}", p.grad


def state_of(
    modules: Mapping[str, nn.Module], optimizers: Iterable[torch.optim.Optimizer]
) -> Iterator[tuple[str, Tensor]]:
    """Every number that a checkpoint holds: parameters, then the optimizers' own."""
    parameters = list(parameters_of(modules))
    yield from parameters
    for optimizer in optimizers:
        for name, p in parameters:
            for key, value in optimizer.state.get(p, {}).items():
                yield f"the optimizer's {key} of {name}", value

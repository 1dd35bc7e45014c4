"""Losses on logits, a chunk of tokens at a time: with GPT-2's vocabulary the logits are what fills the memory.

The backward pass through a chunk's logits runs at once, so that no more than one chunk is alive; what is left for the
rest of the backward pass is the gradient with respect to the residual stream. Nothing is approximated.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bridges.dense import Sublayered

Rows = Float[Tensor, "token d_model"]
LossOfChunk = Callable[[Float[Tensor, "part d_vocab"], slice], Float[Tensor, ""]]


class HeadLoss(NamedTuple):
    """A loss on logits, and its gradient."""

    loss: Float[Tensor, ""]
    """Mean over tokens, detached."""
    grad: Rows
    """Of `scale` times the loss, with respect to the residual stream."""


def head_backward(
    model: Sublayered,
    resid: Rows,
    tokens: Int[Tensor, " token"],
    loss_of: LossOfChunk,
    *,
    scale: float | Tensor = 1.0,
    rows: int,
) -> HeadLoss:
    """Unembed `rows` tokens at a time and run the backward pass of `scale` times the mean loss over all tokens.

    `loss_of(logits, part)` is the mean loss of the tokens `part`. Gradients gather in the model's parameters; nothing
    flows into whatever `resid` was made from.
    """
    n = len(resid)
    total, grads = torch.zeros((), device=resid.device), []
    for start in range(0, n, rows):
        part = slice(start, min(start + rows, n))
        leaf = resid[part].detach().requires_grad_()
        loss = loss_of(model.unembed(leaf[None], tokens[None, part])[0], part) * ((part.stop - start) / n)
        (scale * loss).backward()
        total = total + loss.detach()
        assert leaf.grad is not None
        grads.append(leaf.grad)
    return HeadLoss(total, torch.cat(grads))


def rows_at_once(d_vocab: int, logits: int) -> int:
    """Tokens whose logits may be in memory together."""
    return max(1, logits // d_vocab)


class Target:
    """A model's own logits, made where they are asked for; kept only where all fit into one chunk."""

    def __init__(self, model: Sublayered, resid: Rows, tokens: Int[Tensor, " token"], rows: int) -> None:
        self._model, self._resid, self._tokens = model, resid, tokens
        self._kept = self._logits(slice(None)) if len(resid) <= rows else None

    def _logits(self, part: slice) -> Float[Tensor, "part d_vocab"]:
        with torch.no_grad():
            return self._model.unembed(self._resid[None, part], self._tokens[None, part])[0]

    def __call__(self, part: slice) -> Float[Tensor, "part d_vocab"]:
        """The logits of some of the tokens."""
        return self._logits(part) if self._kept is None else self._kept[part]

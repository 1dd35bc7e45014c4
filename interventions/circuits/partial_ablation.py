"""A model while only some of the nodes outside a circuit are ablated: at random rates, or those an adversary picks.

A circuit that explains what the model does holds for every such subset, not only when all others are gone (the paper's
score): where it does not, nodes outside it cancel each other or write against the answer. The adversary maximises the
task loss, uncalibrated, over which outside nodes are ablated, one subset for all prompts:

1. From several starts (all of them, random halves) the subset is relaxed to shares in [0, 1] and moved by the sign of
   the loss's gradient, with falling steps; after each step the shares are rounded and the subset is scored.
2. From the best subset, the nodes whose flip promises most by the gradient are flipped together as long as the loss
   rises, and fewer of them where it does not.

It finds a lower bound of the worst case, and is never below the random draws that it starts from.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from interventions.circuits.ablation import Ablation
from interventions.circuits.gates import GateLayout, answer_logits, at_answer, open_gates
from interventions.circuits.node_model import Kept, NodeModel, device_of
from interventions.tasks.base import TaskBatch, task_loss

ASCENT_STEPS = 8
"""Sign-gradient steps from each start."""
FLIP_ROUNDS = 8
"""Rounds of flipping nodes from the best subset."""


class Attack(NamedTuple):
    """The worst subset of outside nodes that was found."""

    ablated: Bool[Tensor, " gate"]
    """Which gates are shut; those of the circuit's own nodes count for nothing."""
    loss: float
    """Task loss so, uncalibrated, nats."""
    passes: int
    """Forward and backward passes that it took, a backward one counted as two."""


class Adversary:
    """Looks for the subset of nodes outside a circuit whose ablation hurts a batch most."""

    def __init__(self, model: NodeModel, layout: GateLayout, ablation: Ablation, batch: TaskBatch, seed: int) -> None:
        self.model, self.layout, self.ablation, self.batch, self.seed = model, layout, ablation, batch, seed
        self.passes = 0

    def attack(self, kept: Kept, *, starts: int = 2) -> Attack:
        """The worst subset found outside `kept`; `starts` random halves are begun from besides all outside nodes."""
        self.passes, device = 0, device_of(self.model)
        inside = self.layout.join(kept).to(device)
        generator = torch.Generator().manual_seed(self.seed)
        begins = [torch.ones(len(inside)), *(torch.rand(len(inside), generator=generator) for _ in range(starts))]
        best, highest = begins[0].bool().to(device), -1.0
        for begin in begins:
            found, loss = self._ascend(inside, begin.to(device))
            if loss > highest:
                best, highest = found, loss
        best, highest = self._flip(inside, best, highest)
        return Attack(best, highest, self.passes)

    def loss(self, inside: Tensor, ablated: Tensor) -> float:
        """Task loss with a subset ablated, uncalibrated."""
        with torch.no_grad():
            return float(self._loss(inside, ablated))

    def _loss(self, inside: Tensor, ablated: Tensor) -> Tensor:
        self.passes += 1
        gates = self.layout.split(open_gates(inside, ablated))
        generator = torch.Generator().manual_seed(self.seed)
        logits = answer_logits(self.model, gates, self.ablation, self.batch, generator)
        return task_loss(logits, at_answer(self.batch.to(logits.device)))

    def _gradient(self, inside: Tensor, ablated: Tensor) -> Tensor:
        shares = ablated.float().clone().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(self._loss(inside, shares), shares)
        self.passes += 2
        return gradient

    def _ascend(self, inside: Tensor, begin: Tensor) -> tuple[Tensor, float]:
        shares, best = begin, begin > 0.5
        highest = self.loss(inside, best)
        for step in range(ASCENT_STEPS):
            size = 0.5 * (1 - step / ASCENT_STEPS)
            shares = (shares + size * self._gradient(inside, shares).sign()).clamp(0, 1)
            loss = self.loss(inside, shares > 0.5)
            if loss > highest:
                best, highest = shares > 0.5, loss
        return best, highest

    def _flip(self, inside: Tensor, ablated: Tensor, highest: float) -> tuple[Tensor, float]:
        count = max(1, int((~inside).sum()) // 16)
        gradient = self._gradient(inside, ablated)
        for _ in range(FLIP_ROUNDS):
            # Shutting an open gate adds the gradient, opening a shut one takes it away.
            promise = torch.where(ablated, -gradient, gradient).masked_fill(inside, float("-inf"))
            chosen = promise.topk(count).indices
            flipped = ablated.clone()
            flipped[chosen] ^= promise[chosen] > 0
            loss = self.loss(inside, flipped)
            if loss > highest:
                ablated, highest, gradient = flipped, loss, self._gradient(inside, flipped)
            else:
                count = max(1, count // 4)
        return ablated, highest

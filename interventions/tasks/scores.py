"""How a model does on pairs, by how far the deciding token stands from the answer."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from interventions.tasks.base import TaskBatch, answer_probabilities, log_odds

DISTANCES = (1, 2, 4, 8, 16, 32)
"""Upper ends of the ranges of `by_distance`; a last one has no end."""

Logits = Callable[[Int[Tensor, "row pos"]], Float[Tensor, "row pos vocab"]]


class Scores(NamedTuple):
    """How a model, or a count table, does on some pairs."""

    pairs: int
    accuracy: float
    """Share of pairs both of whose members prefer their right answer."""
    p_right: float | None = None
    """Mean probability of the right answer under the whole vocabulary; None for a count table."""


def distances(batch: TaskBatch) -> Int[Tensor, " pair"]:
    """Tokens from the last one in which a pair's members differ to the answer."""
    differ = batch.tokens[:, 0] != batch.tokens[:, 1]
    places = torch.arange(differ.shape[1], device=differ.device)
    last = torch.where(differ, places, -1).amax(dim=1)
    return (batch.last + 1 - last).cpu()


def by_distance(
    batch: TaskBatch, right: Bool[Tensor, " pair"], probability: Float[Tensor, " pair"] | None = None
) -> dict[str, Scores]:
    """Scores of "all" pairs, then of those in each range of distances that has some."""
    far = distances(batch)
    ranges = {"all": torch.ones(len(far), dtype=torch.bool)}
    for low, high in zip((0, *DISTANCES), (*DISTANCES, None), strict=True):
        name = f"over {low}" if high is None else str(high) if high == low + 1 else f"{low + 1} to {high}"
        ranges[name] = (far > low) if high is None else (far > low) & (far <= high)
    return {
        name: Scores(
            int(chosen.sum()),
            float(right[chosen].float().mean()),
            None if probability is None else float(probability[chosen].mean()),
        )
        for name, chosen in ranges.items()
        if chosen.any()
    }


@torch.no_grad()
def score(logits: Logits, batch: TaskBatch, pairs_at_once: int = 16) -> dict[str, Scores]:
    """A model's scores on a batch: on all pairs, and by the distance from the deciding token to the answer."""
    right, probability = [], []
    if isinstance(logits, nn.Module):
        batch = batch.to(next(logits.parameters()).device)
    for start in range(0, len(batch.last), pairs_at_once):
        rows = slice(start, start + pairs_at_once)
        part = TaskBatch(batch.tokens[rows], batch.answers[rows], batch.last[rows], batch.prompts[rows])
        flat = logits(part.tokens.flatten(0, 1))
        scores = flat.unflatten(0, part.tokens.shape[:2])
        right.append((log_odds(scores, part) > 0).all(dim=1).cpu())
        probability.append(answer_probabilities(scores, part)[0].mean(dim=1).cpu())
    return by_distance(batch, torch.cat(right), torch.cat(probability))

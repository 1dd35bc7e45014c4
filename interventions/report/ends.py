"""The two ends of a circuit in its picture: the input tokens that tell a pair's prompts apart, and the answers' logits.

The sparse model's only: its embeddings have few weights, so that a token is tied to a few residual channels. A token
is joined to every read of a channel that its embedding writes, every write of a channel to the logits that read it.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interventions.charts import finite
from interventions.circuits.circuit import Circuit
from interventions.circuits.node_model import find_node
from interventions.circuits.picture_layout import Layout, isotonic
from interventions.tasks.base import TaskBatch
from sparse_model.model.transformer import SparseTransformer

MOST_TOKENS = 8
"""Tokens at either end, the most frequent in the task's prompts."""

Tie = tuple[int, str, float]
"""A token, a node, and the weight between them."""


def picture_ends(sparse: SparseTransformer, circuit: Circuit, layout: Layout, batch: TaskBatch | None) -> list[Any]:
    """The ends as plain data: side, token, row and ties, each an index among the circuit's nodes with a weight."""
    if circuit.model != "sparse" or batch is None:
        return []
    index = {name: place for place, name in enumerate(circuit.names)}
    gain = sparse.ln_final.weight.detach()
    sides: tuple[tuple[str, str, list[int], Float[Tensor, "vocab channel"]], ...] = (
        ("input", "act_in", input_tokens(batch), sparse.token_embed.weight.detach()),
        ("answer", "resid_delta", answer_tokens(batch), sparse.unembedding.weight.detach() * gain),
    )
    ends = []
    for side, place, tokens, weights in sides:
        ties = _ties(circuit, place, tokens, weights)
        rows = _rows(tokens, ties, layout)
        for token in tokens:
            own = [[index[name], finite(weight, 3)] for tied, name, weight in ties if tied == token]
            ends.append({"side": side, "token": token, "row": finite(rows[token]), "ties": own})
    return ends


def input_tokens(batch: TaskBatch) -> list[int]:
    """The tokens at which the two prompts of a pair differ, the most frequent first."""
    before_answer = torch.arange(batch.tokens.shape[-1]) <= batch.last[:, None]
    differ = (batch.tokens[:, 0] != batch.tokens[:, 1]) & before_answer
    return _commonest(batch.tokens.transpose(1, 2)[differ].flatten().tolist())


def answer_tokens(batch: TaskBatch) -> list[int]:
    """The right answers, the most frequent first."""
    return _commonest(batch.answers.flatten().tolist())


def _commonest(tokens: Iterable[int]) -> list[int]:
    return [token for token, _ in Counter(tokens).most_common(MOST_TOKENS)]


def _ties(circuit: Circuit, place: str, tokens: Sequence[int], weights: Float[Tensor, "vocab channel"]) -> list[Tie]:
    """Weights that are not zero between tokens and the circuit's reads, or writes, of residual channels."""
    ties = []
    for name in circuit.names:
        channel = find_node(circuit.shape, name)[0][1]
        if place in name and channel < weights.shape[1]:  # beyond are positions that some models' reads have
            ties += [(token, name, w) for token in tokens if (w := float(weights[token, channel]))]
    return ties


def _rows(tokens: Sequence[int], ties: Sequence[Tie], layout: Layout) -> Mapping[int, float]:
    """A row for each token near what it is tied to, at least one apart; they may reach beyond the picture's rows."""
    wanted = {}
    for token in tokens:
        near = [(abs(weight), layout.spots[name].row) for tied, name, weight in ties if tied == token]
        total = sum(weight for weight, _ in near)
        wanted[token] = sum(w * row for w, row in near) / total if total else (layout.rows - 1) / 2
    ordered = sorted(tokens, key=lambda token: wanted[token])
    apart = isotonic([wanted[token] - place for place, token in enumerate(ordered)])
    lowest = max(0.0, layout.rows - len(ordered))
    return {
        token: min(max(row, 0.0), lowest) + place for place, (token, row) in enumerate(zip(ordered, apart, strict=True))
    }

"""Interchange: nodes of the whole model take the values that they have in the other member of the pair.

Nothing is ablated and nothing is calibrated. With all of a prompt exchanged, a member's log-odds of its right answer
would become those of the other member with the sign reversed; the share is how much of that way they go when only some
nodes are exchanged, at all tokens: 0 nothing moves, 1 as if the prompts had been. What is computed from those nodes
follows them; all else, the embedding included, stays the member's own.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from bridges.sites import Site
from interventions.bundle.channels import Channel
from interventions.circuits.gates import at_answer
from interventions.circuits.node_model import Kept, NodeEdit, NodeModel, Values, device_of, locations
from interventions.circuits.rivals import random_nodes
from interventions.tasks.base import TaskBatch, log_odds
from sparse_model.config import SparseConfig


class Interchange(NamedTuple):
    """Nodes exchanged between the members of each pair."""

    nodes: int
    """How many."""
    share: float
    """Share of the log-odds that moves with them."""
    random: list[float]
    """The same of as many other nodes at the same locations, draw by draw."""


@torch.no_grad()
def interchange(model: NodeModel, nodes: Kept, batch: TaskBatch, draws: int, *, seed: int) -> Interchange:
    """Exchange some nodes of a model, and `draws` random sets of others in their place."""
    values: dict[str, Values] = {}
    used = {name for name, mask in nodes.items() if mask.any()}

    def note(name: str, value: Values) -> Values:
        if name in used:
            values[name] = value.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
        return value

    whole = _log_odds(model, batch, note)

    def share(chosen: Kept) -> float:
        def exchange(name: str, value: Values) -> Values:
            return torch.where(chosen[name].to(value.device), values[name], value) if name in used else value

        return float((whole - _log_odds(model, batch, exchange)).mean() / (2 * whole.mean()))

    drawn = [share(others) for others in random_nodes(model, nodes, batch, draws, seed=seed)]
    return Interchange(sum(int(mask.sum()) for mask in nodes.values()), share(nodes), drawn)


def _log_odds(model: NodeModel, batch: TaskBatch, edit: NodeEdit) -> Float[Tensor, "pair 2"]:
    device = device_of(model)
    tokens = batch.tokens[..., : int(batch.last.max()) + 1].flatten(0, 1).to(device)
    logits = model.logits(tokens, edit, batch.last.repeat_interleave(2).to(device)).unflatten(0, (-1, 2))
    return log_odds(logits, at_answer(batch.to(device)))


def channel_nodes(channel: Channel, shape: SparseConfig) -> Kept:
    """The nodes of a named channel in the sparse model.

    Raises ValueError for a channel of the last site: what the unembedding reads is no node location.
    """
    site = Site(channel.site, shape.n_layers)
    if site.is_final:
        raise ValueError(f"channel {channel.name!r} is read by the unembedding, which is no node of a circuit")
    nodes = {location.name: torch.zeros(location.width, dtype=torch.bool) for location in locations(shape)}
    nodes[site.read_hook][list(channel.indices)] = True
    return nodes

"""Which head, which of its channels and which channels before and behind it carry what tells a pair's prompts apart.

All by interchange (`interventions.circuits.interchange`): the share of the log-odds that moves when a node takes the
value that it has in the other prompt. From the head on, only channels joined to a chosen one by a weight are tried.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from interventions.circuits.attention import Head, looks
from interventions.circuits.interchange import interchange
from interventions.circuits.node_model import Kept, NodeModel, Values, device_of, locations
from interventions.tasks.base import TaskBatch

LEAST = 0.1
"""Share of the log-odds from which a node counts as a carrier."""


class Carrier(NamedTuple):
    """A channel and the share of the log-odds that moves with it alone."""

    place: str
    channel: int
    share: float


def no_nodes(model: NodeModel) -> Kept:
    return {location.name: torch.zeros(location.width, dtype=torch.bool) for location in locations(model.shape)}


def head_nodes(model: NodeModel, head: Head, parts: str = "qkv") -> Kept:
    """The query, key and value channels of a head, or some of the three."""
    nodes, (layer, number), width = no_nodes(model), head, model.shape.d_head
    for part in parts:
        nodes[f"blocks.{layer}.attn.hook_{part}"][number * width : (number + 1) * width] = True
    return nodes


def one_node(model: NodeModel, place: str, channel: int) -> Kept:
    nodes = no_nodes(model)
    nodes[place][channel] = True
    return nodes


def share_of(model: NodeModel, nodes: Kept, batch: TaskBatch) -> float:
    """Share of the log-odds that moves with some nodes."""
    return interchange(model, nodes, batch, 0, seed=0).share


def all_heads(model: NodeModel) -> list[Head]:
    return [(layer, head) for layer in range(model.shape.n_layers) for head in range(model.shape.n_heads)]


def head_table(model: NodeModel, batch: TaskBatch) -> dict[str, dict[str, float]]:
    """Of each head what moves with it (q, k and v together), and where it looks; the largest share first.

    `even` is the mean of 1/n, n being the number of tokens of a prompt.
    """
    seen = looks(model, all_heads(model), batch)
    even = float((1 / (batch.last + 1.0)).mean())
    table = {
        f"{head[0]}.{head[1]}": {
            "share": share_of(model, head_nodes(model, head), batch),
            **look._asdict(),
            "even": even,
        }
        for head, look in seen.items()
    }
    return dict(sorted(table.items(), key=lambda entry: -entry[1]["share"]))


def carriers(model: NodeModel, place: str, channels: Iterable[int], batch: TaskBatch) -> list[Carrier]:
    """Channels of a location, the largest share first."""
    found = [Carrier(place, channel, share_of(model, one_node(model, place, channel), batch)) for channel in channels]
    return sorted(found, key=lambda carrier: -abs(carrier.share))


def strong(found: Iterable[Carrier]) -> list[Carrier]:
    """Those that carry."""
    return [carrier for carrier in found if carrier.share >= LEAST]


def joined(
    model: NodeModel, source: str, target: str, *, into: Iterable[int] = (), out_of: Iterable[int] = ()
) -> list[int]:
    """Channels of the source with a weight into some of the target, or of the target with one out of the source."""
    weight = weight_between(model, source, target)
    used = weight[list(into)].any(0) if into else weight[:, list(out_of)].any(1)
    return used.nonzero().flatten().tolist()


def weight_between(model: NodeModel, source: str, target: str) -> Float[Tensor, "target source"]:
    return next(m.weight for m in model.matrices() if (m.source, m.target) == (source, target))


@torch.no_grad()
def values_at(model: NodeModel, place: str, batch: TaskBatch) -> Float[Tensor, "pair 2 pos width"]:
    """A location's values on both prompts of each pair."""
    found: dict[str, Values] = {}

    def note(name: str, values: Values) -> Values:
        if name == place:
            found[name] = values
        return values

    model.visit(batch.tokens.flatten(0, 1).to(device_of(model)), note)
    return found[place].unflatten(0, (-1, 2))


def find_carriers(model: NodeModel, batch: TaskBatch, draws: int = 20) -> dict[str, Any]:
    """The head with the largest share, its carriers, their detectors, and what it writes; chosen by shares alone."""
    heads = head_table(model, batch)
    layer, number = map(int, next(iter(heads)).split("."))
    block, width = f"blocks.{layer}.", model.shape.d_head
    span = range(number * width, (number + 1) * width)
    whole = interchange(model, head_nodes(model, (layer, number)), batch, draws, seed=0)
    found: dict[str, Any] = {"head": [layer, number], "share": whole.share, "random": max(whole.random), "heads": heads}
    found["parts"] = {part: share_of(model, head_nodes(model, (layer, number), part), batch) for part in "qkv"}
    inner, detectors = [], set()
    for part in "qkv":
        place = f"{block}attn.hook_{part}"
        of_part = strong(carriers(model, place, span, batch))
        inner += of_part
        if of_part:
            detectors |= set(joined(model, f"{block}attn.hook_in", place, into=[c.channel for c in of_part]))
    values = [c.channel for c in inner if c.place.endswith("_v")]
    found["inner"] = [c._asdict() for c in inner]
    found["detectors"] = [c._asdict() for c in strong(carriers(model, f"{block}attn.hook_in", detectors, batch))]
    written = joined(model, f"{block}attn.hook_v", f"{block}hook_attn_out", out_of=values) if values else []
    found["written"] = [c._asdict() for c in carriers(model, f"{block}hook_attn_out", written, batch)]
    return found

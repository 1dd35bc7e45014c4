"""What the report says of single nodes: their activation on prompts and on held-out text, and what touches them."""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interventions.charts import finite, numbers
from interventions.circuits.circuit import Circuit
from interventions.circuits.node_model import NodeModel, Values, device_of, find_node
from interventions.tasks.base import TaskBatch, since_difference
from sparse_model.model.node_names import parse_node
from sparse_model.model.transformer import SparseTransformer

EXAMPLES = 4
"""Top examples of a node, and bottom examples."""
_BEFORE, _AFTER = 18, 5  # tokens around an example's peak; what comes later cannot have mattered
_PLACES = {
    "attn.act_in": "residual read of attention",
    "attn.q": "query",
    "attn.k": "key",
    "attn.qk": "query and key",
    "attn.v": "value",
    "attn.resid_delta": "residual write of attention",
    "mlp.act_in": "residual read of MLP",
    "mlp.post_act": "neuron",
    "mlp.resid_delta": "residual write of MLP",
}


Weighted = list[tuple[int, float | None]]
"""Token ids with weights."""


class Window(NamedTuple):
    """A piece of held-out text around a node's extreme value."""

    tokens: list[int]
    values: list[float | None]
    at: int
    """Where the extreme is."""


class NodeWords(NamedTuple):
    """A node's names."""

    name: str
    """OpenAI's, the one that the circuit's file has."""
    ours: str
    """Hook and index of the model that has it; two hooks where q and k are one node."""
    short: str
    """As in "107", or "q4.14": head 4, channel 14."""
    place: str
    """In words."""
    layer: int
    head: int | None


def words(circuit: Circuit, name: str) -> NodeWords:
    """A node's names."""
    node = parse_node(name, circuit.shape)
    index = ", ".join(str(i) for i in node.channel_index)
    letters = node.place.removeprefix("attn.") if node.head is not None else ""
    short = str(node.channel) if node.head is None else f"{letters}{node.head}.{node.channel}"
    hooks = " and ".join(f"{hook}[{index}]" for hook in node.hooks)
    place = f"{_PLACES[node.place]}, layer {node.layer}"
    return NodeWords(name, hooks, short, place, node.layer, node.head)


@torch.no_grad()
def node_values(
    model: NodeModel, circuit: Circuit, names: Sequence[str], tokens: Int[Tensor, "row pos"], batch_size: int = 32
) -> dict[str, Float[Tensor, "row pos"]]:
    """Each node's value in the whole, unedited model; of the query where query and key are one node."""
    wanted: dict[str, list[int]] = defaultdict(list)
    at = {name: find_node(circuit.shape, name)[0] for name in names}
    for location, channel in at.values():
        wanted[location].append(channel)
    parts_of: dict[str, list[Tensor]] = defaultdict(list)

    def note(location: str, values: Values) -> Values:
        if location in wanted:
            parts_of[location].append(values[..., wanted[location]].float().cpu())
        return values

    for batch in tokens.split(batch_size):
        batch = batch.to(device_of(model))
        model.visit(batch, note)
    whole = {location: torch.cat(parts) for location, parts in parts_of.items()}
    return {name: whole[location][..., wanted[location].index(channel)] for name, (location, channel) in at.items()}


def windows(values: Float[Tensor, "row pos"], tokens: Int[Tensor, "row pos"], *, lowest: bool = False) -> list[Window]:
    """Where the values are highest above zero (or lowest below it), at most once per row, strongest first."""
    signed = -values if lowest else values
    peak, where = signed.max(1)
    examples = []
    for row in peak.argsort(descending=True, stable=True)[:EXAMPLES].tolist():
        if peak[row] <= 0:
            break
        at = int(where[row])
        span = slice(max(0, at - _BEFORE), at + 1 + _AFTER)
        shown = numbers(values[row, span].tolist(), 3)
        examples.append(Window(tokens[row, span].tolist(), shown, at - span.start))
    return examples


def value_statistics(values: Float[Tensor, "row pos"]) -> dict[str, float | None]:
    """How a node is distributed over held-out text."""
    active = float((values != 0).float().mean())
    stats = [active, float(values.min()), float(values.mean()), float(values.max())]
    return dict(zip(("active", "min", "mean", "max"), numbers(stats, 3), strict=True))


def member_means(values: Float[Tensor, "pair 2 pos"], batch: TaskBatch) -> dict[str, list[float | None]]:
    """Means per member of a task's pairs: at the last prompt token, and from the first differing token up to it."""
    since = since_difference(batch.tokens[:, 0], batch.tokens[:, 1], batch.last)
    last = torch.arange(batch.tokens.shape[-1]) == batch.last[:, None]
    return {
        name: numbers([float(values[:, member][mask].mean()) for member in (0, 1)], 3)
        for name, mask in (("last", last), ("since", since))
    }


def members_apart(values: Float[Tensor, "pair 2 pos"], batch: TaskBatch) -> dict[str, list[float | None]]:
    """Shares of pairs in which a node's value is higher in the first member, and in the second.

    At the last prompt token, and its mean from the first differing token up to it. Values are equal where they differ
    by less than a ten-thousandth of the largest.
    """
    since = since_difference(batch.tokens[:, 0], batch.tokens[:, 1], batch.last)[:, None].float()
    last = batch.last[:, None, None].expand(-1, 2, 1)
    places = {"last": values.gather(2, last)[..., 0], "since": (values * since).sum(2) / since.sum(2)}
    limit = float(values.abs().max()) * 1e-4
    shares = {}
    for name, of_member in places.items():
        difference = of_member[:, 0] - of_member[:, 1]
        shares[name] = numbers([float((sign * difference > limit).float().mean()) for sign in (1, -1)], 3)
    return shares


@torch.no_grad()
def stream_tokens(sparse: SparseTransformer, channel: int, count: int = 6) -> dict[str, Weighted]:
    """The tokens whose embedding writes a residual channel, and those whose logit reads it, with their weights.

    Largest magnitudes first, zeros left out; the unembedding's weights include the final norm's gain.
    """
    ways = {
        "embed": sparse.token_embed.weight[:, channel],
        "unembed": sparse.unembedding.weight[:, channel] * sparse.ln_final.weight[channel],
    }
    effects = {}
    for way, weights in ways.items():
        best = weights.abs().topk(min(count, len(weights))).indices.tolist()
        effects[way] = [(token, finite(float(weights[token]), 3)) for token in best if weights[token] != 0]
    return effects


def used_tokens(*lists: Weighted) -> set[int]:
    """Every token id in lists of weighted tokens."""
    return {token for found in lists for token, _ in found}

"""How a circuit computes: its nodes in the order of computation, what each detects, and what every edge does.

Of a node, everything but its head's attention has been measured for the explorer, and is taken from its data.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import torch
from markupsafe import Markup
from transformers import PreTrainedTokenizerFast

from interventions.circuits.attention import Look, first_differences, looks
from interventions.circuits.circuit import Circuit
from interventions.circuits.controls import ControlResult
from interventions.circuits.node_model import Edge, NodeModel, find_node
from interventions.report.channels import Example, TokenSpan, shade
from interventions.report.importance import effects_of_edges
from interventions.report.mechanism_words import NodeFacts, Teller, detects
from interventions.report.nodes import Window
from interventions.report.texts import MEMBERS, inline, visible
from interventions.tasks.base import TaskBatch
from sparse_model.model.node_names import parse_node

MOST_TOLD = 30
"""Nodes that are told, those with the largest effect."""
MOST_EDGES_TOLD = 60
"""Edges between them that are listed, the strongest."""
_MOST_NAMES = 3
"""First differing tokens by which a member is called; where there are more, it is the first or second prompt."""
_EXAMPLES = 2
_HEAD_PLACES = ("attn.q", "attn.k", "attn.qk", "attn.v")


class ToldNode(NamedTuple):
    """A node as the page tells it."""

    anchor: str
    name: str
    effect: float | None
    story: Markup
    means: list[tuple[str, list[float | None], list[float | None]]]
    """Place, means by member, shares of pairs in which it is higher in the first and in the second member."""
    top: list[Example]
    bottom: list[Example]


class ToldEdge(NamedTuple):
    """An edge between two nodes that are told."""

    edge: Edge
    source: str
    """Anchor of its source."""
    target: str
    effect: float | None


class Mechanism(NamedTuple):
    """A circuit's nodes and edges in words and numbers."""

    members: tuple[Markup, Markup]
    """What the page calls the prompts of a pair."""
    opening: Markup
    """How the prompts differ; empty without prompts."""
    loss: float | None
    """Of the circuit, calibrated anew."""
    groups: list[tuple[str, list[ToldNode]]]
    """By attention or MLP of a layer."""
    edges: list[ToldEdge]
    """Largest effect first."""
    left_out: tuple[int, int]
    """Nodes, and edges between told nodes."""
    detecting: int
    """Told nodes that detect the difference."""
    strongest: Markup
    """The nodes with the largest effects; empty where none is known."""
    failed: list[str]
    """Controls that it fails."""

    @property
    def told(self) -> list[ToldNode]:
        """All told nodes, in the order of computation."""
        return [node for _, nodes in self.groups for node in nodes]


def mechanism(
    model: NodeModel,
    circuit: Circuit,
    data: Mapping[str, Any],
    ranked: Sequence[str],
    effects: dict[str, float],
    batch: TaskBatch | None,
    tokenizer: PreTrainedTokenizerFast,
    controls: Sequence[ControlResult],
    number: int,
) -> Mechanism:
    """Tell a circuit; `data` is the explorer's, sizes included, `number` the circuit's in the page."""
    shown = set(ranked[:MOST_TOLD])
    names = [name for name in circuit.names if name in shown]
    between = sorted((e for e in circuit.edges if {e.source, e.target} <= shown), key=lambda e: -abs(e.weight))
    edges = between[:MOST_EDGES_TOLD]
    cut = effects_of_edges(model, circuit, edges, effects, batch)
    index = {name: place for place, name in enumerate(circuit.names)}
    anchors = {name: f"circuit-{number}-node-{index[name]}" for name in names}
    facts = list(_facts(model, circuit, data, names, effects, cut, batch))
    members = member_names(batch, tokenizer)
    roles = {name: parse_node(name, circuit.shape).place for name in _mentioned(circuit)}
    teller = Teller(members, partial(inline, tokenizer), anchors, roles)
    told = [_told(of, data["nodes"][index[of.name]], anchors[of.name], teller.story(of), tokenizer) for of in facts]
    groups = [
        (title, [node for node, _ in nodes])
        for title, nodes in groupby(zip(told, facts, strict=True), key=lambda pair: _sublayer(pair[1]))
    ]
    listed = [ToldEdge(edge, anchors[edge.source], anchors[edge.target], cut.get(edge)) for edge in edges]
    return Mechanism(
        members=members,
        opening=_opening(batch, members),
        loss=data["sizes"][-1][1] if data["sizes"] else None,
        groups=groups,
        edges=sorted(listed, key=lambda found: -(found.effect or 0.0)),
        left_out=(circuit.n_nodes - len(names), len(between) - len(edges)),
        detecting=sum(detects(of) for of in facts),
        strongest=teller.strongest([(name, effects[name]) for name in ranked[:3] if name in effects]),
        failed=[control.control for control in controls if not control.survived],
    )


def member_names(batch: TaskBatch | None, tokenizer: PreTrainedTokenizerFast) -> tuple[Markup, Markup]:
    """What a pair's prompts are called: by their first differing tokens where those are few and tell them apart."""
    plain = Markup("in the {}").format(MEMBERS[0]), Markup("in the {}").format(MEMBERS[1])
    if batch is None:
        return plain
    first = batch.tokens.gather(2, first_differences(batch)[:, None, None].expand(-1, 2, 1))[..., 0]
    kinds = [[token for token, _ in Counter(of.tolist()).most_common()] for of in first.T]
    if max(map(len, kinds)) > _MOST_NAMES or set(kinds[0]) & set(kinds[1]):
        return plain
    first_name, second_name = (
        Markup("with {}").format(
            Markup(" or ").join(Markup("<code>{}</code>").format(inline(tokenizer, token)) for token in of)
        )
        for of in kinds
    )
    return first_name, second_name


def _opening(batch: TaskBatch | None, members: tuple[Markup, Markup]) -> Markup:
    if batch is None:
        return Markup("")
    back = float((batch.last - first_differences(batch)).float().mean())
    where = Markup("{:.1f} tokens before the last on average").format(back) if back else Markup("in the last token")
    return Markup("{} pairs of prompts, one {}, the other {}; they begin to differ {}.").format(
        len(batch.last), *members, where
    )


def _facts(
    model: NodeModel,
    circuit: Circuit,
    data: Mapping[str, Any],
    names: Sequence[str],
    effects: Mapping[str, float],
    cut: Mapping[Edge, float],
    batch: TaskBatch | None,
) -> Iterator[NodeFacts]:
    """What is known of some nodes, in their order."""
    by_name = {node["name"]: node for node in data["nodes"]}
    all_names = [node["name"] for node in data["nodes"]]
    links = [(all_names[a], all_names[b]) for a, b, kind in data["links"] if kind == "residual"]
    heads = _looks(model, circuit, names, batch)
    for name in names:
        node = parse_node(name, circuit.shape)
        stream = data["stream"].get(by_name[name]["stream"])
        sparse = bool(data["ends"]) and stream is not None
        partner = _partner(circuit, name)
        yield NodeFacts(
            name=name,
            node=node,
            effect=effects.get(name),
            means=by_name[name].get("means", {}),
            apart=by_name[name].get("apart", {}),
            incoming=[edge for edge in circuit.edges if edge.target == name],
            outgoing=[(edge, cut.get(edge)) for edge in circuit.edges if edge.source == name],
            writers=[source for source, target in links if target == name],
            readers=[target for source, target in links if source == name],
            embedded=_ties(data, "input", all_names.index(name)) if sparse else None,
            mostly_embedded=stream["embed"] if stream else [],
            logits=_ties(data, "answer", all_names.index(name)) if sparse else None,
            partner=partner,
            partner_value=_ablated(circuit, partner) if partner else None,
            partner_kept=partner in circuit.names,
            looks=heads.get((node.layer, node.head)) if node.head is not None else None,
        )


def _looks(
    model: NodeModel, circuit: Circuit, names: Sequence[str], batch: TaskBatch | None
) -> dict[tuple[int, int], tuple[Look, Look]]:
    """Where the heads of some nodes look, in the whole model and in the circuit."""
    nodes = [parse_node(name, circuit.shape) for name in names]
    heads = {(node.layer, node.head) for node in nodes if node.head is not None}
    if batch is None or not heads:
        return {}
    generator = torch.Generator().manual_seed(circuit.config.get("seed", 0))
    rows = circuit.ablation.draw(batch.tokens[:, :, 0].numel(), batch.tokens.shape[-1], generator)
    whole, alone = (
        looks(model, heads, batch),
        looks(model, heads, batch, circuit.ablation.edit(dict(circuit.kept), rows)),
    )
    return {head: (whole[head], alone[head]) for head in heads}


def _ties(data: Mapping[str, Any], side: str, index: int) -> list[tuple[int, float | None]]:
    """Tokens at an end of the circuit that are tied to a node, largest weight first."""
    ends = [end for end in data["ends"] if end["side"] == side]
    found = [(end["token"], weight) for end in ends for tied, weight in end["ties"] if tied == index]
    return sorted(found, key=lambda tie: -abs(tie[1]))


def _partner(circuit: Circuit, name: str) -> str:
    """The key that a query meets, or the query that a key meets."""
    for one, other in (("attn.q", "attn.k"), ("attn.k", "attn.q")):
        node = parse_node(name, circuit.shape)
        if node.place == one:
            return str(node._replace(place=other))
    return ""


def _ablated(circuit: Circuit, name: str) -> float | None:
    location, channel = find_node(circuit.shape, name)[0]
    values = circuit.ablation.values[location][:, channel]
    return float(values[0]) if len(values) == 1 else None


def _mentioned(circuit: Circuit) -> set[str]:
    """Nodes that a story may name."""
    return {*circuit.names, *(partner for name in circuit.names if (partner := _partner(circuit, name)))}


def _sublayer(facts: NodeFacts) -> str:
    return f"{'Attention' if facts.node.place.startswith('attn') else 'MLP'} of layer {facts.node.layer}"


def _told(
    facts: NodeFacts, shown: Mapping[str, Any], anchor: str, story: Markup, tokenizer: PreTrainedTokenizerFast
) -> ToldNode:
    places = {"last": "at the last token", "since": "from the first differing token on"}
    largest = max(abs(value or 0.0) for value in shown["stats"].values()) if "stats" in shown else 0.0
    return ToldNode(
        anchor=anchor,
        name=facts.name,
        effect=facts.effect,
        story=story,
        means=[(words, facts.means[place], facts.apart[place]) for place, words in places.items() if facts.means],
        top=[_example(window, largest, tokenizer) for window in shown.get("top", [])[:_EXAMPLES]],
        bottom=[_example(window, largest, tokenizer) for window in shown.get("bottom", [])[:_EXAMPLES]],
    )


def _example(window: Window, largest: float, tokenizer: PreTrainedTokenizerFast) -> Example:
    values = [value or 0.0 for value in window.values]
    spans = [
        TokenSpan(visible(tokenizer, token), f"{value:+.3g}", shade(value, largest))
        for token, value in zip(window.tokens, values, strict=True)
    ]
    return Example(f"{values[window.at]:+.3g}", spans)

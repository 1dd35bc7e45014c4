"""A circuit's nodes in sentences. Each number and each claim in them is a measurement or a weight; nothing is guessed.

A node is said to detect the difference only where its value is higher in the same prompt in nine of ten pairs. Tokens
and names are untrusted: sentences are `Markup`, into which they are formatted with escapes.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from markupsafe import Markup

from interventions.circuits.attention import Look
from interventions.circuits.controls import IDLE, is_idle
from interventions.circuits.node_model import Edge
from interventions.report.nodes import Weighted
from sparse_model.model.node_names import Node

DETECTS = 0.9
"""Share of pairs from which on a node detects the difference."""
_MOST_LISTED = 4
_ROLES = {
    "attn.act_in": "read",
    "attn.q": "query",
    "attn.k": "key",
    "attn.qk": "query and key",
    "attn.v": "value",
    "attn.resid_delta": "write",
    "mlp.act_in": "read",
    "mlp.post_act": "neuron",
    "mlp.resid_delta": "write",
}
_IN_SCORES = ("attn.q", "attn.k", "attn.qk")
_PLACES = {"last": "at the last token", "since": "from the first differing token on"}

Words = str | Markup


class NodeFacts(NamedTuple):
    """What was measured of a node, and what touches it in the circuit."""

    name: str
    node: Node
    effect: float | None
    means: Mapping[str, list[float | None]]
    """By place, of each member; empty without prompts, as is `apart`."""
    apart: Mapping[str, list[float | None]]
    """By place, shares of pairs in which it is higher in the first member, and in the second."""
    incoming: Sequence[Edge]
    outgoing: Sequence[tuple[Edge, float | None]]
    """With what cutting it does."""
    writers: Sequence[str]
    """Nodes that write the residual channel that it reads."""
    readers: Sequence[str]
    embedded: Weighted | None
    """Tokens in which the prompts differ whose embedding writes its channel; None where embeddings are not sparse."""
    mostly_embedded: Weighted
    """Of all tokens those whose embedding writes it most."""
    logits: Weighted | None
    """Answers whose logit reads its channel."""
    partner: str
    """The key of a query, the query of a key; empty for other nodes."""
    partner_value: float | None
    """Where the partner is outside the circuit: what it is ablated to, where that is one number."""
    partner_kept: bool
    looks: tuple[Look, Look] | None
    """Of its head, in the whole model and in the circuit."""


class Teller:
    """Tells nodes: what the members are called, how tokens are spelled, where in the page a node is."""

    def __init__(
        self, members: tuple[Markup, Markup], spell: Callable[[int], str], anchors: Mapping[str, str], roles: Mapping
    ) -> None:
        self.members, self._spell, self._anchors, self._roles = members, spell, anchors, roles

    def story(self, facts: NodeFacts) -> Markup:
        """A short paragraph on a node."""
        sentences = [
            self._opening(facts),
            self.value(facts),
            self._sources(facts),
            self._partner(facts),
            self._look(facts),
            self._targets(facts),
            self._effect(facts),
        ]
        return Markup(" ").join(sentence for sentence in sentences if sentence)

    def strongest(self, effects: Sequence[tuple[str, float]]) -> Markup:
        """Nodes with their effects."""
        return listed(Markup("{} ({})").format(self.mention(name), _signed(effect)) for name, effect in effects)

    def mention(self, name: str) -> Markup:
        """A node's role and name, which leads to it where it is told."""
        code = Markup("<code>{}</code>").format(name)
        if name in self._anchors:
            code = Markup('<a href="#{}">{}</a>').format(self._anchors[name], code)
        return Markup("the {} {}").format(_ROLES[self._roles[name]], code)

    def _opening(self, facts: NodeFacts) -> Words:
        node = facts.node
        sublayer = f"{'attention' if node.place.startswith('attn') else 'MLP'} of layer {node.layer}"
        if node.head is not None:
            return f"Channel {node.channel} of the {_ROLES[node.place]} of head {node.head} in the {sublayer}."
        if node.place == "mlp.post_act":
            return f"Neuron {node.channel} of the {sublayer}."
        if node.place.endswith("act_in"):
            return f"What the {sublayer} reads from channel {node.channel} of the residual stream."
        return f"What the {sublayer} adds to channel {node.channel} of the residual stream."

    def value(self, facts: NodeFacts) -> Words:
        """Whether its value tells the members apart, at the place where it does so more often."""
        if not facts.apart:
            return ""
        place = best_place(facts)
        first, second = (share or 0.0 for share in facts.apart[place])
        if not first + second:
            return "Its value is the same in both prompts of every pair."
        higher = 0 if first >= second else 1
        means = [_mean(mean) for mean in facts.means[place]]
        share = max(first, second)
        found = Markup("{} it is {} {} and {} {} on average, and higher {} in {:.0%} of the pairs").format(
            _PLACES[place], means[0], self.members[0], means[1], self.members[1], self.members[higher], share
        )
        if detects(facts):
            return Markup("It detects the difference: {}.").format(found)
        return Markup("It does not detect the difference: {}, lower in {:.0%}.").format(found, min(first, second))

    def _sources(self, facts: NodeFacts) -> Words:
        if not facts.node.place.endswith("act_in"):
            if not facts.incoming:
                return "No node of the circuit feeds it."
            edges = sorted(facts.incoming, key=lambda edge: -abs(edge.weight))
            return Markup("It is fed by {}.").format(listed(self._edge(edge, edge.source) for edge in edges))
        writers = listed(self.mention(name) for name in facts.writers)
        written = Markup("{} {} to that channel before.").format(
            _upper(writers) or "No node of the circuit", "add" if len(facts.writers) > 1 else "adds"
        )
        return Markup("{} {}").format(written, self._embedding(facts)) if facts.embedded is not None else written

    def _embedding(self, facts: NodeFacts) -> Markup:
        if facts.embedded:
            return Markup("Of the tokens in which the prompts differ, the embedding writes it for {}.").format(
                self._tokens(facts.embedded)
            )
        start = Markup("The embedding writes it for none of the tokens in which the prompts differ")
        if not facts.mostly_embedded:
            return Markup("The embedding writes it for no token.")
        return Markup("{}, most for {}.").format(start, self._tokens(facts.mostly_embedded[:3]))

    def _partner(self, facts: NodeFacts) -> Words:
        if not facts.partner:
            return ""
        if facts.partner_kept:
            return Markup("It is multiplied with {} in the attention scores.").format(self.mention(facts.partner))
        stands = "random tokens' values" if facts.partner_value is None else _mean(facts.partner_value)
        return Markup(
            "In the attention scores it is multiplied with {}, which is outside the circuit and ablated to {}."
        ).format(self.mention(facts.partner), stands)

    def _look(self, facts: NodeFacts) -> Words:
        if facts.looks is None:
            return ""
        whole, alone = facts.looks
        return (
            f"From the last token its head puts {whole.first:.2f} of its attention on the first differing token and "
            f"{whole.rest:.3f} on each of the others; in the circuit {alone.first:.2f} and {alone.rest:.3f}."
        )

    def _targets(self, facts: NodeFacts) -> Words:
        edges = sorted(facts.outgoing, key=lambda found: (-(found[1] or 0.0), -abs(found[0].weight)))
        if edges:
            return Markup("It feeds {}.").format(listed(self._edge(e, e.target, effect) for e, effect in edges))
        if not facts.node.place.endswith("resid_delta"):
            return "" if facts.node.place in _IN_SCORES else "It feeds no node of the circuit."
        readers = listed(self.mention(name) for name in facts.readers)
        read = Markup("{} {} that channel later.").format(
            _upper(readers) or "No node of the circuit", "read" if len(facts.readers) > 1 else "reads"
        )
        if facts.logits is None:
            return read
        answers = self._tokens(facts.logits) or "none of the answers"
        return Markup("{} The unembedding reads it for {}.").format(read, answers)

    def _effect(self, facts: NodeFacts) -> Words:
        effect = facts.effect
        if effect is None:
            return ""
        if effect <= -IDLE:
            return f"Without it the circuit's loss falls by {-effect:.3f} nats."
        if is_idle(effect):
            return f"Without it the circuit's loss changes by less than {IDLE} nats ({_signed(effect)})."
        return f"Without it the circuit's loss rises by {effect:.3f} nats."

    def _edge(self, edge: Edge, end: str, effect: float | None = None) -> Markup:
        words = Markup("{} with weight {}").format(self.mention(end), _signed(edge.weight))
        return words if effect is None else Markup("{} (effect {})").format(words, _signed(effect))

    def _tokens(self, weighted: Weighted) -> Markup:
        return listed(
            Markup("<code>{}</code> ({})").format(self._spell(token), _signed(weight or 0.0))
            for token, weight in weighted
        )


def best_place(facts: NodeFacts) -> str:
    """Where a node tells the members apart in more pairs: last or since."""
    return max(facts.apart, key=lambda place: max(share or 0.0 for share in facts.apart[place]))


def detects(facts: NodeFacts) -> bool:
    """Whether a node's value tells the two members of a pair apart, the same way, in nine of ten pairs."""
    return bool(facts.apart) and max(share or 0.0 for share in facts.apart[best_place(facts)]) >= DETECTS


def _mean(value: float | None) -> str:
    return "no number" if value is None else _signed(value)


def _signed(value: float) -> str:
    """Three significant digits; a true minus sign."""
    return format(value, "+.3g").replace("-", "−") if value else "0"


def listed(parts: Iterable[Markup]) -> Markup:
    """One, two and three; of many the first four."""
    given = list(parts)
    if len(given) > _MOST_LISTED:
        given[_MOST_LISTED:] = [Markup("{} more").format(len(given) - _MOST_LISTED)]
    *most, last = given or [Markup("")]
    return Markup(" and ").join([Markup(", ").join(most), last]) if most else last


def _upper(text: Markup) -> Markup:
    """It begins with a letter of ours, never with a token."""
    return Markup(text[:1].upper() + text[1:])

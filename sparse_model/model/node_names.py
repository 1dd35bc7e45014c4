"""Names of single nodes: ours (a hook and an index) and OpenAI's, read and printed.

0.mlp.resid_delta.460      channel 460 of what the first MLP writes
10.attn.qk.head82.ch1      channel 1 of head 82, of queries and keys together
attn.1.read.146            ours, short: channel 146 of what the second attention reads
"""

import re
from typing import NamedTuple

from sparse_model.config import SparseConfig

# OpenAI's place, our hook within the block, the field of SparseConfig that bounds the index.
_PLACES = {
    "resid_in": ("hook_resid_pre", "d_model"),
    "attn.act_in": ("attn.hook_in", "d_model"),
    "attn.q": ("attn.hook_q", "d_head"),
    "attn.k": ("attn.hook_k", "d_head"),
    "attn.v": ("attn.hook_v", "d_head"),
    "attn.y": ("attn.hook_z", "d_head"),
    "attn.resid_delta": ("hook_attn_out", "d_model"),
    "resid_mid": ("hook_resid_mid", "d_model"),
    "mlp.act_in": ("mlp.hook_in", "d_model"),
    "mlp.post_act": ("mlp.hook_post", "d_mlp"),
    "mlp.resid_delta": ("hook_mlp_out", "d_model"),
}
_PER_HEAD = ("attn.q", "attn.k", "attn.v", "attn.y", "attn.qk")
_SHORT = {"attn": "attn.act_in", "mlp": "mlp.act_in"}


class Node(NamedTuple):
    """One channel of one location."""

    layer: int
    place: str
    """OpenAI's name of the location: mlp.resid_delta, attn.q, ...; attn.qk is query and key together."""
    channel: int
    """Index within the location, or within the head."""
    head: int | None = None

    @property
    def hooks(self) -> tuple[str, ...]:
        """Names of the hook points whose activation holds the node; two for attn.qk."""
        places = ("attn.q", "attn.k") if self.place == "attn.qk" else (self.place,)
        return tuple(f"blocks.{self.layer}.{_PLACES[place][0]}" for place in places)

    @property
    def channel_index(self) -> tuple[int, ...]:
        """Index into the last axes of its activation: (channel,), or (head, channel)."""
        return (self.channel,) if self.head is None else (self.head, self.channel)

    def __str__(self) -> str:
        if self.head is None:
            return f"{self.layer}.{self.place}.{self.channel}"
        return f"{self.layer}.{self.place}.head{self.head}.ch{self.channel}"


def parse_node(name: str, cfg: SparseConfig) -> Node:
    """A node by OpenAI's name or our short one for reads.

    Raises ValueError for a name of neither form, an unknown place, or an index out of range, naming it.
    """
    short = re.fullmatch(r"(attn|mlp)\.(\d+)\.read\.(\d+)", name)
    if short:
        node = Node(int(short[2]), _SHORT[short[1]], int(short[3]))
    else:
        match = re.fullmatch(r"(\d+)\.([a-z_.]+?)(?:\.head(\d+)\.ch(\d+)|\.(\d+))", name)
        if not match:
            raise ValueError(
                f"{name!r} is no node name: write 0.mlp.resid_delta.460, 1.attn.qk.head8.ch1, attn.1.read.7"
            )
        head = None if match[3] is None else int(match[3])
        node = Node(int(match[1]), match[2], int(match[4] or match[5]), head)
    _check(node, name, cfg)
    return node


def _check(node: Node, name: str, cfg: SparseConfig) -> None:
    if node.place != "attn.qk" and node.place not in _PLACES:
        raise ValueError(f"{name!r}: unknown place {node.place!r}; known are attn.qk, {', '.join(_PLACES)}")
    if (node.head is not None) != (node.place in _PER_HEAD):
        form = "head and channel, as in 1.attn.q.head0.ch3" if node.place in _PER_HEAD else "one index"
        raise ValueError(f"{name!r}: {node.place} takes {form}")
    width = cfg.d_head if node.place == "attn.qk" else getattr(cfg, _PLACES[node.place][1])
    if node.place in ("attn.act_in", "mlp.act_in"):
        width += cfg.d_pos
    for what, value, count in (
        ("layer", node.layer, cfg.n_layers),
        ("head", node.head or 0, cfg.n_heads),
        ("index", node.channel, width),
    ):
        if value >= count:
            raise ValueError(f"{name!r}: {what} {value} is out of range, the model has {count}")

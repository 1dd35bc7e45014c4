"""What a circuit is made of in a model: node locations, running with the nodes edited, and the weights between them.

Nodes are the channels of eight locations per layer (paper 2.2): residual read, q, k, v and residual write of the
attention; residual read, neuron (after the activation) and residual write of the MLP. Edges are the nonzero weights
between two nodes of consecutive locations:

    attn.hook_in -> attn.hook_q, attn.hook_k, attn.hook_v      the qkv matrix
    attn.hook_v  -> hook_attn_out                              the output matrix; column h * d_head + c is v channel c
    mlp.hook_in  -> mlp.hook_post -> hook_mlp_out              the MLP's two matrices

What has no weight of its own is no edge: a residual write reaches the same channel of every later read, and a q and a
k channel of the same index meet in the attention scores, both with the constant weight 1. Nor are embeddings,
unembedding, biases and the read before the unembedding: they are the frame that every circuit of the model shares.

A dense GPT-2 has the same locations under the same names, its reads being the outputs of its layer norms. Dense models
of other families run, but their nodes are not told apart.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from bridges.dense import DenseModel
from bridges.hybrid import advance
from sparse_model.config import SparseConfig
from sparse_model.model.lengths import check_length
from sparse_model.model.node_names import Node, parse_node
from sparse_model.model.transformer import SparseTransformer

Values = Float[Tensor, "batch pos width"]
NodeEdit = Callable[[str, Values], Values]
"""(location's name, its values) -> the values that the model goes on with."""
ModelKind = Literal["sparse", "dense"]
Kept = dict[str, Bool[Tensor, " width"]]
"""Which channels of each location are kept, by the location's name."""

# OpenAI's place, our hook within the block, the field that gives the width; in the order of computation.
_LOCATIONS = (
    ("attn.act_in", "attn.hook_in", "d_model"),
    ("attn.q", "attn.hook_q", "heads"),
    ("attn.k", "attn.hook_k", "heads"),
    ("attn.v", "attn.hook_v", "heads"),
    ("attn.resid_delta", "hook_attn_out", "d_model"),
    ("mlp.act_in", "mlp.hook_in", "d_model"),
    ("mlp.post_act", "mlp.hook_post", "d_mlp"),
    ("mlp.resid_delta", "hook_mlp_out", "d_model"),
)


class Location(NamedTuple):
    """One place in a model whose channels are nodes."""

    name: str
    """Hook point of the sparse model: blocks.0.attn.hook_in, ..."""
    layer: int
    place: str
    """OpenAI's name: attn.act_in, attn.q, ..."""
    width: int
    """Channels, all heads together."""
    d_head: int
    """Width of a head for q, k and v; 0 elsewhere."""

    def node(self, channel: int) -> Node:
        """The node of a channel, counted over all heads."""
        if not self.d_head:
            return Node(self.layer, self.place, channel)
        return Node(self.layer, self.place, channel % self.d_head, channel // self.d_head)


class Matrix(NamedTuple):
    """The weights from one location to another."""

    source: str
    target: str
    weight: Float[Tensor, "target source"]


@runtime_checkable
class NodeModel(Protocol):
    """What pruning needs of a model; `SparseNodes` and `DenseNodes` have it."""

    kind: ModelKind
    module: nn.Module
    """The model itself."""

    @property
    def shape(self) -> SparseConfig: ...

    def logits(
        self, tokens: Int[Tensor, "batch pos"], edit: NodeEdit | None = None, last: Int[Tensor, " batch"] | None = None
    ) -> Float[Tensor, "batch answer_pos d_vocab"]: ...

    def visit(self, tokens: Int[Tensor, "batch pos"], note: NodeEdit) -> None: ...

    def matrices(self) -> Iterator[Matrix]: ...


def locations(shape: SparseConfig) -> list[Location]:
    """The node locations of a model of these sizes, in the order of computation: eight per layer."""
    places = []
    for layer in range(shape.n_layers):
        for place, hook, field in _LOCATIONS:
            width = shape.n_heads * shape.d_head if field == "heads" else getattr(shape, field)
            width += shape.d_pos if place.endswith("act_in") else 0
            places.append(Location(f"blocks.{layer}.{hook}", layer, place, width, shape.d_head * (field == "heads")))
    return places


def device_of(model: NodeModel) -> torch.device:
    """Where a model's weights are."""
    return next(model.module.parameters()).device


def as_nodes(model: NodeModel | nn.Module) -> NodeModel:
    """A model of either kind as a `NodeModel`. Raises TypeError for any other object, naming its class."""
    if isinstance(model, NodeModel):
        return model
    if isinstance(model, SparseTransformer):
        return SparseNodes(model)
    if isinstance(model, DenseModel):
        return DenseNodes(model)
    if isinstance(model, PreTrainedModel):
        return DenseNodes(DenseModel(model))
    raise TypeError(f"a {type(model).__name__} has no nodes: give a SparseTransformer, a DenseModel or an HF model")


class SparseNodes:
    """The nodes of a weight-sparse transformer, at its own hook points (values after AbsTopK)."""

    kind: ModelKind = "sparse"

    def __init__(self, model: SparseTransformer) -> None:
        self.module: nn.Module = model
        self._model = model

    shape = property(lambda self: self._model.cfg)

    def logits(
        self, tokens: Int[Tensor, "batch pos"], edit: NodeEdit | None = None, last: Int[Tensor, " batch"] | None = None
    ) -> Float[Tensor, "batch answer_pos d_vocab"]:
        """Logits with every location's values passed through `edit`; with `last`, of those positions alone.

        What the last MLP does elsewhere is not computed then, and `edit` sees one position there: no later part reads
        another token. (A model that concatenates positions runs it everywhere.)
        """
        n_sublayers = 2 * self.shape.n_layers
        skips = last is not None and not self.shape.d_pos
        with self._edited(edit):
            resid = self._model.embed(tokens)
            for i in range(n_sublayers - skips):
                resid = self._model.sublayer(i, resid)
            if last is not None:
                row = torch.arange(len(last), device=tokens.device)
                resid, tokens = resid[row, last][:, None], tokens[row, last][:, None]
            if skips:
                resid = self._model.sublayer(n_sublayers - 1, resid)
        return self._model.unembed(resid, tokens)

    def visit(self, tokens: Int[Tensor, "batch pos"], note: NodeEdit) -> None:
        """Show every location's values at all tokens to `note`, which gives them back; no logits are made."""
        with self._edited(note):
            advance(self._model, 0, self._model.embed(tokens))

    def _edited(self, edit: NodeEdit | None) -> AbstractContextManager[Any]:
        # Heads laid side by side: only q, k and v have a head axis.
        hooks: list[Any] = (
            [] if edit is None else [(location.name, partial(_edit_hooked, edit)) for location in locations(self.shape)]
        )
        return self._model.hooks(fwd_hooks=hooks)

    def matrices(self) -> Iterator[Matrix]:
        """Every matrix between two locations."""
        blocks: Any = self._model.blocks
        for i, block in enumerate(blocks):
            qkv = block.attn.qkv.weight.detach().chunk(3)
            yield from _block_matrices(
                i, *qkv, *(m.weight.detach() for m in (block.attn.out, block.mlp.fc, block.mlp.out))
            )


class DenseNodes:
    """A dense model and, if it is a GPT-2, its nodes, by hooks on the HF modules: reads are what ln_1 and ln_2 give."""

    kind: ModelKind = "dense"

    def __init__(self, model: DenseModel) -> None:
        self._anatomy = model.anatomy
        self.module: nn.Module = model.hf
        cfg: Any = model.hf.config
        self.shape = SparseConfig(
            n_layers=model.n_layers,
            d_model=model.d_model,
            d_mlp=model.anatomy.d_mlp,
            n_heads=model.anatomy.n_heads,
            d_head=getattr(cfg, "head_dim", None) or model.d_model // model.anatomy.n_heads,
            n_ctx=model.n_ctx,
            d_vocab=model.d_vocab,
        )
        """Only the sizes mean something here."""

    def _blocks(self) -> Any:
        """The blocks of a GPT-2; ValueError for another family."""
        kind = self._anatomy.model.config.model_type
        if kind != "gpt2":
            raise ValueError(f"circuits of a dense {kind!r} model are not supported: find them in the sparse model")
        return self._anatomy.blocks

    def logits(
        self, tokens: Int[Tensor, "batch pos"], edit: NodeEdit | None = None, last: Int[Tensor, " batch"] | None = None
    ) -> Float[Tensor, "batch answer_pos d_vocab"]:
        """As `SparseNodes.logits`. Raises ValueError beyond the context."""
        check_length(tokens.shape[1], self.shape.n_ctx)
        with self._edited(edit):
            resid = self._anatomy.body(input_ids=tokens, use_cache=False).last_hidden_state
        if last is not None:
            resid = resid[torch.arange(len(last), device=tokens.device), last][:, None]
        return self._anatomy.head(resid)

    def visit(self, tokens: Int[Tensor, "batch pos"], note: NodeEdit) -> None:
        """As `SparseNodes.visit`. Raises ValueError beyond the context."""
        check_length(tokens.shape[1], self.shape.n_ctx)
        with self._edited(note):
            self._anatomy.body(input_ids=tokens, use_cache=False)

    @contextmanager
    def _edited(self, edit: NodeEdit | None) -> Iterator[None]:
        """Forward hooks that pass every location through `edit`, removed on leaving."""
        handles = []
        for i, block in enumerate(self._blocks() if edit is not None else ()):
            assert edit is not None
            for module, hook in (
                (block.ln_1, "attn.hook_in"),
                (block.attn.c_attn, "attn"),
                (block.attn.c_proj, "hook_attn_out"),
                (block.ln_2, "mlp.hook_in"),
                (block.mlp.act, "mlp.hook_post"),
                (block.mlp.c_proj, "hook_mlp_out"),
            ):
                run = _edit_qkv if hook == "attn" else _edit_output
                handles.append(module.register_forward_hook(partial(run, edit, f"blocks.{i}.{hook}")))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def matrices(self) -> Iterator[Matrix]:
        """Every matrix between two locations; HF's Conv1D keeps them as [source, target]."""
        for i, block in enumerate(self._blocks()):
            qkv = block.attn.c_attn.weight.detach().T.chunk(3)
            rest = (block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj)
            yield from _block_matrices(i, *qkv, *(m.weight.detach().T for m in rest))


def _edit_hooked(edit: NodeEdit, value: Tensor, hook: nn.Module) -> Tensor:
    # q, k and v have a head axis: the heads are laid side by side.
    return edit(str(hook.name), value.flatten(2)).view(value.shape)


def _edit_output(edit: NodeEdit, name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return edit(name, output)


def _edit_qkv(edit: NodeEdit, name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    parts = zip("qkv", output.chunk(3, dim=-1), strict=True)
    return torch.cat([edit(f"{name}.hook_{n}", part) for n, part in parts], -1)


def _block_matrices(
    layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, fc: Tensor, mlp_out: Tensor
) -> Iterator[Matrix]:
    block = f"blocks.{layer}."
    for name, weight in (("q", q), ("k", k), ("v", v)):
        yield Matrix(f"{block}attn.hook_in", f"{block}attn.hook_{name}", weight)
    yield Matrix(f"{block}attn.hook_v", f"{block}hook_attn_out", out)
    yield Matrix(f"{block}mlp.hook_in", f"{block}mlp.hook_post", fc)
    yield Matrix(f"{block}mlp.hook_post", f"{block}hook_mlp_out", mlp_out)


class Edge(NamedTuple):
    """A nonzero weight between two kept nodes."""

    source: str
    """The node's published name, e.g. 0.attn.act_in.7."""
    target: str
    weight: float
    matrix: str
    """Which matrix: q, k, v, attn_out, mlp_in or mlp_out; tells apart the two weights into a tied attn.qk node."""


_MATRIX_NAMES = {
    "attn.q": "q",
    "attn.k": "k",
    "attn.v": "v",
    "attn.resid_delta": "attn_out",
    "mlp.post_act": "mlp_in",
    "mlp.resid_delta": "mlp_out",
}


def node_name(location: Location, channel: int, *, tied_qk: bool = False) -> str:
    """A channel's published name; where q and k share their gate both are the one node attn.qk."""
    node = location.node(channel)
    return str(node._replace(place="attn.qk") if tied_qk and location.place in ("attn.q", "attn.k") else node)


def find_node(shape: SparseConfig, name: str) -> tuple[tuple[str, int], ...]:
    """(location, channel over all heads) of a node by OpenAI's name or ours; two for attn.qk.

    Raises ValueError for a name that `parse_node` refuses, or a place that is no node location, such as resid_mid.
    """
    node = parse_node(name, shape)
    channel = node.channel if node.head is None else node.head * shape.d_head + node.channel
    known = {location.name for location in locations(shape)}
    if not set(node.hooks) <= known:
        places = ", ".join(place for place, _, _ in _LOCATIONS)
        raise ValueError(f"{name!r}: {node.place} is no place of a circuit's nodes; they are {places}, attn.qk")
    return tuple((hook, channel) for hook in node.hooks)


def edges_between(model: NodeModel, kept: Kept, *, tied_qk: bool = False) -> list[Edge]:
    """The nonzero weights between two kept nodes, in the order of computation."""
    by_name = {location.name: location for location in locations(model.shape)}
    edges = []
    for source, target, weight in model.matrices():
        rows, columns = (kept[name].nonzero().flatten() for name in (target, source))
        # The kept corner only: a dense GPT-2 has more weights than fit into Python objects.
        corner = weight.cpu()[rows.cpu()][:, columns.cpu()]
        for row, column in corner.nonzero().tolist():
            start = node_name(by_name[source], int(columns[column]), tied_qk=tied_qk)
            end = node_name(by_name[target], int(rows[row]), tied_qk=tied_qk)
            edges.append(Edge(start, end, float(corner[row, column]), _MATRIX_NAMES[by_name[target].place]))
    return edges


def count_edges(model: NodeModel, kept: Kept) -> int:
    """Number of nonzero weights between two kept nodes."""
    total = 0
    for source, target, weight in model.matrices():
        corner = weight[kept[target].to(weight.device)][:, kept[source].to(weight.device)]
        total += int(corner.count_nonzero())
    return total

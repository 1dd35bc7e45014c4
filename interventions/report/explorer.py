"""What the circuit explorer draws, as plain data (static/picture.js, explorer.js and panel.js read it)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxtyping import Int
from torch import Tensor

from bridges.run_folder import Run
from bridges.sites import Site
from interventions.bundle.channels import Channel
from interventions.charts import finite, numbers
from interventions.circuits.circuit import Circuit
from interventions.circuits.node_model import NodeModel, find_node
from interventions.circuits.picture_layout import LINKS, Layout, place_nodes
from interventions.report import nodes as about
from interventions.report.ends import picture_ends
from interventions.report.texts import prompts
from interventions.tasks.base import TaskBatch

MOST_EDGES = 4000
"""Edges that are drawn, strongest first; a dense model's circuit may have many more."""
_SHOWN_PAIRS = 2

Plain = dict[str, Any]


class Explorer(NamedTuple):
    """The data of one circuit."""

    data: Plain
    tokens: set[int]
    """Token ids in it."""


def explorer_data(
    run: Run,
    model: NodeModel,
    circuit: Circuit,
    channels: dict[str, Channel],
    ranked: Sequence[str],
    effects: dict[str, float],
    batch: TaskBatch | None,
    held_out: Int[Tensor, "row pos"],
    detailed: int,
) -> Explorer:
    """Everything but the sizes. `ranked` are the nodes by importance, of which the first `detailed` get examples."""
    graph = circuit.to_networkx(links=True)
    layout, named = place_nodes(graph), _named(run, circuit, channels)
    details, tokens = _details(model, circuit, ranked[:detailed], batch, held_out)
    stream = _stream(run, circuit, ranked[:detailed])
    tokens |= about.used_tokens(*(part for ways in stream.values() for part in ways.values()))
    texts = prompts(run, batch, _SHOWN_PAIRS) if batch else []
    tokens |= {token for text in texts for token in text.tokens.tolist()}
    ends = picture_ends(run.sparse, circuit, layout, batch)
    tokens |= {end["token"] for end in ends}
    index = {name: place for place, name in enumerate(circuit.names)}
    rank = {name: place for place, name in enumerate(ranked)}
    strongest = sorted(circuit.edges, key=lambda edge: -abs(edge.weight))[:MOST_EDGES]
    nodes = [
        _node(circuit, name, layout)
        | {"rank": rank[name], "effect": finite(effects.get(name)), "named": named.get(name, [])}
        | details.get(name, {})
        for name in circuit.names
    ]
    data = {
        "task": circuit.task,
        "layers": [list(column) for column in layout.columns],
        "rows": layout.rows,
        "nodes": nodes,
        "edges": [[index[e.source], index[e.target], finite(e.weight, 3), e.matrix] for e in strongest],
        "links": [[index[a], index[b], kind] for a, b, kind in graph.edges(data="matrix") if kind in LINKS],
        "target": circuit.config.get("target_loss"),
        "prompts": [{"title": text.title, "tokens": text.tokens.tolist()} for text in texts],
        "stream": stream,
        "ends": ends,
        "fingerprint": circuit.fingerprint,
    }
    return Explorer(data, tokens)


def _node(circuit: Circuit, name: str, layout: Layout) -> Plain:
    words, spot = about.words(circuit, name), layout.spots[name]
    location, channel = find_node(circuit.shape, name)[0]
    ablated = circuit.ablation.values[location][:, channel]
    return {
        "name": name,
        "ours": words.ours,
        "short": words.short,
        "place": words.place,
        "layer": words.layer,
        "head": words.head,
        "column": spot.column,
        "row": finite(spot.row),
        "ablated": finite(float(ablated[0]), 3) if len(ablated) == 1 else None,
        "stream": channel if _in_stream(name) else None,
    }


def _details(
    model: NodeModel,
    circuit: Circuit,
    names: Sequence[str],
    batch: TaskBatch | None,
    held_out: Int[Tensor, "row pos"],
) -> tuple[dict[str, Plain], set[int]]:
    """Prompts and examples by node, and the token ids in them."""
    values = about.node_values(model, circuit, names, held_out)
    on_task = about.node_values(model, circuit, names, batch.tokens.flatten(0, 1)) if batch else {}
    details: dict[str, Plain] = {}
    tokens: set[int] = set()
    for name in names:
        top = about.windows(values[name], held_out)
        bottom = about.windows(values[name], held_out, lowest=True)
        tokens.update(token for window in (*top, *bottom) for token in window.tokens)
        details[name] = {"stats": about.value_statistics(values[name]), "top": top, "bottom": bottom}
        if batch:
            pairs = on_task[name].unflatten(0, (-1, 2))
            details[name] |= {"means": about.member_means(pairs, batch), "apart": about.members_apart(pairs, batch)}
            details[name]["prompts"] = [
                numbers(pairs[pair, member, : int(batch.last[pair]) + 1].tolist(), 3)
                for pair in range(_SHOWN_PAIRS)
                for member in (0, 1)
            ]
    return details, tokens


def _in_stream(name: str) -> bool:
    return "act_in" in name or "resid_delta" in name


def _stream(run: Run, circuit: Circuit, names: Sequence[str]) -> dict[int, dict[str, about.Weighted]]:
    """By residual channel: the tokens that the embedding and the unembedding tie to it. The sparse model's only."""
    if circuit.model != "sparse":
        return {}
    channels = {find_node(circuit.shape, name)[0][1] for name in names if _in_stream(name)}
    # Beyond d_model are the positions that some models' reads have beside the stream.
    return {c: about.stream_tokens(run.sparse, c) for c in sorted(channels) if c < run.sparse.d_model}


def _named(run: Run, circuit: Circuit, channels: dict[str, Channel]) -> dict[str, list[list[str]]]:
    """[name, id in the page] of named channels, by the published name of a read that they are made of."""
    links: dict[str, list[list[str]]] = {}
    if circuit.model != "sparse":
        return links
    for number, channel in enumerate(channels.values(), 1):
        site = Site(channel.site, run.sparse.n_layers)
        for index in () if site.is_final else channel.indices:
            node = f"{site.layer}.{site.reader}.act_in.{index}"
            links.setdefault(node, []).append([channel.name, f"channel-{number}"])
    return links

"""Circuits: edges against a brute-force count, the circuit as a model, files that say what is wrong with them."""

import errno
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import torch
from support.helpers import make_tiny_run
from support.solver import gates_of
from torch import Tensor

from bridges.run_folder import Run, fingerprint, open_run
from interventions.circuits.ablation import Calibration, measure_ablation
from interventions.circuits.circuit import (
    Circuit,
    circuit_paths,
    load_circuit,
    make_circuit,
    save_circuit,
)
from interventions.circuits.node_model import (
    Kept,
    NodeModel,
    as_nodes,
    count_edges,
    edges_between,
    find_node,
    locations,
)
from sparse_model.io.atomic import WriteFailed
from sparse_model.model.checkpoint import save_sparse
from sparse_model.model.transformer import SparseTransformer

BLOCKS = torch.randint(384, (4, 20), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose sparse model has three quarters of its weights zeroed."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    run = make_tiny_run(folder)
    with torch.no_grad():
        for p in run.sparse.parameters():
            if p.ndim == 2:
                p *= torch.rand_like(p) < 0.25
    save_sparse(run.sparse, folder / "sparse")
    return folder


@pytest.fixture
def run(folder: Path) -> Run:
    return open_run(folder)


@pytest.fixture(params=["sparse", "dense"])
def model(run: Run, request: pytest.FixtureRequest) -> NodeModel:
    return as_nodes(getattr(run, request.param))


def random_kept(model: NodeModel, share: int | float = 0.3, seed: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {at.name: torch.rand(at.width, generator=generator) < share for at in locations(model.shape)}


def some_circuit(run: Run, model: NodeModel, kept: Kept | None = None, **changes: Any) -> Circuit:
    fields: dict[str, Any] = {
        "tied_qk": False,
        "task": "single_double_quote",
        "fingerprint": fingerprint(run),
        "loss": 0.12,
        "unpruned_loss": 0.01,
        "calibration": Calibration(1.5, {7: 0.25, 9: -0.25}),
        "ablation": measure_ablation(model, BLOCKS),
        "config": {"seed": 0, "steps": 3},
    }
    return make_circuit(model, kept or random_kept(model), **fields | changes)


def brute_force(model: NodeModel, kept: dict[str, Tensor]) -> list[tuple[str, str, float]]:
    """Every weight of every block, one at a time, from the modules' own layout (not from `matrices`)."""
    shape, found = model.shape, []
    inner = shape.n_heads * shape.d_head
    state = {name: p.detach() for name, p in model.module.named_parameters()}

    def weight(sparse: str, dense: str) -> Tensor:
        return state[sparse] if model.kind == "sparse" else state[dense].T

    def look(layer: int, source: str, target: str, w: Tensor, names: tuple[str, str]) -> None:
        for row in range(w.shape[0]):
            for column in range(w.shape[1]):
                if w[row, column] != 0 and kept[source][column] and kept[target][row]:
                    ends = []
                    for place, c in ((names[0], column), (names[1], row)):
                        headed = place in ("attn.q", "attn.k", "attn.v")
                        at = f"head{c // shape.d_head}.ch{c % shape.d_head}" if headed else str(c)
                        ends.append(f"{layer}.{place}.{at}")
                    found.append((ends[0], ends[1], float(w[row, column])))

    for i in range(shape.n_layers):
        b, s, d = f"blocks.{i}", f"blocks.{i}", f"transformer.h.{i}"
        qkv = weight(f"{s}.attn.qkv.weight", f"{d}.attn.c_attn.weight")
        for j, n in enumerate("qkv"):
            part = qkv[j * inner : (j + 1) * inner]
            look(i, f"{b}.attn.hook_in", f"{b}.attn.hook_{n}", part, ("attn.act_in", f"attn.{n}"))
        out = weight(f"{s}.attn.out.weight", f"{d}.attn.c_proj.weight")
        look(i, f"{b}.attn.hook_v", f"{b}.hook_attn_out", out, ("attn.v", "attn.resid_delta"))
        fc = weight(f"{s}.mlp.fc.weight", f"{d}.mlp.c_fc.weight")
        look(i, f"{b}.mlp.hook_in", f"{b}.mlp.hook_post", fc, ("mlp.act_in", "mlp.post_act"))
        out = weight(f"{s}.mlp.out.weight", f"{d}.mlp.c_proj.weight")
        look(i, f"{b}.mlp.hook_post", f"{b}.hook_mlp_out", out, ("mlp.post_act", "mlp.resid_delta"))
    return found


def test_edges_are_those_of_a_brute_force_count(model: NodeModel) -> None:
    kept = random_kept(model)
    edges = edges_between(model, kept)
    expected = brute_force(model, kept)
    assert sorted((e.source, e.target, e.weight) for e in edges) == sorted(expected)
    assert len(edges) == count_edges(model, kept) == len(expected) > 50
    assert not edges_between(model, {name: torch.zeros_like(mask) for name, mask in kept.items()})


def test_all_nodes_have_all_weights_as_edges(run: Run) -> None:
    model = as_nodes(run.sparse)
    names = [n for n, p in run.sparse.named_parameters() if n.startswith("blocks") and p.ndim == 2]
    total = sum(int(run.sparse.get_parameter(n).count_nonzero()) for n in names)
    assert count_edges(model, random_kept(model, 1.1)) == total


def test_an_edge_carries_what_it_says(run: Run) -> None:
    """v channel c of head h is column h * d_head + c of the output matrix: moved alone, it moves the write so."""
    edge = next(
        e for e in edges_between(as_nodes(run.sparse), random_kept(as_nodes(run.sparse))) if e.matrix == "attn_out"
    )
    (source, channel), (target, row) = (find_node(run.sparse.cfg, name)[0] for name in (edge.source, edge.target))
    tokens = torch.randint(384, (1, 6))
    cfg = replace(run.sparse.cfg, topk_locations=())  # so that every write is linear in v
    plain = SparseTransformer(cfg)
    plain.load_state_dict(run.sparse.state_dict())
    model, seen = as_nodes(plain), []

    def push(by: int | float):
        def edit(name: str, values: Tensor) -> Tensor:
            if name == target:
                seen.append(values[0, 0, row].item())
            if name == source:
                values = values.clone()
                values[..., channel] += by
            return values

        return edit

    model.logits(tokens, push(0))
    model.logits(tokens, push(2.0))
    assert seen[1] - seen[0] == pytest.approx(2 * edge.weight, abs=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_networkx_export_has_the_same_counts(run: Run, model: NodeModel, tmp_path: Path, tied: bool) -> None:
    kept = random_kept(model)
    if tied:
        kept = {n: kept[n.replace("hook_k", "hook_q")] for n in kept}
    circuit = make_circuit(
        model,
        kept,
        tied_qk=tied,
        task="t",
        fingerprint="f",
        loss=0.1,
        unpruned_loss=0.0,
        calibration=Calibration(1.0, {}),
        ablation=measure_ablation(model, BLOCKS, "zero"),
    )
    graph = circuit.to_networkx()
    assert graph.number_of_nodes() == circuit.n_nodes
    assert graph.number_of_edges() == circuit.n_edges == count_edges(model, kept)
    nodes = sum(len(c) for c in circuit.nodes.values())
    pairs = sum(len(circuit.nodes[n]) for n in circuit.nodes if n.endswith("hook_q"))
    assert circuit.n_nodes == (nodes - pairs if tied else nodes)
    circuit.save_graphml(tmp_path / "c.graphml")
    back = nx.read_graphml(tmp_path / "c.graphml", force_multigraph=True)
    assert (back.number_of_nodes(), back.number_of_edges()) == (circuit.n_nodes, circuit.n_edges)
    weights = sorted(w for _, _, w in back.edges(data="weight"))
    assert weights == pytest.approx(sorted(e.weight for e in circuit.edges))


def test_links_join_equal_channels_only(run: Run) -> None:
    model = as_nodes(run.sparse)
    circuit = some_circuit(run, model)
    graph = circuit.to_networkx(links=True)
    added = [(s, t, m) for s, t, m in graph.edges(data="matrix") if m in ("residual", "qk")]
    kept = random_kept(model)
    qk = sum(int((kept[f"blocks.{i}.attn.hook_q"] & kept[f"blocks.{i}.attn.hook_k"]).sum()) for i in (0, 1))
    order = ["blocks.0.hook_attn_out", "blocks.0.mlp.hook_in", "blocks.0.hook_mlp_out", "blocks.1.attn.hook_in"]
    order += ["blocks.1.hook_attn_out", "blocks.1.mlp.hook_in"]
    residual = sum(
        int((kept[w] & kept[r]).sum())
        for i, w in enumerate(order)
        for r in order[i:]
        if w.endswith("out") and r.endswith("in")
    )
    assert len(added) == qk + residual
    assert graph.number_of_edges() == circuit.n_edges + qk + residual
    assert all(s.split(".")[-1] == t.split(".")[-1] for s, t, _ in added)


def test_circuit_runs_as_a_model(run: Run, model: NodeModel) -> None:
    """By hand: the kept nodes' own values, the means elsewhere, then the calibration."""
    circuit = some_circuit(run, model)
    tokens = torch.randint(384, (2, 9))

    def by_hand(name: str, values: Tensor) -> Tensor:
        values = values.clone()
        for c in set(range(values.shape[-1])) - set(circuit.nodes[name]):
            values[..., c] = circuit.ablation.values[name][0, c]
        return values

    expected = 1.5 * model.logits(tokens, by_hand)
    expected[..., 7] += 0.25
    expected[..., 9] -= 0.25
    got = circuit.run(model.module, tokens)
    assert torch.allclose(got, expected, atol=1e-5)
    assert not torch.allclose(got, model.logits(tokens), atol=0.1)
    everything = make_circuit(
        model,
        {n: g.bool() for n, g in gates_of(model, 1).items()},
        tied_qk=False,
        task="t",
        fingerprint="f",
        loss=0.0,
        unpruned_loss=0.0,
        calibration=Calibration(1.0, {}),
        ablation=circuit.ablation,
    )
    assert torch.equal(everything.run(model, tokens), model.logits(tokens))


@pytest.mark.parametrize("kind", ["mean", "resample"])
@pytest.mark.parametrize("tied", [False, True])
def test_saving_and_loading(run: Run, model: NodeModel, kind: str, tied: bool) -> None:
    kept = random_kept(model)
    if tied:
        kept = {n: kept[n.replace("hook_k", "hook_q")] for n in kept}
    circuit = some_circuit(run, model, kept, tied_qk=tied, ablation=measure_ablation(model, BLOCKS, kind))
    save_circuit(run.folder, circuit)
    back = load_circuit(run, circuit.task, model.kind)
    same = ("task", "model", "nodes", "edges", "tied_qk", "loss", "unpruned_loss", "calibration", "config", "controls")
    for name in (*same, "fingerprint", "names", "shape"):
        assert getattr(back, name) == getattr(circuit, name), name
    tokens = torch.randint(384, (2, 9))
    seeded = [torch.Generator().manual_seed(1) for _ in range(2)]
    assert torch.equal(back.run(model, tokens, seeded[0]), circuit.run(model, tokens, seeded[1]))
    assert not list((run.folder / "circuits").glob("*.tmp"))


def test_a_full_disk_leaves_the_circuit_that_was_there(run: Run, tmp_path: Path) -> None:
    nodes = as_nodes(run.sparse)
    first = some_circuit(run, nodes)
    second = some_circuit(run, nodes, loss=0.5, ablation=measure_ablation(nodes, BLOCKS, "resample"))
    save_circuit(run.folder, first)
    with pytest.MonkeyPatch.context() as patch:

        def full(*_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(Path, "write_text", full)
        with pytest.raises(WriteFailed, match=r"could not be written \(No space left on device\)"):
            save_circuit(run.folder, second)
    assert load_circuit(run, first.task).loss == first.loss


def test_the_circuit_of_another_run_is_refused(run: Run, tmp_path: Path) -> None:
    other = make_tiny_run(tmp_path / "other", seed=1)
    save_circuit(other.folder, some_circuit(run, as_nodes(run.sparse)))
    with pytest.raises(ValueError, match="is the circuit of another run"):
        load_circuit(other, "single_double_quote")
    with pytest.raises(FileNotFoundError, match=r"for_while\.json does not exist: find it with sparse-bridges find-c"):
        load_circuit(other, "for_while")


def test_damaged_files_are_named(run: Run) -> None:
    circuit = some_circuit(run, as_nodes(run.sparse))
    path, tensors = circuit_paths(run.folder, circuit.task)

    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            load_circuit(run, circuit.task)

    save_circuit(run.folder, circuit)
    path.write_text(path.read_text()[:200])
    refused(r"single_double_quote\.json is damaged")
    save_circuit(run.folder, circuit)
    tensors.write_bytes(tensors.read_bytes()[:-100])
    refused(r"single_double_quote\.safetensors is damaged or truncated")
    zeros = replace(circuit, ablation=measure_ablation(run.sparse, BLOCKS, "zero"))
    save_circuit(run.folder, zeros)
    newer = tensors.read_bytes()
    save_circuit(run.folder, circuit)
    tensors.write_bytes(newer)  # what a kill between the two renames leaves
    refused("does not belong to the .json beside it")
    save_circuit(run.folder, circuit)
    data = json.loads(path.read_text())
    data["nodes"][0] = "0.attn.act_in.999"
    path.write_text(json.dumps(data))
    refused("is not as it was written")
    del data["sha256"]
    path.write_text(json.dumps(data))
    refused("an edge ends at .*which is none of the nodes")
    path.write_text(json.dumps(data | {"edges": [], "n_edges": 0}))
    refused("is damaged .*index 999 is out of range")
    path.write_text(json.dumps(data | {"tied_qk": 1}))
    refused("tied_qk=1: input should be a valid boolean")


def test_nodes_are_found_by_either_name(run: Run) -> None:
    circuit = some_circuit(run, as_nodes(run.sparse))
    channel = circuit.nodes["blocks.1.attn.hook_in"][0]
    assert f"attn.1.read.{channel}" in circuit
    assert f"1.attn.act_in.{channel}" in circuit
    mine = circuit.edges_at(f"attn.1.read.{channel}")
    assert mine == [e for e in circuit.edges if e.source == f"1.attn.act_in.{channel}"]
    absent = next(c for c in range(32) if c not in circuit.nodes["blocks.1.attn.hook_in"])
    assert f"attn.1.read.{absent}" not in circuit
    with pytest.raises(KeyError, match="is not among the"):
        circuit.edges_at(f"attn.1.read.{absent}")
    with pytest.raises(ValueError, match="'nonsense' is no node name"):
        circuit.edges_at("nonsense")
    with pytest.raises(ValueError, match=r"resid_mid is no place of a circuit's nodes; they are attn\.act_in"):
        "0.resid_mid.3" in circuit  # noqa: B015

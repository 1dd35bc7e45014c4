"""Effects of edges and looks of heads, each taken in another way."""

import copy
import dataclasses

import pytest
import torch
from support.solver import CONFIG, gates_of, solver_batch
from torch import nn

from interventions.circuits.ablation import Calibration, measure_ablation
from interventions.circuits.attention import looks
from interventions.circuits.circuit import Circuit, make_circuit
from interventions.circuits.measures import edge_effects, node_effects
from interventions.circuits.node_model import Edge, as_nodes, locations
from interventions.circuits.pruning import score
from interventions.tasks.base import TaskBatch
from sparse_model.config import SparseConfig
from sparse_model.model.transformer import SparseTransformer

SHAPE = SparseConfig(
    n_layers=2, d_model=12, d_mlp=16, n_heads=2, d_head=4, n_ctx=8, d_vocab=6, bigram="none", topk_locations=()
)
MATRICES = ("q", "k", "v", "attn_out", "mlp_in", "mlp_out")
QUICK = dataclasses.replace(CONFIG, lbfgs_steps=8)


def batch_of(pairs: int = 16) -> TaskBatch:
    """Pairs that differ in their first token, of two lengths."""
    batch = solver_batch(pairs)
    last = torch.arange(pairs) % 2 + 1
    return batch._replace(tokens=batch.tokens.flip(2), last=last)


def random_circuit(
    *, tied_qk: bool = False, keep: float = 0.5, sink: bool = False
) -> tuple[SparseTransformer, Circuit]:
    torch.manual_seed(1)
    model = SparseTransformer(dataclasses.replace(SHAPE, sink=sink))
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight *= 3
            block.attn.out.weight *= 2
            if sink:
                block.attn.sink_logit.normal_()
    nodes = as_nodes(model)
    kept = {at.name: torch.rand(at.width) < keep for at in locations(model.cfg)}
    if tied_qk:
        for layer in range(2):
            kept[f"blocks.{layer}.attn.hook_k"] = kept[f"blocks.{layer}.attn.hook_q"]
    ablation = measure_ablation(nodes, torch.randint(6, (8, 8)))
    fields = {"task": "t", "fingerprint": "", "loss": 0.0, "unpruned_loss": 0.0, "calibration": Calibration(1.0, {})}
    return model, make_circuit(nodes, kept, tied_qk=tied_qk, ablation=ablation, **fields)


def without_edge(model: SparseTransformer, circuit: Circuit, edge: Edge) -> SparseTransformer:
    """The model with the edge's weight gone, and what it gave from the ablated source in the target's bias."""
    model = copy.deepcopy(model)
    source, target = edge.source.split("."), edge.target.split(".")
    block = model.blocks[int(source[0])]
    matrices = {"attn_out": block.attn.out, "mlp_in": block.mlp.fc, "mlp_out": block.mlp.out}
    linear: nn.Linear = matrices.get(edge.matrix, block.attn.qkv)

    def index(parts: list[str]) -> int:
        per_head = parts[-2].startswith("head")
        return int(parts[-2][4:]) * 4 + int(parts[-1][2:]) if per_head else int(parts[-1])

    row = index(target) + ("qkv".index(edge.matrix) * 8 if edge.matrix in "qkv" else 0)
    hooks = {"act_in": f"{source[1]}.hook_in", "v": "attn.hook_v", "post_act": "mlp.hook_post"}
    ablated = circuit.ablation.values[f"blocks.{source[0]}.{hooks[source[2]]}"][0, index(source)]
    with torch.no_grad():
        linear.bias[row] += linear.weight[row, index(source)] * ablated
        linear.weight[row, index(source)] = 0
    return model


@pytest.mark.parametrize("tied_qk", [False, True])
def test_an_edges_effect_is_that_of_its_weight(tied_qk: bool) -> None:
    """Without TopK, cutting is the same as a weight of zero and the ablated source's share as a bias."""
    model, circuit = random_circuit(tied_qk=tied_qk)
    batch = batch_of()
    strongest = sorted(circuit.edges, key=lambda edge: -abs(edge.weight))
    chosen = [edge for name in MATRICES for edge in [e for e in strongest if e.matrix == name][:5]]
    effects = edge_effects(as_nodes(model), circuit, chosen, batch, QUICK)
    assert set(effects) == set(chosen)
    base = score(as_nodes(model), circuit.kept, circuit.ablation, batch, QUICK).loss
    for edge, effect in effects.items():
        cut = as_nodes(without_edge(model, circuit, edge))
        loss = score(cut, circuit.kept, circuit.ablation, batch, QUICK).loss
        assert effect == pytest.approx(loss - base, abs=1e-4)
    moved = {edge.matrix for edge, effect in effects.items() if abs(effect) > 1e-3}
    assert moved == set(MATRICES)


def test_an_only_edge_has_its_sources_effect() -> None:
    model, circuit = random_circuit(keep=0.15)
    batch = batch_of()
    sources = [edge.source for edge in circuit.edges]
    only = [edge for edge in circuit.edges if sources.count(edge.source) == 1]
    assert only
    of_nodes = node_effects(as_nodes(model), circuit, circuit.kept, batch, QUICK)
    for edge, effect in edge_effects(as_nodes(model), circuit, only, batch, QUICK).items():
        assert effect == pytest.approx(of_nodes[edge.source], abs=1e-6)


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("alone", [False, True])
def test_looks_are_those_of_the_attention_pattern(sink: bool, alone: bool) -> None:
    model, circuit = random_circuit(sink=sink)
    batch = batch_of()
    gates = dict(circuit.kept) if alone else gates_of(as_nodes(model), 1)
    edit = circuit.ablation.edit(gates, circuit.ablation.draw(32, 3))
    patterns: list[torch.Tensor] = []
    with model.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", lambda x, hook: patterns.append(x.detach()))]):
        as_nodes(model).logits(batch.tokens.flatten(0, 1), edit)
    on_first, on_rest = [], []
    for row, pattern in enumerate(patterns[0][:, 1]):
        last = int(batch.last[row // 2])
        on_first.append(float(pattern[last, 0]))
        on_rest.append(sum(pattern[last, 1 : last + 1].tolist()) / last)
    found = looks(as_nodes(model), [(1, 1), (0, 0)], batch, edit if alone else None)
    assert set(found) == {(0, 0), (1, 1)}
    assert found[1, 1].first == pytest.approx(sum(on_first) / 32, abs=1e-5)
    assert found[1, 1].rest == pytest.approx(sum(on_rest) / 32, abs=1e-5)
    assert abs(found[1, 1].first - found[1, 1].rest) > 0.01

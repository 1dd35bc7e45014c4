"""Whole models are projected to the budget of each parameter, and proved to be within it."""

import pytest
import torch
from support.matrices import neuron_counts
from torch import nn

from sparse_model.config import SparseConfig, SparsityConfig
from sparse_model.model.transformer import SparseTransformer
from sparse_model.sparsity.projection import (
    SparseParameter,
    budget,
    check_budgets,
    check_minimum,
    count_nonzeros,
    project_,
    projection_mask,
    prove_sparsity,
    smallest_budget,
)
from sparse_model.sparsity.topk import top_mask_forced

AXES = ["row", "column"]


MODELS = {
    "plain": SparseConfig(d_model=32, d_mlp=64, n_heads=4, d_head=8, d_vocab=40),
    "learned positions": SparseConfig(d_model=32, d_mlp=64, n_heads=4, d_head=8, d_vocab=40, positions="learned"),
    "concatenated positions, sink, tied": SparseConfig(
        d_model=32, d_mlp=64, n_heads=4, d_head=8, d_vocab=40, positions="concat_learned", d_pos=4, sink=True, tied=True
    ),
}


def is_exempt(name: str, cfg: SparseConfig) -> bool:
    """Gains, sinks, the bigram table and concatenated positions are never sparsified."""
    return (
        ".ln" in f".{name}"
        or "sink_logit" in name
        or name == "bigram"
        or (name == "pos_embed.weight" and cfg.d_pos > 0)
    )


def expected_axis(name: str) -> str | None:
    if name.endswith(("qkv.weight", "fc.weight")):
        return "row"
    return "column" if name.endswith("out.weight") else None


@pytest.mark.parametrize("cfg", MODELS.values(), ids=MODELS)
def test_projection_of_a_model_leaves_exactly_the_budget_in_every_parameter(cfg: SparseConfig) -> None:
    model = SparseTransformer(cfg)
    config = SparsityConfig(nonzero_fraction=1 / 8, embed_fraction=1 / 4, bias_fraction=1 / 2, min_per_neuron=2)
    parameters = model.sparse_parameters(config.nonzero_fraction, config.embed_fraction, config.bias_fraction)
    assert {p.name: p.neuron_axis for p in parameters} == {
        name: expected_axis(name) for name, _ in model.named_parameters() if not is_exempt(name, cfg)
    }
    check_budgets(parameters, config)
    for _ in range(3):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
                if p.ndim == 2:  # so that the unconstrained choice would empty rows and columns
                    p[0] *= 5
                    p[:, 0] *= 5
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        project_(parameters, config)
        for name, p in model.named_parameters():
            if is_exempt(name, cfg):
                assert torch.equal(p, before[name]), name
                continue
            kept = p != 0
            share = 1 / 4 if "embed" in name else 1 / 2 if name.endswith("bias") else 1 / 8
            assert kept.sum() == budget(p.numel(), share), name
            assert torch.equal(p[kept], before[name][kept]), name
            if axis := expected_axis(name):
                assert (neuron_counts(kept, axis) >= 2).all(), name
    for count in count_nonzeros(parameters):
        p = dict(model.named_parameters())[count.name]
        assert (count.nonzeros, count.entries) == (int((p != 0).sum()), p.numel())
        assert count.fraction == count.nonzeros / count.entries


def test_unset_fractions_fall_back_to_the_matrices() -> None:
    parameters = SparseTransformer(MODELS["plain"]).sparse_parameters(1 / 8)
    assert {p.fraction for p in parameters} == {1 / 8}


def test_a_budget_that_check_budgets_accepts_can_be_projected() -> None:
    """A fraction that lies exactly on a rounding boundary."""
    p = nn.Parameter(torch.arange(14.0).view(2, 7))
    parameter, config = SparseParameter("p", p, 1.5 / 14, "row"), SparsityConfig(anneal="linear")
    check_budgets([parameter], config)
    project_([parameter], config)
    assert p.count_nonzero() == 2


def test_projection_follows_the_annealing() -> None:
    p = nn.Parameter(torch.randn(40, 50))
    config = SparsityConfig(anneal="linear", anneal_start=0.0, anneal_stop=0.5)
    for progress, kept in [(0.0, 2000), (0.25, 1100), (0.5, 200), (1.0, 200)]:
        with torch.no_grad():
            p.normal_()
        project_([SparseParameter("p", p, 0.1, None)], config, progress)
        assert p.count_nonzero() == kept


def test_removed_entries_are_plain_zeros() -> None:
    """Not -0.0, which a compressed file has to store."""
    p = nn.Parameter(-torch.rand(20, 20) - 1)
    project_([SparseParameter("p", p, 0.1, None)], SparsityConfig())
    assert int(p.signbit().sum()) == 40


def test_prove_sparsity_passes_a_projected_model_and_names_what_breaks_it() -> None:
    model = SparseTransformer(SparseConfig(d_model=32, d_mlp=48, n_heads=2, n_ctx=8, d_vocab=20))
    config = SparsityConfig(nonzero_fraction=1 / 4, min_per_neuron=3)
    parameters = model.sparse_parameters(1 / 4)
    for p in parameters:
        nn.init.normal_(p.tensor)
    project_(parameters, config)
    counts = prove_sparsity(parameters, config)
    assert all(c.nonzeros == budget(c.entries, 1 / 4) for c in counts)
    weight = model.blocks[0].mlp.out.weight
    with torch.no_grad():
        saved = weight[:, 5].clone()
        weight[:, 5] = 0
        with pytest.raises(ValueError, match=r"neuron 5 of blocks\.0\.mlp\.out\.weight has 0 nonzeros, fewer than 3"):
            prove_sparsity(parameters, config)
        weight[:, 5] = saved
        weight[weight == 0] = 1
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.out\.weight has 1536 nonzeros, its budget is 384"):
        prove_sparsity(parameters, config)


def test_the_minimum_per_neuron() -> None:
    """At most a neuron's inputs; none where there are no neurons."""
    assert check_minimum((3, 4), 12, 2, None) == 0
    assert check_minimum((3, 4), 12, 2, "row") == 2
    assert check_minimum((3, 4), 12, 9, "row") == 4
    assert check_minimum((3, 4), 12, 9, "column") == 3
    assert smallest_budget(SparseParameter("p", nn.Parameter(torch.zeros(3, 4)), 1.0, None), SparsityConfig()) == 1


@pytest.mark.parametrize("axis", AXES)
def test_a_parameter_that_wants_a_gradient_and_lies_across_memory(axis: str) -> None:
    whole = torch.randn(6, 5)
    across = nn.Parameter(whole.T.contiguous()).T
    assert not across.is_contiguous()
    assert torch.equal(top_mask_forced(across, 14, 2, axis), top_mask_forced(whole, 14, 2, axis))
    assert torch.equal(
        top_mask_forced(nn.Parameter(whole), 14, 2, axis),
        projection_mask(whole, 14, min_per_neuron=2, neuron_axis=axis),
    )

"""Hybrids and the joint step: identity bridges, exactness of suffixes, gradients against one naive graph."""

import copy
import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from helpers import make_tiny_run
from torch import nn

from bridges.bridge import BridgeSet
from bridges.config import BridgeConfig, LossWeights
from bridges.dense import DenseModel
from bridges.evaluate import Moments, evaluate
from bridges.hybrid import mixed_path, residuals, suffix
from bridges.joint import Draw, draw, joint_backward
from bridges.losses import kl, nmse
from sparse_model.config import SparseConfig
from sparse_model.losses import next_token_loss
from sparse_model.transformer import SparseTransformer

SHAPE = SparseConfig(d_model=16, d_mlp=32, n_heads=2, d_head=8, n_ctx=12, d_vocab=40)
WEIGHTS = LossWeights(ce=0.7, nmse_encode=1.3, nmse_decode=0.4, kl_dense_to_sparse=0.6, kl_sparse_to_dense=1.1)


def identity_bridges(n_sites: int, d: int) -> BridgeSet:
    bridges = BridgeSet(n_sites, d, d, d)
    for linear in (*bridges.encoders, *bridges.decoders):
        nn.init.eye_(linear.weight)
    return bridges


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(SHAPE.d_vocab, (3, SHAPE.n_ctx))


def test_identity_bridges_between_copies_are_perfect(tokens: torch.Tensor) -> None:
    sparse = SparseTransformer(SHAPE)
    nn.init.normal_(sparse.bigram)
    dense, bridges = copy.deepcopy(sparse), identity_bridges(SHAPE.n_sites, SHAPE.d_model)
    metrics = evaluate(dense, sparse, bridges, tokens, progress=False)
    for site in metrics["sites"]:
        assert site["nmse_encode"] == 0
        assert site["nmse_decode"] == 0
        assert site["explained_variance_encode"] == 1
        assert site["kl_dense_to_sparse"] == 0
        assert site["kl_sparse_to_dense"] == 0
        assert site["ce_dense_to_sparse"] == site["ce_sparse_to_dense"] == metrics["dense"]["ce"]
        assert site["recovered_dense_to_sparse"] == site["recovered_sparse_to_dense"] == 1
    for path in itertools.product(("dense", "sparse"), repeat=4):
        assert torch.equal(mixed_path(dense, sparse, bridges, tokens, path), dense(tokens))


def test_suffix_from_every_site_is_the_full_hf_model(tmp_path: Path) -> None:
    run = make_tiny_run(tmp_path / "run")
    tokens = torch.randint(384, (2, 20))
    full = run.dense.hf(tokens).logits
    for site, resid in enumerate(residuals(run.dense, tokens)):
        assert torch.equal(suffix(run.dense, site, resid, tokens), full)
    full = run.sparse(tokens)
    for site, resid in enumerate(residuals(run.sparse, tokens)):
        assert torch.equal(suffix(run.sparse, site, resid, tokens), full)


def test_residual_sparsification_is_part_of_the_suffix(tokens: torch.Tensor) -> None:
    """A hybrid must run the same model as the forward pass, resid_post AbsTopK included."""
    shape = SparseConfig(
        **{**SHAPE.__dict__, "topk_locations": (*SHAPE.topk_locations, "resid_post_attn", "resid_post_mlp")}
    )
    model = SparseTransformer(shape)
    for site, resid in enumerate(residuals(model, tokens)):
        assert torch.equal(suffix(model, site, resid, tokens), model(tokens))


def test_dense_is_causal_frozen_and_always_in_eval_mode(tmp_path: Path) -> None:
    dense = make_tiny_run(tmp_path / "run").dense
    dense.hf.config.resid_pdrop = 0.5
    dense.train()
    assert not any(m.training for m in dense.modules())
    assert not any(p.requires_grad for p in dense.parameters())
    tokens = torch.randint(384, (1, 20))
    changed = tokens.clone()
    changed[0, -1] += 1
    changed %= 384
    assert torch.equal(dense(tokens)[:, :-1], dense(changed)[:, :-1])


def test_mixed_path_crosses_through_the_right_bridges(tokens: torch.Tensor) -> None:
    torch.manual_seed(3)
    dense, sparse = SparseTransformer(SHAPE), SparseTransformer(SHAPE)
    bridges = BridgeSet(SHAPE.n_sites, 16, 16, 4)
    h = dense.sublayer(0, dense.embed(tokens))
    h = sparse.sublayer(2, sparse.sublayer(1, bridges.encode(1, h)))
    h = dense.sublayer(3, bridges.decode(3, h))
    expected = sparse.unembed(bridges.encode(4, h), tokens)
    got = mixed_path(dense, sparse, bridges, tokens, ("dense", "sparse", "sparse", "dense"), end="sparse")
    assert torch.equal(got, expected)
    with pytest.raises(ValueError, match="each of 4 sublayers"):
        mixed_path(dense, sparse, bridges, tokens, ("dense", "sparse"))


def naive_loss(
    dense: DenseModel,
    sparse: SparseTransformer,
    bridges: BridgeSet,
    tokens: torch.Tensor,
    drawn: Draw,
    weights: LossWeights,
) -> torch.Tensor:
    """The summed loss of the paper in one graph, written down term by term."""
    through = weights.nmse_through_target
    h_dense, h_sparse = residuals(dense, tokens), residuals(sparse, tokens)
    target = dense(tokens).detach()
    loss = weights.ce * next_token_loss(sparse(tokens), tokens)
    n, at = bridges.n_sites, drawn.positions
    for i in range(n):
        f, g = bridges.encode(i, h_dense[i]), bridges.decode(i, h_sparse[i])
        loss = (
            loss
            + weights.nmse_encode * nmse(f, h_sparse[i], through_target=through)
            + weights.nmse_decode * nmse(g, h_dense[i])
        )
        if i in drawn.to_sparse:
            term = kl(target[:, at], suffix(sparse, i, f, tokens)[:, at])
            loss = loss + weights.kl_dense_to_sparse * n / len(drawn.to_sparse) * term
        if i in drawn.to_dense:
            term = kl(target[:, at], suffix(dense, i, g, tokens)[:, at])
            loss = loss + weights.kl_sparse_to_dense * n / len(drawn.to_dense) * term
    return loss


@pytest.mark.parametrize("through_target", [False, True])
@pytest.mark.parametrize(("to_sparse", "to_dense"), [(range(5), range(5)), ([1], [3]), ([0, 4], [2])])
def test_gradient_equals_that_of_one_naive_graph(
    tmp_path: Path, to_sparse: list[int], to_dense: list[int], through_target: bool
) -> None:
    weights = dataclasses.replace(WEIGHTS, nmse_through_target=through_target)
    run = make_tiny_run(tmp_path / "run")
    dense, sparse, bridges = run.dense.double(), run.sparse.double(), run.bridges.double()
    tokens = torch.randint(384, (2, 10))
    drawn = Draw(list(to_sparse), list(to_dense), torch.tensor([1, 4, 9]))
    parameters = [*sparse.parameters(), *bridges.parameters()]
    wanted = torch.autograd.grad(naive_loss(dense, sparse, bridges, tokens, drawn, weights), parameters)
    joint_backward(dense, sparse, bridges, tokens, drawn, weights)
    for p, grad in zip(parameters, wanted, strict=True):
        assert p.grad is not None
        assert (p.grad - grad).norm() <= 1e-9 * grad.norm().clamp(min=1e-12)
    assert all(p.grad is None for p in dense.parameters())


def test_sampling_one_site_is_unbiased(tmp_path: Path) -> None:
    """The mean gradient over all draws of one site per direction is the gradient of the full sum."""
    run = make_tiny_run(tmp_path / "run")
    dense, sparse, bridges = run.dense.double(), run.sparse.double(), run.bridges.double()
    tokens, at = torch.randint(384, (2, 8)), torch.arange(8)
    parameters = [*sparse.parameters(), *bridges.parameters()]

    def gradient(draws: list[Draw]) -> torch.Tensor:
        for p in parameters:
            p.grad = None
        for d in draws:
            joint_backward(dense, sparse, bridges, tokens, d, WEIGHTS)
        return torch.cat([p.grad.flatten() for p in parameters]) / len(draws)

    full = gradient([Draw(range(5), range(5), at)])
    mean = gradient([Draw([i], [i], at) for i in range(5)])
    assert (full - mean).norm() <= 1e-9 * full.norm()


def test_draws_are_uniform_and_a_function_of_seed_and_step() -> None:
    config = BridgeConfig(sites=2, kl_positions=0.5)
    counts = torch.zeros(5)
    for step in range(500):
        drawn = draw(config, 5, 8, seed=1, step=step)
        assert len(set(drawn.to_sparse)) == 2
        assert len(drawn.positions) == 4
        counts[drawn.to_sparse] += 1
    assert (counts / 200 - 1).abs().max() < 0.2
    assert draw(config, 5, 8, 1, 7).to_dense == draw(config, 5, 8, 1, 7).to_dense
    assert draw(BridgeConfig(sites="all"), 5, 8, 0, 0).to_sparse == list(range(5))


def test_moments_do_not_depend_on_the_batches() -> None:
    prediction, target = torch.randn(6, 5, 3), torch.randn(6, 5, 3) + 2
    whole, parts = Moments(), Moments()
    whole.add(prediction, target)
    for p, t in zip(prediction.split(2), target.split(2), strict=True):
        parts.add(p, t)
    assert whole.nmse() == pytest.approx(parts.nmse())
    assert whole.nmse() == pytest.approx(nmse(prediction, target).item(), rel=1e-5)
    shifted = Moments()
    shifted.add(target + 3, target)
    assert shifted.explained_variance() == pytest.approx(1)
    assert shifted.nmse() > 1

"""Hybrids and the joint step: identity bridges, exactness of suffixes, gradients against one naive graph."""

import copy
import dataclasses
import itertools
from collections import Counter
from pathlib import Path

import pytest
import torch
from support.helpers import make_tiny_run
from torch import nn

from bridges.bridge import BridgeSet
from bridges.config import BridgeConfig, LossWeights
from bridges.dense import DenseModel
from bridges.evaluation import Moments, evaluate
from bridges.hybrid import first_crossing, kind, mixed_path, residuals, single_crossing, suffix
from bridges.joint_step import Draw, draw, joint_backward
from bridges.losses import kl, nmse
from bridges.run_folder import Run
from sparse_model.config import SparseConfig
from sparse_model.model.transformer import SparseTransformer
from sparse_model.training.losses import next_token_loss

SHAPE = SparseConfig(d_model=16, d_mlp=32, n_heads=2, d_head=8, n_ctx=12, d_vocab=40)
WEIGHTS = LossWeights(ce=0.7, nmse_encode=1.3, nmse_decode=0.4, kl_dense_to_sparse=0.6, kl_sparse_to_dense=1.1)
CONFIG = BridgeConfig(weights=WEIGHTS)


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
    assert metrics["paths"] == {"n": 64, "kl": 0}
    for path in itertools.product(("dense", "sparse"), repeat=6):
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
    got = mixed_path(dense, sparse, bridges, tokens, ("dense", "dense", "sparse", "sparse", "dense", "sparse"))
    assert torch.equal(got, expected)
    with pytest.raises(ValueError, match="each of 6 parts"):
        mixed_path(dense, sparse, bridges, tokens, ("dense", "sparse"))


def test_the_path_of_one_crossing_is_the_suffix_after_the_bridge(tokens: torch.Tensor) -> None:
    dense, sparse = SparseTransformer(SHAPE), SparseTransformer(SHAPE)
    bridges = BridgeSet(SHAPE.n_sites, 16, 16, 4)
    for i, h in enumerate(residuals(dense, tokens)):
        path = single_crossing(SHAPE.n_sites, i, "dense")
        assert (kind(path), first_crossing(path)) == ("dense_to_sparse", i)
        expected = suffix(sparse, i, bridges.encode(i, h), tokens)
        assert torch.equal(mixed_path(dense, sparse, bridges, tokens, path), expected)
    for i, h in enumerate(residuals(sparse, tokens)):
        path = single_crossing(SHAPE.n_sites, i, "sparse")
        assert (kind(path), first_crossing(path)) == ("sparse_to_dense", i)
        expected = suffix(dense, i, bridges.decode(i, h), tokens)
        assert torch.equal(mixed_path(dense, sparse, bridges, tokens, path), expected)


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
    for i in range(bridges.n_sites):
        f, g = bridges.encode(i, h_dense[i]), bridges.decode(i, h_sparse[i])
        loss = loss + weights.nmse_encode * nmse(f, h_sparse[i], through_target=through)
        loss = loss + weights.nmse_decode * nmse(g, h_dense[i])
    for path, weight in drawn.hybrids:
        logits = mixed_path(dense, sparse, bridges, tokens, path)
        loss = loss + weight * kl(target[:, drawn.positions], logits[:, drawn.positions])
    return loss


S, D = "sparse", "dense"
DRAWS = {
    "every single crossing": draw(BridgeConfig(sites="all", weights=WEIGHTS), 5, 10, 0, 0).hybrids,
    "one per direction": draw(BridgeConfig(sites=1, weights=WEIGHTS), 5, 10, 3, 1).hybrids,
    "at the ends": [(single_crossing(5, 0, D), 0.3), (single_crossing(5, 4, S), 2.0), (single_crossing(5, 4, D), 1.0)],
    "mixed": [((S, D, S, D, S, D), 0.7), ((D, D, S, S, D, S), 1.5), ((S, S, S, D, D, S), 1.0)],
    "no crossing": [((S,) * 6, 0.8)],
}


@pytest.mark.parametrize(
    "memory",
    [
        {},
        {"logits_at_once": 384 * 4, "hybrid_batch": 2},
        {"logits_at_once": 384 * 4, "checkpointing": True},
        {"logits_at_once": 1, "hybrid_batch": 1},
        {"together": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("through_target", [False, True])
@pytest.mark.parametrize("hybrids", DRAWS.values(), ids=DRAWS)
def test_gradient_equals_that_of_one_naive_graph(
    tmp_path: Path, hybrids: list, through_target: bool, memory: dict
) -> None:
    weights = dataclasses.replace(WEIGHTS, nmse_through_target=through_target)
    together = memory.get("together", False)
    config = BridgeConfig(weights=weights, **{name: value for name, value in memory.items() if name != "together"})
    run = make_tiny_run(tmp_path / "run")
    dense, sparse, bridges = run.dense.double(), run.sparse.double(), run.bridges.double()
    tokens = torch.randint(384, (3, 10))
    drawn = Draw(hybrids, torch.tensor([1, 4, 9]))
    parameters = [*sparse.parameters(), *bridges.parameters()]
    loss = naive_loss(dense, sparse, bridges, tokens, drawn, weights)
    wanted = torch.autograd.grad(loss, parameters)
    losses = joint_backward(dense, sparse, bridges, tokens, drawn, config, scale=2.0, together=together)
    for p, grad in zip(parameters, wanted, strict=True):
        assert p.grad is not None
        assert (p.grad - 2 * grad).norm() <= 1e-9 * grad.norm().clamp(min=1e-12)
    assert all(p.grad is None for p in dense.parameters())
    again = weights.ce * losses.ce + weights.nmse_encode * losses.nmse_encode.sum()
    again = again + weights.nmse_decode * losses.nmse_decode.sum()
    for name in ("dense_to_sparse", "sparse_to_dense", "mixed"):
        total = sum(weight for path, weight in hybrids if kind(path) == name)
        value = getattr(losses, f"kl_{name}")
        assert (value is None) == (total == 0)
        if len({weight for path, weight in hybrids if kind(path) == name}) == 1:
            again = again + total * value
        elif total:
            return  # the mean over hybrids of unequal weights does not give the sum back
    assert again.item() == pytest.approx(loss.item(), rel=1e-9)


def gradient_of(run: Run, tokens: torch.Tensor, draws: list[Draw]) -> torch.Tensor:
    """The mean gradient over draws."""
    parameters = [*run.sparse.parameters(), *run.bridges.parameters()]
    for p in parameters:
        p.grad = None
    for drawn in draws:
        joint_backward(run.dense, run.sparse, run.bridges, tokens, drawn, CONFIG)
    return torch.cat([p.grad.flatten() for p in parameters]) / len(draws)


def test_a_dense_model_in_bf16_beside_fp32_master_weights(tmp_path: Path) -> None:
    run = make_tiny_run(tmp_path / "run")
    tokens = torch.randint(384, (2, 10))
    drawn = draw(BridgeConfig(sites="all"), 5, 10, 0, 0)
    exact = residuals(run.dense, tokens)
    full = joint_backward(run.dense, run.sparse, run.bridges, tokens, drawn, CONFIG)
    half = run.dense.bfloat16()
    for a, b in zip(residuals(half, tokens), exact, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)
    losses = joint_backward(half, run.sparse, run.bridges, tokens, drawn, CONFIG)
    for name in ("kl_dense_to_sparse", "kl_sparse_to_dense", "nmse_encode", "nmse_decode"):
        torch.testing.assert_close(getattr(losses, name), getattr(full, name), rtol=0.05, atol=0.02)
    assert {p.grad.dtype for p in (*run.sparse.parameters(), *run.bridges.parameters())} == {torch.float32}


def test_sampling_one_site_is_unbiased(tmp_path: Path) -> None:
    """The mean gradient over all draws of one site per direction is the gradient of the full sum."""
    run = make_tiny_run(tmp_path / "run")
    run = run._replace(dense=run.dense.double(), sparse=run.sparse.double(), bridges=run.bridges.double())
    tokens, at = torch.randint(384, (2, 8)), torch.arange(8)
    to_sparse, to_dense = WEIGHTS.kl_dense_to_sparse, WEIGHTS.kl_sparse_to_dense

    def crossings(i: int, scale: int) -> list:
        return [(single_crossing(5, i, D), scale * to_sparse), (single_crossing(5, i, S), scale * to_dense)]

    full = gradient_of(run, tokens, [Draw([h for i in range(5) for h in crossings(i, 1)], at)])
    mean = gradient_of(run, tokens, [Draw(crossings(i, 5), at) for i in range(5)])
    assert (full - mean).norm() <= 1e-9 * full.norm()


def test_draws_of_sites_are_uniform_and_a_function_of_seed_and_step() -> None:
    config = BridgeConfig(sites=2, kl_positions=0.5, weights=WEIGHTS)
    counts = torch.zeros(2, 5)
    for step in range(500):
        drawn = draw(config, 5, 8, seed=1, step=step)
        assert len(set(drawn.hybrids)) == 4
        assert len(drawn.positions) == 4
        for path, weight in drawn.hybrids:
            way = int(path[0] == S)
            counts[way, first_crossing(path)] += 1
            assert weight == pytest.approx((WEIGHTS.kl_dense_to_sparse, WEIGHTS.kl_sparse_to_dense)[way] * 5 / 2)
    assert (counts / 200 - 1).abs().max() < 0.2
    same, other = draw(config, 5, 8, 1, 7), draw(config, 5, 8, 1, 7)
    assert same.hybrids == other.hybrids
    assert torch.equal(same.positions, other.positions)
    every = draw(BridgeConfig(sites="all"), 5, 8, 0, 0).hybrids
    assert {path for path, _ in every} == {single_crossing(5, i, side) for i in range(5) for side in (D, S)}


def test_random_paths_are_uniform_over_all_but_the_dense_one() -> None:
    config = BridgeConfig(paths=4, weights=WEIGHTS)
    counts: Counter = Counter()
    for step in range(1000):
        drawn = draw(config, 3, 8, seed=0, step=step)
        counts.update(path for path, _ in drawn.hybrids)
        total = sum(weight for _, weight in drawn.hybrids)
        assert total == pytest.approx(3 * (WEIGHTS.kl_dense_to_sparse + WEIGHTS.kl_sparse_to_dense))
    assert set(counts) == set(itertools.product((D, S), repeat=4)) - {(D,) * 4}
    assert all(0.7 < count / (4000 / 15) < 1.3 for count in counts.values())


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

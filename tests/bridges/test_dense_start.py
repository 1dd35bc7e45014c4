"""A sparse model that begins as the dense model itself."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel

from bridges.bridge import BridgeSet
from bridges.config import PRESETS, BridgeConfig, DenseTrainConfig, RunConfig
from bridges.dense import DenseModel
from bridges.dense_start import (
    begin_as_dense,
    check_dense_start,
    copy_weights,
    sparsest_frame,
    stream_sample,
    stream_weights,
)
from bridges.evaluation import evaluate
from bridges.pipeline import evaluate_run, train_bridge
from bridges.run_folder import open_run
from bridges.shape import fit_to
from sparse_model.config import OptimConfig, SparseConfig, SparsityConfig
from sparse_model.model.transformer import SparseTransformer
from sparse_model.sparsity.abs_topk import abs_topk
from sparse_model.sparsity.projection import annealed_topk

SHAPE = SparseConfig(
    n_layers=2, d_model=16, d_mlp=64, n_heads=2, d_head=8, n_ctx=12, d_vocab=40, positions="learned", topk_fraction=1.0
)
TOKENS = torch.randint(40, (6, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def gpt2() -> GPT2LMHeadModel:
    """Random, gains and biases too, its stream far from centred."""
    config = GPT2Config(
        vocab_size=40,
        n_positions=20,
        n_embd=16,
        n_layer=2,
        n_head=2,
        activation_function="gelu",
        layer_norm_epsilon=1e-7,  # the sparse model's
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(1)
    model = GPT2LMHeadModel(config).eval().requires_grad_(False)
    for p in model.parameters():
        p.add_(torch.randn_like(p) * 0.2 + 0.1)
    return model


@pytest.mark.parametrize("width", [16, 24, 40])
def test_every_logit_and_stream_is_the_dense_models(gpt2: GPT2LMHeadModel, width: int) -> None:
    torch.manual_seed(2)
    sparse = SparseTransformer(dataclasses.replace(SHAPE, d_model=width))
    bridges = BridgeSet(5, 16, width, width)
    frame = begin_as_dense(sparse, bridges, gpt2, TOKENS, SparsityConfig(nonzero_fraction=0.5), progress=False)
    torch.testing.assert_close(frame.T @ frame, torch.eye(16), atol=1e-5, rtol=0)
    torch.testing.assert_close(sparse(TOKENS), gpt2(TOKENS).logits, atol=2e-4, rtol=1e-4)
    figures = evaluate(DenseModel(gpt2), sparse, bridges, TOKENS, progress=False)
    for site in figures["sites"]:
        assert site["nmse_encode"] < 1e-8
        assert site["kl_dense_to_sparse"] < 1e-6
        assert site["kl_sparse_to_dense"] < 1e-6  # what the decoder lacks is the mean over channels: no norm sees it
    assert figures["dense"]["ce"] == pytest.approx(figures["sparse"]["ce"], abs=1e-5)


def test_a_turned_basis_keeps_more_of_reads_and_weights() -> None:
    torch.manual_seed(0)
    turn = torch.linalg.qr(torch.randn(24, 24))[0]

    def sparse_elsewhere(rows: int) -> torch.Tensor:  # in axes that are not the stream's
        return (torch.randn(rows, 24) * (torch.rand(rows, 24) < 0.15)) @ turn

    def lost(x: torch.Tensor, frame: torch.Tensor) -> float:
        return float((abs_topk(x @ frame.T, 6) @ frame - x).square().sum() / x.square().sum())

    reads, weights, axes = sparse_elsewhere(2000), [sparse_elsewhere(50), sparse_elsewhere(80)], torch.eye(24)
    frame = sparsest_frame(reads, weights, 24, 6, 6)
    for x in (reads, *weights):
        assert lost(x, frame) < 0.25 * lost(x, axes)
    torch.testing.assert_close(sparsest_frame(reads, weights, 24, 24, 24), axes)  # nothing is lost there


def test_a_model_in_bfloat16_is_turned_in_float32(gpt2: GPT2LMHeadModel) -> None:
    sparse, turn = SparseTransformer(SHAPE), torch.linalg.qr(torch.randn(16, 16))[0]
    copy_weights(sparse, gpt2.bfloat16(), turn)
    body: Any = gpt2.transformer
    centred = body.wte.weight.float() - body.wte.weight.float().mean(1, keepdim=True)
    torch.testing.assert_close(sparse.token_embed.weight.detach(), centred @ turn.T)


def test_reads_are_sampled_at_every_site_a_sublayer_reads(gpt2: GPT2LMHeadModel) -> None:
    rows = stream_sample(gpt2, TOKENS)
    assert rows.shape == (4 * TOKENS.numel(), 16)
    torch.testing.assert_close(rows.square().mean(1), torch.ones(len(rows)), atol=1e-3, rtol=0)


def test_neurons_of_every_matrix_at_the_stream_count_alike(gpt2: GPT2LMHeadModel) -> None:
    found = stream_weights(gpt2)
    assert [len(w) for w in found] == [40, 40] + 2 * [48, 16, 64, 64]
    for w in found:
        torch.testing.assert_close(w.square().mean(), torch.ones(()))
    body: Any = gpt2.transformer
    gained = body.h[1].mlp.c_fc.weight[:, 3] * body.h[1].ln_2.weight
    torch.testing.assert_close(torch.nn.functional.cosine_similarity(found[8][3], gained, dim=0), torch.ones(()))


def test_a_bigram_table_made_of_counts_is_taken_out(gpt2: GPT2LMHeadModel) -> None:
    sparse = SparseTransformer(SHAPE)
    sparse.bigram.data.fill_(1.0)
    copy_weights(sparse, gpt2, torch.eye(16))
    assert not sparse.bigram.any()


def test_a_tied_head_without_biases_of_norms_is_the_plain_gpt2(gpt2: GPT2LMHeadModel) -> None:
    sparse = SparseTransformer(SHAPE)
    copy_weights(sparse, gpt2, torch.eye(16))
    body: Any = gpt2.transformer
    centred = body.wte.weight - body.wte.weight.mean(1, keepdim=True)
    assert torch.equal(sparse.token_embed.weight, centred)
    torch.testing.assert_close(sparse.unembedding.weight, body.wte.weight * body.ln_f.weight)
    assert len(sparse.pos_embed.weight) == 12  # of the dense model's twenty


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": 8}, "sparse.d_model=8: the dense model's stream does not fit: use 16"),
        ({"n_heads": 4, "d_head": 4}, "sparse.n_heads=4: a sparse model that begins as the dense one .* use 2"),
        ({"d_mlp": 32}, "sparse.d_mlp=32: .* use 64"),
        ({"positions": "none"}, "sparse.positions='none': .* use learned"),
        ({"act_fn": "relu"}, "sparse.act_fn='relu': .* use gelu"),
        ({"tied": True}, "sparse.tied=True: .* use False"),
        ({"bias": False}, "sparse.bias=False: .* use True"),
    ],
)
def test_another_shape_is_refused(gpt2: GPT2LMHeadModel, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_dense_start(dataclasses.replace(SHAPE, **changes), gpt2.config)


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_other_families_are_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=f"the dense model is a '{kind}' model with .* can begin as a GPT-2 with gelu"):
        check_dense_start(SHAPE, AutoConfig.for_model(kind))


JOINT = RunConfig(
    corpus_tokens=2000,
    batch_size=2,
    eval_tokens=64,
    steps=1,
    start_from="dense",
    sparse=SparseConfig(
        n_layers=1, d_model=16, d_mlp=64, n_heads=2, d_head=8, n_ctx=16, d_vocab=300, positions="learned", bigram="none"
    ),
    sparsity=SparsityConfig(nonzero_fraction=1.0, anneal_stop=0.0),
    optim=OptimConfig(lr=1e-9),
    bridge=BridgeConfig(lr=1e-9, encoder_topk=1.0),
    dense_train=DenseTrainConfig(d_model=16, n_heads=2, steps=1, batch_size=2),
)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPARSE_BRIDGES_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("here")
def test_a_run_begins_there() -> None:
    everything = dataclasses.replace(JOINT.sparse, topk_fraction=1.0)
    figures = train_bridge(dataclasses.replace(JOINT, sparse=everything), "run", progress=False)
    assert figures["sparse"]["ce"] == pytest.approx(figures["dense"]["ce"], abs=2e-3)  # tanh GELU, another epsilon
    assert all(site["nmse_encode"] < 1e-4 and site["kl_dense_to_sparse"] < 1e-3 for site in figures["sites"])
    run = open_run("run")
    assert run.config.start_from == "dense"
    assert run.sparse.logits_bias.any()  # the final norm's bias
    assert evaluate_run(run, progress=False)["sparse"]["ce"] == pytest.approx(figures["sparse"]["ce"], abs=1e-5)


@pytest.mark.usefixtures("here")
def test_what_a_killed_start_left_is_not_taken_for_the_dense_model() -> None:
    """A checkpoint alone, without the configuration: neither random weights nor the dense model go on from it."""
    Path("run/checkpoint").mkdir(parents=True)
    with pytest.raises(FileExistsError, match="run holds the unfinished training of a sparse model: add --resume"):
        train_bridge(JOINT, "run", progress=False)


@pytest.mark.usefixtures("here")
def test_a_shape_that_cannot_is_refused_before_anything_is_written() -> None:
    wrong = dataclasses.replace(JOINT, dense_train=dataclasses.replace(JOINT.dense_train, n_heads=4))
    with pytest.raises(ValueError, match=r"sparse.n_heads=2: .* use 4"):
        train_bridge(wrong, "run", progress=False)
    assert not Path("run").exists()


@pytest.mark.usefixtures("here")
def test_activations_are_taken_away_over_the_first_steps_and_the_trained_model_has_its_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shares: list[tuple[float, int]] = []
    keep, sparsity = SparseTransformer.keep_activations, SparsityConfig(nonzero_fraction=0.5, topk_anneal_stop=0.5)

    def spy(self: SparseTransformer, fraction: float) -> None:
        keep(self, fraction)
        shares.append((fraction, sum(m.topk_fraction == fraction for m in (self.blocks[0].attn, self.blocks[0].mlp))))  # type: ignore[union-attr]

    monkeypatch.setattr(SparseTransformer, "keep_activations", spy)
    bridge = dataclasses.replace(JOINT.bridge, encoder_topk=0.5)
    train_bridge(dataclasses.replace(JOINT, steps=4, sparsity=sparsity, bridge=bridge), "run", progress=False)
    assert shares == [(pytest.approx(0.5), 2), (0.25, 2), (0.25, 2), (0.25, 2)]
    assert open_run("run").bridges.encoder_k == 8


def test_the_share_falls_evenly_in_its_logarithm() -> None:
    config = SparsityConfig(topk_anneal_stop=0.4)
    assert [annealed_topk(0.25, config, p) for p in (0.0, 0.2, 0.4, 0.7, 1.0)] == [1.0, 0.5, 0.25, 0.25, 0.25]
    assert annealed_topk(0.25, SparsityConfig(), 0.0) == 0.25


def test_a_share_out_of_range_and_compilation_are_refused() -> None:
    with pytest.raises(ValueError, match=r"topk_anneal_stop=1.5: must lie in \[0, 1\]"):
        SparsityConfig(topk_anneal_stop=1.5)
    with pytest.raises(ValueError, match="compile=True: every share of AbsTopK would be compiled anew"):
        RunConfig(compile=True, sparsity=SparsityConfig(topk_anneal_stop=0.5))


def test_the_shape_and_gentle_rates_follow_from_the_dense_model() -> None:
    dense = AutoConfig.for_model("gpt2", n_layer=8, n_embd=256, n_head=8, vocab_size=9669, n_positions=512)
    config = fit_to(RunConfig(start_from="dense"), dense)
    shape = config.sparse
    assert (shape.n_layers, shape.d_model, shape.d_mlp, shape.n_heads, shape.d_head) == (8, 256, 1024, 8, 32)
    assert (shape.positions, shape.bigram, shape.d_vocab, shape.n_ctx) == ("learned", "none", 9669, 512)
    check_dense_start(shape, dense)
    assert config.optim.lr < PRESETS["demo"][1].optim.lr
    assert config.bridge.lr < PRESETS["demo"][1].bridge.lr
    assert config.sparsity.topk_anneal_stop > 0
    llama = AutoConfig.for_model("llama")
    assert fit_to(RunConfig(start_from="dense"), llama) == RunConfig(start_from="dense")
    assert math.isclose(fit_to(RunConfig(start_from="dense", optim=OptimConfig(lr=0.1)), dense).optim.lr, 1e-3)

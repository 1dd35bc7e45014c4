"""The bigram table that counting gives: probabilities by hand, and the loss of a model that has nothing else."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from bridges.config import DenseTrainConfig, RunConfig
from bridges.pipeline import train_bridge
from sparse_model.config import SparseConfig, SparsityConfig
from sparse_model.data.prepare import prepare_corpus
from sparse_model.data.tokenizer import load_tokenizer
from sparse_model.model.checkpoint import load_sparse
from sparse_model.model.transformer import SparseTransformer
from sparse_model.training.bigram_counts import PRIOR, bigram_logits, count_bigrams
from sparse_model.training.losses import next_token_loss
from sparse_model.training.pretrain import PretrainConfig, pretrain


def test_probabilities_by_hand() -> None:
    blocks = torch.tensor([[0, 1, 0, 1], [0, 2, 2, 2]], dtype=torch.int16)
    p = bigram_logits(blocks, 4).softmax(1)
    overall = torch.tensor([1 + 1, 2 + 1, 3 + 1, 0 + 1]) / 10  # 01 10 01, 02 22 22; never across blocks
    torch.testing.assert_close(p[0], (torch.tensor([0.0, 2, 1, 0]) + PRIOR * overall) / (3 + PRIOR))
    torch.testing.assert_close(p[2], (torch.tensor([0.0, 0, 2, 0]) + PRIOR * overall) / (2 + PRIOR))
    torch.testing.assert_close(p[3], overall)


def test_a_model_of_nothing_else_has_the_entropy_of_its_text() -> None:
    torch.manual_seed(0)
    following = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [1 / 3, 1 / 3, 1 / 3]])
    tokens = [torch.randint(3, (400,))]
    for _ in range(15):
        tokens.append(torch.multinomial(following[tokens[-1]], 1)[:, 0])
    blocks = torch.stack(tokens, 1)
    shape = SparseConfig(n_layers=1, d_model=16, d_mlp=16, n_heads=1, d_head=8, n_ctx=16, d_vocab=3)
    config = PretrainConfig(sparse=shape, bigram_init="counts")
    model = SparseTransformer(shape)
    with torch.no_grad():
        model.unembedding.weight.zero_()
        assert next_token_loss(model(blocks), blocks).item() == pytest.approx(math.log(3), rel=1e-6)
        count_bigrams(model, dataclasses.replace(config, bigram_init="zeros"), blocks)
        assert not model.bigram.any()
        count_bigrams(model, config, blocks)
        share = torch.bincount(blocks[:, :-1].flatten(), minlength=3) / blocks[:, :-1].numel()
        entropy = -(share * (following * following.log()).sum(1)).sum()
        assert abs(next_token_loss(model(blocks), blocks) - entropy) < 0.02
    none = dataclasses.replace(config, sparse=dataclasses.replace(shape, bigram="none"))
    count_bigrams(SparseTransformer(none.sparse), none, blocks)


def test_both_trainings_begin_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSE_BRIDGES_CACHE", str(tmp_path / "cache"))
    shape = SparseConfig(n_layers=1, d_model=16, d_mlp=16, n_heads=1, d_head=8, n_ctx=16, d_vocab=300)
    small = {"corpus_tokens": 2000, "steps": 1, "batch_size": 2, "eval_tokens": 32, "sparse": shape}
    small |= {"sparsity": SparsityConfig(nonzero_fraction=0.5), "bigram_init": "counts"}
    alone, beside = PretrainConfig(**small), RunConfig(**small, dense_train=DenseTrainConfig(steps=1, batch_size=2))
    pretrain(alone, tmp_path / "alone", progress=False)
    train_bridge(beside, tmp_path / "beside", progress=False)
    for folder, config in (("alone", alone), ("beside", beside)):
        tokenizer = load_tokenizer(tmp_path / folder / "tokenizer")
        counted = bigram_logits(prepare_corpus(config, tokenizer, progress=False).train, 300)
        table = load_sparse(tmp_path / folder / "sparse").bigram
        assert counted.std() > 0.1
        assert (table - counted).abs().max() < 0.02  # what one step can do

"""A joint training that begins with a sparse model trained alone."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from bridges.config import DenseTrainConfig, RunConfig
from bridges.packaged import FOLDER
from bridges.pipeline import train_bridge
from bridges.run_folder import open_run
from sparse_model.config import OptimConfig, SparseConfig, SparsityConfig
from sparse_model.model.checkpoint import load_sparse
from sparse_model.training.pretrain import PretrainConfig, pretrain

SHAPE = SparseConfig(n_layers=1, d_model=16, d_mlp=16, n_heads=1, d_head=8, n_ctx=16, d_vocab=300)
SMALL: dict[str, Any] = {
    "corpus_tokens": 2000,
    "batch_size": 2,
    "eval_tokens": 32,
    "sparse": SHAPE,
    "sparsity": SparsityConfig(nonzero_fraction=0.25, anneal_stop=0.0),
}
JOINT = RunConfig(
    **SMALL,
    steps=1,
    start_from="alone",
    tokenizer="alone/tokenizer",
    optim=OptimConfig(lr=1e-7),
    dense_train=DenseTrainConfig(d_model=8, n_heads=1, steps=1, batch_size=2),
)


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPARSE_BRIDGES_CACHE", str(tmp_path / "cache"))
    pretrain(PretrainConfig(**SMALL, steps=4), Path("alone"), progress=False)


def test_it_begins_with_those_weights_and_goes_on_without_them() -> None:
    train_bridge(JOINT, "joint", progress=False)
    start, end = load_sparse(Path("alone/sparse")), load_sparse(Path("joint/sparse"))
    for (name, before), after in zip(start.named_parameters(), end.parameters(), strict=True):
        if name != "bigram":  # it is trained with the bridges' learning rate
            assert torch.allclose(before, after, atol=1e-4), name
    assert not torch.equal(start.bigram, end.bigram)
    shutil.rmtree("alone")
    assert train_bridge(JOINT, "joint", resume=True, progress=False)["sites"]


def test_both_models_may_be_those_of_a_packaged_bundle() -> None:
    demo = open_run(FOLDER / "demo")
    config = dataclasses.replace(
        JOINT, dense="demo", start_from="demo", tokenizer=None, sparse=demo.config.sparse, eval_tokens=128
    )
    train_bridge(config, "joint", progress=False)
    joint = open_run("joint")
    assert joint.config.dense == "demo"
    for name, t in demo.dense.state_dict().items():
        assert torch.equal(joint.dense.state_dict()[name], t), name
    for old, new in zip(demo.sparse.sparse_parameters(1.0), joint.sparse.sparse_parameters(1.0), strict=True):
        assert torch.allclose(old.tensor, new.tensor, atol=1e-4), old


def test_another_shape_or_tokenizer_and_a_folder_without_one_are_refused_before_anything_is_written() -> None:
    pretrain(PretrainConfig(**SMALL | {"corpus": "stdlib"}, steps=1), Path("other"), progress=False)
    for changes, message in (
        ({"sparse": dataclasses.replace(SHAPE, d_mlp=32)}, "start_from=alone has sparse.d_mlp=16: give the same shape"),
        ({"start_from": "nowhere"}, "no trained sparse model is in nowhere/sparse; train one with .* --run nowhere"),
        ({"start_from": "other"}, "token ids would mean different text"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            train_bridge(dataclasses.replace(JOINT, **changes), "run", progress=False)
        assert not Path("run").exists()

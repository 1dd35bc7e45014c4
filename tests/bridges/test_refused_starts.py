"""A start that is refused leaves no trace: the corrected command finds the folder as it was, and starts."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.helpers import TINY_VOCAB, digests, make_tiny_run, tiny_tokenizer

from bridges.config import DenseTrainConfig, RunConfig
from bridges.loading import load_lm
from bridges.pipeline import make_dense, train_bridge
from sparse_model.config import SparseConfig, SparsityConfig, TrainConfig
from sparse_model.data.tokenizer import save_tokenizer, train_tokenizer
from sparse_model.training.pretrain import PretrainConfig, pretrain

SHAPE = SparseConfig(d_model=16, d_mlp=32, n_heads=2, d_head=8, n_ctx=16, d_vocab=TINY_VOCAB)
SMALL: dict[str, Any] = {
    "corpus_tokens": 2000,
    "steps": 1,
    "batch_size": 2,
    "eval_tokens": 32,
    "sparse": SHAPE,
    "sparsity": SparsityConfig(nonzero_fraction=0.25),
}


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with good and bad tokenizers, dense models and texts; its own cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPARSE_BRIDGES_CACHE", str(tmp_path / "cache"))
    save_tokenizer(tiny_tokenizer(), "tokenizer")
    save_tokenizer(train_tokenizer(["print('one'), print('two')\n" * 20], 270), "other-tokenizer")
    make_tiny_run(Path("deep"), n_layers=3)
    make_tiny_run(Path("good"))
    shutil.copytree("good/dense", "bare")
    Path("bare/tokenizer.json").unlink()
    shutil.copytree("good/dense", "damaged")
    weights = Path("damaged/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:500])
    Path("empty").mkdir()
    Path("short.txt").write_text("a line\nand another\n")
    Path("rows.jsonl").write_text('{"words": "none of the fields"}\n')
    return tmp_path


CORPORA: list[tuple[dict[str, Any], str]] = [
    ({"corpus": "./no-such-folder"}, "no-such-folder"),
    ({"corpus": "empty"}, "holds no usable"),
    ({"corpus": "generated:many"}, "is not a positive number"),
    ({"corpus": "generated,generated"}, "twice"),
    ({"corpus": "no-such-dataset"}, "neither built in nor a local path"),
    ({"corpus": "short.txt"}, "n_ctx=16 is larger than"),
    ({"corpus": "rows.jsonl"}, "set text_field to one of words"),
    ({"tokenizer": "./no-such-tokenizer"}, "no tokenizer at ./no-such-tokenizer"),
    ({"tokenizer": "no-such-tokenizer"}, "cannot load tokenizer"),
    ({"sparse": dataclasses.replace(SHAPE, d_vocab=300)}, "sparse.d_vocab=300: the tokenizer has 384 tokens"),
    ({"tokenizer": None, "sparse": dataclasses.replace(SHAPE, d_vocab=100)}, "vocab_size=100 is too small"),
    ({"sparsity": SparsityConfig(min_per_neuron=40)}, "min_per_neuron=40"),
]
DENSE: list[tuple[dict[str, Any], str]] = [
    ({"dense": "./nowhere"}, "nowhere"),
    ({"dense": "no-such-model"}, "could not load a language model from 'no-such-model'"),
    ({"dense": "bare", "tokenizer": None}, "bare has no tokenizer \\(no tokenizer.json"),
    ({"dense": "damaged"}, "damaged/model.safetensors is damaged or truncated"),
    ({"dense": "deep/dense"}, "sparse.n_layers=2: the dense model has 3 layers"),
    ({"dense": "good/dense", "sparse": dataclasses.replace(SHAPE, d_vocab=400)}, "vocabulary has 384 tokens: use 384"),
    ({"dense": "good/dense", "sparse": dataclasses.replace(SHAPE, n_ctx=128)}, "context holds 64 tokens"),
    ({"dense": "good/dense", "tokenizer": "other-tokenizer"}, "token ids would mean different text"),
]
HOW: list[tuple[dict[str, Any], str]] = [
    ({"processes": 2}, "processes=2: 1 took part"),
    ({"trackers": ("no-such-tracker",)}, "no-such-tracker"),
]


def refuse(start: Callable[..., object], config: TrainConfig, cases: list[tuple[dict[str, Any], str]]) -> None:
    for changes, message in cases:
        with pytest.raises((ValueError, OSError), match=message):
            start(dataclasses.replace(config, **changes), Path("run"), progress=False)
        assert not Path("run").exists(), changes


def refuse_how(start: Callable[..., object], config: TrainConfig) -> None:
    for how, message in HOW:
        with pytest.raises(ValueError, match=message):
            start(config, Path("run"), progress=False, **how)
        assert not Path("run").exists(), how
    Path("run").write_text("a file")
    with pytest.raises(FileExistsError, match="run is a file"):
        start(config, Path("run"), progress=False)
    assert Path("run").read_text() == "a file"
    Path("run").unlink()


def test_train_bridge(places: Path) -> None:
    config = RunConfig(**SMALL, tokenizer="tokenizer", dense_train=DenseTrainConfig(d_model=16, n_heads=2, steps=1))
    refuse(train_bridge, config, CORPORA + DENSE)
    refuse_how(train_bridge, config)
    config = dataclasses.replace(config, dense="good/dense")
    assert train_bridge(config, Path("run"), progress=False)["sites"]
    before = digests(Path("run"))
    with pytest.raises(FileExistsError, match="already holds a run"):
        train_bridge(config, Path("run"), progress=False)
    with pytest.raises(ValueError, match=r"other settings \(seed\)"):
        train_bridge(dataclasses.replace(config, seed=1), Path("run"), resume=True, progress=False)
    assert digests(Path("run")) == before


def test_train_sparse(places: Path) -> None:
    config = PretrainConfig(**SMALL, tokenizer="tokenizer")
    refuse(pretrain, config, CORPORA)
    refuse_how(pretrain, config)
    assert pretrain(config, Path("run"), progress=False)["val_ce"] > 0
    before = digests(Path("run"))
    with pytest.raises(FileExistsError, match="already holds a run"):
        pretrain(config, Path("run"), progress=False)
    assert digests(Path("run")) == before


def test_train_dense_and_the_bridges_of_another_depth_on_top_of_it(places: Path) -> None:
    config = RunConfig(**SMALL, tokenizer="tokenizer", dense_train=DenseTrainConfig(d_model=16, n_heads=2, steps=1))
    refuse(make_dense, config, CORPORA + DENSE)
    assert make_dense(config, Path("run"), progress=False) > 0
    before = digests(Path("run"))
    deeper = dataclasses.replace(config, sparse=dataclasses.replace(SHAPE, n_layers=3))
    for start in (train_bridge, make_dense):
        with pytest.raises(ValueError, match=r"sparse\.n_layers=3: the dense model has 2 layers"):
            start(deeper, Path("run"), progress=False)
        assert digests(Path("run")) == before
    train_bridge(config, Path("run"), progress=False)
    assert {name: d for name, d in digests(Path("run")).items() if name.startswith("dense/")} == {
        name: d for name, d in before.items() if name.startswith("dense/")
    }
    assert load_lm(Path("run/dense")).config.n_layer == 2

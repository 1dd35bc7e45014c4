"""A run that is stopped in any stage, by any of the signals, says what is lost and resumes to the same weights.

One that is begun again with other text, tokenizer, dense model or processes than it was begun with is refused.
"""

import dataclasses
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from support.helpers import digests, make_tiny_run

import bridges.pipeline
import bridges.run_folder
from bridges.config import DenseTrainConfig, RunConfig
from bridges.dense_training import DENSE_CHECKPOINT, _DenseTraining
from bridges.joint_trainer import JointTrainer
from bridges.pipeline import make_dense, train_bridge
from sparse_model.config import SparseConfig, SparsityConfig
from sparse_model.training import pretrain as pretraining
from sparse_model.training.finite import TrainingDiverged
from sparse_model.training.identity import FILE
from sparse_model.training.interrupts import Interrupted
from sparse_model.training.pretrain import PretrainConfig, pretrain

SHAPE = SparseConfig(d_model=16, d_mlp=32, n_heads=2, d_head=8, n_ctx=16, d_vocab=300)
CONFIG = RunConfig(
    corpus_tokens=2000,
    steps=4,
    batch_size=2,
    eval_tokens=32,
    checkpoint_every=2,
    sparse=SHAPE,
    sparsity=SparsityConfig(nonzero_fraction=0.25),
    dense_train=DenseTrainConfig(d_model=16, n_heads=2, steps=5, batch_size=2),
)
WEIGHTS = ("dense/model.safetensors", "sparse/model.safetensors", "bridges/bridges.safetensors")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def places(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPARSE_BRIDGES_CACHE", str(cache))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """The run that nobody stops."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSE_BRIDGES_CACHE", str(cache))
        folder = tmp_path_factory.mktemp("runs") / "whole"
        train_bridge(CONFIG, folder, progress=False)
        return folder


def weights(folder: Path) -> dict[str, str]:
    return {name: digest for name, digest in digests(folder).items() if name in WEIGHTS}


def stop_in(patch: pytest.MonkeyPatch, owner: object, name: str, number: signal.Signals, calls: int = 1) -> None:
    """Send this process a signal in the n-th call of a function."""
    called, function = [], getattr(owner, name)

    def signalled(*args: object, **kwargs: object) -> object:
        called.append(1)
        if len(called) == calls:
            os.kill(os.getpid(), number)
        return function(*args, **kwargs)

    patch.setattr(owner, name, signalled)


@pytest.mark.parametrize(
    ("owner", "name", "number", "calls", "said"),
    [
        (bridges.run_folder, "train_tokenizer", signal.SIGINT, 1, "SIGINT: nothing of the run was written"),
        (bridges.run_folder, "prepare_corpus", signal.SIGHUP, 1, "SIGHUP: nothing of the run was written"),
        (
            _DenseTraining,
            "train_step",
            signal.SIGTERM,
            3,
            "stopped at step 3 of the dense model's.*; go on with --resume",
        ),
        (bridges.run_folder, "save_dense", signal.SIGHUP, 1, "SIGHUP: what this stage had done so far is lost"),
        (JointTrainer, "train_step", signal.SIGHUP, 3, "stopped at step 3; go on with --resume"),
        (bridges.run_folder, "save_bridges", signal.SIGTERM, 1, "SIGTERM: what this stage had done"),
        (bridges.pipeline, "evaluate", signal.SIGINT, 1, "is trained, and not evaluated: --resume does that"),
        (bridges.pipeline, "write_measured", signal.SIGTERM, 1, "is trained, and not evaluated"),
    ],
)
def test_every_stage_of_the_main_job(
    owner: object,
    name: str,
    number: signal.Signals,
    calls: int,
    said: str,
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        stop_in(patch, owner, name, number, calls)
        with pytest.raises(Interrupted, match=said):
            train_bridge(CONFIG, "run", progress=False)
    assert Path("run").exists() != ("nothing of the run was written" in said)
    metrics = train_bridge(CONFIG, "run", resume=True, progress=False)
    assert weights(Path("run")) == weights(whole)
    assert metrics["sites"]
    assert digests(Path("run")).keys() == digests(whole).keys()


def test_the_dense_model_alone_goes_on_where_it_was_stopped(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_in(patch, _DenseTraining, "train_step", signal.SIGINT, 3)
        with pytest.raises(Interrupted, match="stopped at step 3"):
            make_dense(CONFIG, Path("run"), progress=False)
    assert {path.name for path in Path("run", DENSE_CHECKPOINT).iterdir()} == {"step-2", "step-3"}
    for start in (train_bridge, make_dense):
        with pytest.raises(FileExistsError, match="holds the unfinished training of a dense model: add --resume"):
            start(CONFIG, Path("run"), progress=False)
    steps, train_step = [], _DenseTraining.train_step
    monkeypatch.setattr(_DenseTraining, "train_step", lambda self: (steps.append(self.step), train_step(self))[1])
    make_dense(CONFIG, Path("run"), resume=True, progress=False)
    assert steps == [3, 4]
    assert weights(Path("run"))["dense/model.safetensors"] == weights(whole)["dense/model.safetensors"]
    assert {path.name for path in Path("run").iterdir()} == {"dense", "dense-config.json", "tokenizer"}


def test_the_sparse_model_alone_is_not_trained_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {field.name for field in dataclasses.fields(PretrainConfig)}
    config = PretrainConfig(**{name: value for name, value in vars(CONFIG).items() if name in names})
    whole = pretrain(config, Path("whole"), progress=False)
    for name in ("write_text", "save_sparse"):
        with monkeypatch.context() as patch:
            stop_in(patch, pretraining, name, signal.SIGTERM)
            with pytest.raises(Interrupted, match="what this stage had done"):
                pretrain(config, Path(name), progress=False)
        assert pretrain(config, Path(name), resume=True, progress=False) == whole
    monkeypatch.setattr(pretraining.ValidatedTrainer, "train", lambda *_, **__: pytest.fail("trained again"))
    assert pretrain(config, Path("whole"), resume=True, progress=False) == whole


def test_a_checkpoint_that_was_being_removed_hinders_nothing(whole: Path) -> None:
    shutil.copytree(whole, "run")
    Path("run/checkpoint/step-2").mkdir(parents=True)  # what is left of one
    assert train_bridge(CONFIG, "run", resume=True, progress=False)["sites"]
    assert digests(Path("run")).keys() == digests(whole).keys()


def test_a_run_is_begun_and_ended_with_the_same_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("text").mkdir()
    for number in range(30):
        lines = "".join(f"def f{n}(x):\n    return '{number}' + x * {n}\n\n" for n in range(20))
        Path(f"text/{number}.py").write_text(lines)
    make_tiny_run(Path("good"))
    shape = dataclasses.replace(SHAPE, d_vocab=384)
    config = dataclasses.replace(CONFIG, corpus="text", dense="good/dense", sparse=shape)
    with monkeypatch.context() as patch:
        stop_in(patch, JointTrainer, "train_step", signal.SIGTERM, 1)
        with pytest.raises(Interrupted):
            train_bridge(config, "run", progress=False)
    before = digests(Path("run"))

    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            train_bridge(config, "run", resume=True, progress=False)
        assert digests(Path("run")) == before

    for number in range(10):
        Path(f"text/{number}.py").rename(f"{number}.away")
    refused(r"run was begun with another text \(files were changed, added or removed\): resume with the same")
    for number in range(10):
        Path(f"{number}.away").rename(f"text/{number}.py")
    Path("run/dense/model.safetensors").rename("whole")
    shutil.copy(make_tiny_run(Path("other"), seed=1).folder / "dense" / "model.safetensors", "run/dense")
    with pytest.raises(ValueError, match="run was begun with other weights of the dense model"):
        train_bridge(config, "run", resume=True, progress=False)
    Path("whole").rename("run/dense/model.safetensors")
    kept = Path("run", FILE)
    kept.write_text(kept.read_text().replace('"processes": 1', '"processes": 2'))
    before = digests(Path("run"))
    refused("run was begun with 2 processes, not 1")
    kept.write_text(kept.read_text().replace('"processes": 2', '"processes": 1'))
    assert train_bridge(config, "run", resume=True, progress=False)["sites"]


def test_what_is_not_finite_is_not_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """M3, M4: right after an update, in a bridge and in the optimizer's numbers; in the dense stage too."""

    def spoil(trainer: JointTrainer) -> None:
        with torch.no_grad():
            trainer.bridges.decoders[1].weight[0, 0] = torch.nan

    def spoil_moment(trainer: JointTrainer) -> None:
        trainer.optimizers["free"].state[trainer.free[1]]["exp_avg_sq"].fill_(torch.inf)

    config = dataclasses.replace(CONFIG, steps=8)
    for owner, after, change, named in (
        (JointTrainer, 4, spoil, r"bridges\.decoders\.1\.weight is no longer finite in step 4 at learning rate"),
        (JointTrainer, 4, spoil_moment, r"the optimizer's exp_avg_sq of bridges\.\S+ is no longer finite in step 4"),
        (
            _DenseTraining,
            4,
            lambda t: t.parameters[0].data.fill_(torch.inf),
            r"dense\.\S+ of the dense .* in step 4 at",
        ),
    ):
        step = owner.train_step

        def spoiled(self, step=step, after=after, change=change):
            losses = step(self)
            if self.step == after:
                change(self)
            return losses

        shutil.rmtree("run", ignore_errors=True)
        with monkeypatch.context() as patch:
            patch.setattr(owner, "train_step", spoiled)
            with pytest.raises(TrainingDiverged, match=named):
                train_bridge(config, "run", progress=False)
        kept = "checkpoint" if owner is JointTrainer else DENSE_CHECKPOINT
        assert [path.name for path in Path("run", kept).iterdir()] == ["step-2"]
    assert train_bridge(config, "run", resume=True, progress=False)["sites"]

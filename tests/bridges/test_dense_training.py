"""The small dense model: the values of its learning rate, and what becomes of a loss that is not finite."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from support.helpers import tiny_tokenizer

from bridges.config import DenseTrainConfig, RunConfig
from bridges.dense_training import _DenseTraining, dense_rate, train_dense
from sparse_model.config import SparseConfig
from sparse_model.training.finite import TrainingDiverged

SHAPE = SparseConfig(d_model=16, d_mlp=32, n_heads=2, d_head=8, n_ctx=16, d_vocab=384)
CONFIG = RunConfig(sparse=SHAPE, dense_train=DenseTrainConfig(d_model=16, n_heads=2, steps=100, batch_size=2, lr=0.01))


@pytest.mark.parametrize(
    ("step", "steps", "rate"),
    [
        (0, 1000, 1 / 20),
        (9, 1000, 10 / 20 * (0.55 + 0.45 * math.cos(0.009 * math.pi))),
        (19, 1000, 0.55 + 0.45 * math.cos(0.019 * math.pi)),
        (500, 1000, 0.55),
        (1000, 1000, 0.1),
        (0, 10, 1.0),  # 2 % of ten steps is none: no warm-up
    ],
)
def test_rate_by_hand(step: int, steps: int, rate: float) -> None:
    assert dense_rate(step, steps) == pytest.approx(rate)


def test_training_follows_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: (used.append(self.param_groups[0]["lr"]), step(self)))
    train_dense(CONFIG, torch.randint(384, (8, 16)), tiny_tokenizer(), torch.device("cpu"), progress=False)
    assert used == pytest.approx([0.01 * dense_rate(i, 100) for i in range(100)])
    assert used[0] == pytest.approx(0.005)
    assert max(used) == used[1]


def test_a_loss_that_is_not_finite_stops_the_training_also_after_the_last_line_of_the_log() -> None:
    options = dataclasses.replace(CONFIG.dense_train, steps=3, lr=1e30)
    config = dataclasses.replace(CONFIG, dense_train=options, log_every=50)
    with pytest.raises(TrainingDiverged, match=r"the loss of .* in step 2 at .* lower dense_train\.lr=1e\+30"):
        train_dense(config, torch.randint(384, (8, 16)), tiny_tokenizer(), torch.device("cpu"), progress=False)


MUON = dataclasses.replace(CONFIG.dense_train, optimizer="muon", lr=0.02, steps=4, bf16_on_cpu=True)


def test_muon_trains_the_matrices_of_the_blocks_and_adamw_the_rest() -> None:
    config = dataclasses.replace(CONFIG, dense_train=MUON)
    training = _DenseTraining(config, torch.randint(384, (8, 16)), tiny_tokenizer(), torch.device("cpu"), None)
    names = {id(p): name for name, p in training.model.named_parameters()}
    held = {
        key: {names[id(p)] for group in optimizer.param_groups for p in group["params"]}
        for key, optimizer in training.optimizers.items()
    }
    blocks = {f"transformer.h.0.{part}.weight" for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
    assert held["matrices"] == blocks | {name.replace("h.0", "h.1") for name in blocks}
    assert held["others"] == set(names.values()) - held["matrices"] - {"transformer.wpe.weight"}
    assert len(names) == len(held["matrices"]) + len(held["others"]) + 1
    training.train_step()
    rates = {key: optimizer.param_groups[0]["lr"] for key, optimizer in training.optimizers.items()}
    assert rates == pytest.approx({"matrices": 0.02 * dense_rate(0, 4), "others": 3e-3 * dense_rate(0, 4)})


def test_muon_in_bf16_goes_on_from_its_checkpoint_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bf16 = torch.cpu.get_capabilities().get("avx512_bf16") or torch.cpu.get_capabilities().get("amx_bf16")
    config, blocks = dataclasses.replace(CONFIG, dense_train=MUON), torch.randint(384, (8, 16))
    made = config, blocks, tiny_tokenizer(), torch.device("cpu")
    whole = train_dense(*made, progress=False)
    stopped = _DenseTraining(*made, tmp_path)
    losses = [stopped.train_step() for _ in range(2)]
    stopped.save_checkpoint(losses[-1])
    resumed = train_dense(*made, folder=tmp_path, progress=False)
    for (name, ours), theirs in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    in_fp32 = dataclasses.replace(config, dense_train=dataclasses.replace(MUON, bf16_on_cpu=False))
    caplog.set_level("INFO")
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    without = _DenseTraining(*made, None).train_step().item()
    assert "has no instructions for bfloat16" in caplog.text
    monkeypatch.undo()
    exact = _DenseTraining(in_fp32, *made[1:], None).train_step().item()
    assert exact == without
    if bf16:
        assert exact != losses[0].item()
    assert exact == pytest.approx(losses[0].item(), rel=1e-3)


def test_an_unknown_optimizer_is_no_other_one() -> None:
    # Past the check of types that the tests add to every call.
    options = object.__new__(DenseTrainConfig)
    for field in dataclasses.fields(DenseTrainConfig):
        object.__setattr__(options, field.name, "sgd" if field.name == "optimizer" else field.default)
    with pytest.raises(ValueError, match="optimizer='sgd': use one of adamw, muon"):
        options.__post_init__()

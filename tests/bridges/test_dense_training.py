"""The small dense model: the values of its learning rate, and what becomes of a loss that is not finite."""

import dataclasses
import math

import pytest
import torch
from support.helpers import tiny_tokenizer

from bridges.config import DenseTrainConfig, RunConfig
from bridges.dense_training import dense_rate, train_dense
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

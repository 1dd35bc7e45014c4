"""Checkpoints: the last two stay, a damaged one gives way to the one before, and what they were made from is kept."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from sparse_model.config import OptimConfig
from sparse_model.training.checkpoints import Checkpoints
from sparse_model.training.finite import first_not_finite, gradients_of, state_of
from sparse_model.training.identity import FILE, Identity, digest_of, keep_identity

CONFIG, STEPS = OptimConfig(), 100
IDENTITY: Identity = {"torch": "2.0", "corpus": "a text", "processes": 1}


class Training:
    """A small module with its optimizer, and checkpoints in a folder."""

    def __init__(self, folder: Path) -> None:
        self.module = nn.Linear(3, 2)
        self.optimizer = torch.optim.Adam(self.module.parameters(), lr=0.1)
        self.checkpoints = Checkpoints(folder / "checkpoint", {"part": self.module}, {"main": self.optimizer})

    def step(self, number: int) -> None:
        self.module(torch.full((1, 3), float(number))).sum().backward()
        self.optimizer.step()
        self.checkpoints.save(CONFIG, {"step": number, "identity": IDENTITY})

    def load(self, identity: Identity = IDENTITY) -> int | None:
        state = self.checkpoints.load(CONFIG, STEPS, identity)
        return state and state["step"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    training = Training(tmp_path)
    for number in (10, 20, 30):
        training.step(number)
    return tmp_path


def kept(folder: Path) -> set[str]:
    return {path.name for path in (folder / "checkpoint").iterdir()}


def test_the_last_two_are_kept_until_all_are_removed(folder: Path) -> None:
    assert kept(folder) == {"step-20", "step-30"}
    training = Training(folder)
    assert training.load() == 30
    training.checkpoints.remove()
    assert list(folder.iterdir()) == []
    assert training.load() is None


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def other_shape(path: Path) -> None:
    state = torch.load(path, weights_only=True)
    state["state"][0]["exp_avg"] = torch.zeros(7)
    torch.save(state, path)


DAMAGES: list[tuple[str, Callable[[Path], object]]] = [
    ("part.safetensors", cut),
    ("part.safetensors", lambda path: path.unlink()),
    ("main_optimizer.pt", cut),
    ("main_optimizer.pt", other_shape),
    ("config.json", cut),
    ("step.json", cut),
    ("step.json", lambda path: path.write_text("[]")),
    ("step.json", lambda path: path.write_text(json.dumps({"step": 1e9, "identity": IDENTITY}))),
    ("step.json", lambda path: path.write_text('{"step": 30}')),
]


@pytest.mark.parametrize(("name", "damage"), DAMAGES)
def test_a_damaged_one_gives_way_to_the_one_before_with_a_word(
    name: str, damage: Callable[[Path], object], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damage(folder / "checkpoint" / "step-30" / name)
    training = Training(folder)
    with caplog.at_level(logging.WARNING):
        assert training.load() == 20
    assert name in caplog.text
    assert "going on from" in caplog.text
    whole = torch.load(folder / "checkpoint" / "step-20" / "main_optimizer.pt", weights_only=True)
    assert torch.equal(training.optimizer.state_dict()["state"][0]["exp_avg"], whole["state"][0]["exp_avg"])
    training.step(25)
    assert kept(folder) == {"step-20", "step-25"}
    for number in (20, 25):
        cut(folder / "checkpoint" / f"step-{number}" / "part.safetensors")
    with pytest.raises(ValueError, match=r"step-25.part\.safetensors.*step-20.*: remove .*checkpoint and --resume"):
        training.load()


def test_one_of_an_earlier_version_is_named(folder: Path) -> None:
    (folder / "checkpoint" / "step-30").rename(folder / "other")
    Training(folder).checkpoints.remove()
    (folder / "other").rename(folder / "checkpoint")
    with pytest.raises(ValueError, match="is of an earlier version"):
        Training(folder).load()


@pytest.mark.parametrize(
    ("now", "message"),
    [
        ({"corpus": "another"}, "was begun with another text"),
        ({"processes": 2}, "was begun with 1 processes, not 2: resume with the same"),
        ({"corpus": "another", "processes": 2}, "another text .* and 1 processes, not 2"),
    ],
)
def test_what_it_was_made_from_must_be_there_again(now: Identity, message: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=message):
        Training(folder).load(IDENTITY | now)


def test_other_versions_are_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert Training(folder).load(IDENTITY | {"torch": "3.0"}) == 30
    assert "was begun with torch 2.0, now 3.0: the weights need not be the same" in caplog.text


def test_a_run_keeps_what_it_was_begun_with_and_learns_what_comes_later(tmp_path: Path) -> None:
    keep_identity(tmp_path, IDENTITY)
    keep_identity(tmp_path, {"dense": "weights"})
    assert json.loads((tmp_path / FILE).read_text()) == IDENTITY | {"dense": "weights"}
    keep_identity(tmp_path, IDENTITY | {"torch": "3.0"})
    assert json.loads((tmp_path / FILE).read_text())["torch"] == "2.0"
    with pytest.raises(ValueError, match="other weights of the dense model"):
        keep_identity(tmp_path, {"dense": "others"})
    (tmp_path / FILE).write_text("{")
    with pytest.raises(ValueError, match=r"identity\.json is damaged"):
        keep_identity(tmp_path, IDENTITY)


def test_a_digest_sees_every_bit() -> None:
    x = torch.arange(6.0)
    others = [x.view(2, 3), x.double(), -x, x.roll(1), torch.cat([x, x])]
    assert len({digest_of([t]) for t in [x, *others]}) == 6
    assert digest_of([x, x]) != digest_of([x])


def test_what_is_not_finite_is_named() -> None:
    training = Training(Path("nowhere"))
    modules = {"part": training.module}
    training.module(torch.ones(1, 3)).sum().backward()
    assert first_not_finite(gradients_of(modules)) is None
    assert training.module.bias.grad is not None
    training.module.bias.grad[1] = torch.inf
    assert first_not_finite(gradients_of(modules)) == "the gradient of part.bias"
    training.module.bias.grad[1] = 0
    training.optimizer.step()
    assert first_not_finite(state_of(modules, [training.optimizer])) is None
    training.optimizer.state[training.module.weight]["exp_avg_sq"][0, 0] = torch.nan
    assert first_not_finite(state_of(modules, [training.optimizer])) == "the optimizer's exp_avg_sq of part.weight"
    with torch.no_grad():
        training.module.bias[0] = torch.nan
    assert first_not_finite(state_of(modules, [training.optimizer])) == "part.bias"
    assert first_not_finite([]) is None

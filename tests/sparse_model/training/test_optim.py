"""Optimizer rules against hand arithmetic: schedule, gradient RMS, decay."""

import math

import pytest
import torch
from torch import nn

from sparse_model.config import OptimConfig
from sparse_model.training.optim import adamw, normalize_grad_rms_, schedule, set_lr


@pytest.mark.parametrize(
    ("warmup", "progress", "factor"),
    [
        (0.1, 0.0, 0.0),
        (0.1, 0.05, 0.5),
        (0.1, 0.1, 1.0),
        (0.1, 0.55, 0.5),
        (0.1, 1.0, 0.0),
        (0.0, 0.0, 1.0),
        (0.0, 0.25, 0.75),
        (0.0, 1.0, 0.0),
        (0.5, 0.25, 0.5),
        (0.1, 1.1, 0.0),
    ],
)
def test_schedule_by_hand(warmup: float, progress: float, factor: float) -> None:
    assert schedule(progress, OptimConfig(warmup=warmup)) == pytest.approx(factor, abs=1e-12)


def test_schedule_is_continuous_at_the_end_of_warmup() -> None:
    config = OptimConfig(warmup=0.3)
    assert schedule(0.3 + 1e-9, config) == pytest.approx(schedule(0.3 - 1e-9, config), abs=1e-7)


@pytest.mark.parametrize("progress", [0.005, 0.3, 0.9])
def test_sharkfin_multiplies_by_one_over_the_root_of_the_kept_fraction(progress: float) -> None:
    plain = schedule(progress, OptimConfig(sharkfin=False), 1 / 64)
    assert plain == schedule(progress, OptimConfig(), 1.0)
    assert schedule(progress, OptimConfig(), 1 / 64) == pytest.approx(8 * plain)


def with_grads(*grads: torch.Tensor | None) -> list[nn.Parameter]:
    parameters = []
    for grad in grads:
        p = nn.Parameter(torch.zeros(2) if grad is None else torch.zeros_like(grad))
        p.grad = grad
        parameters.append(p)
    return parameters


@pytest.mark.parametrize("size", [10.0, 1e-3])
def test_always_divides_by_the_joint_rms_however_small(size: float) -> None:
    # The squares 9 + 16 + 0 + 0 + 25 over five entries: RMS sqrt(10).
    grads = [size * torch.tensor([[3.0, -4.0]]), size * torch.tensor([0.0, 0.0, 5.0])]
    parameters = with_grads(grads[0].clone(), None, grads[1].clone())
    rms = normalize_grad_rms_(parameters, "always")
    assert rms.item() == pytest.approx(size * math.sqrt(10))
    scale = 1 / (size * math.sqrt(10) + 1e-5)
    torch.testing.assert_close(parameters[0].grad, grads[0] * scale)
    torch.testing.assert_close(parameters[2].grad, grads[1] * scale)
    assert parameters[1].grad is None


@pytest.mark.parametrize(("size", "scale"), [(10.0, 1 / (10 * math.sqrt(10))), (0.1, 1.0)])
def test_clip_divides_only_above_one(size: float, scale: float) -> None:
    grads = [size * torch.tensor([[3.0, -4.0]]), size * torch.tensor([0.0, 0.0, 5.0])]
    parameters = with_grads(grads[0].clone(), grads[1].clone())
    rms = normalize_grad_rms_(parameters, "clip")
    assert rms.item() == pytest.approx(size * math.sqrt(10))
    torch.testing.assert_close(parameters[0].grad, grads[0] * scale)
    torch.testing.assert_close(parameters[1].grad, grads[1] * scale)


def test_an_unknown_rule_is_an_error_and_changes_nothing() -> None:
    parameters = with_grads(torch.tensor([3.0, 4.0]))
    with pytest.raises(ValueError, match="grad_rms='sometimes'"):
        normalize_grad_rms_(parameters, "sometimes")
    assert parameters[0].grad.tolist() == [3.0, 4.0]


def test_only_matrices_decay() -> None:
    matrix, vector = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(3))
    frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)
    optimizer = adamw([matrix, vector, frozen], OptimConfig(lr=0.5, weight_decay=0.1))
    matrix.grad, vector.grad = torch.zeros_like(matrix), torch.zeros_like(vector)
    optimizer.step()
    torch.testing.assert_close(matrix.detach(), torch.full((2, 3), 1 - 0.5 * 0.1))
    assert torch.equal(vector, torch.ones(3))
    assert torch.equal(frozen, torch.ones(2, 2))


def test_one_step_by_hand() -> None:
    """First step: both moments are bias-corrected to the gradient, so it moves by lr * g / (|g| + eps)."""
    vector = nn.Parameter(torch.zeros(2))
    vector.grad = torch.tensor([0.1, -3.0])
    adamw([vector], OptimConfig(lr=0.01, eps=0.1)).step()
    torch.testing.assert_close(vector.detach(), torch.tensor([-0.01 * 0.1 / 0.2, 0.01 * 3 / 3.1]))


def test_settings_and_set_lr() -> None:
    optimizer = adamw([nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))], OptimConfig(lr=0.3, eps=1e-3))
    assert {(g["lr"], g["eps"], g["betas"]) for g in optimizer.param_groups} == {(0.3, 1e-3, (0.9, 0.95))}
    set_lr(optimizer, 0.7)
    assert {g["lr"] for g in optimizer.param_groups} == {0.7}

"""The losses, by hand arithmetic, and each known way of getting them wrong."""

import math

import pytest
import torch

from bridges.losses import kl, nmse, nmse_backward, nmse_backward_together
from sparse_model.training.losses import next_token_loss, token_loss


def test_nmse_by_hand() -> None:
    target = torch.tensor([[0.0, 2.0], [4.0, 2.0]])  # mean (2, 2): deviations 4 + 4
    prediction = torch.tensor([[1.0, 2.0], [4.0, 0.0]])  # errors 1 + 4
    assert nmse(prediction, target).item() == pytest.approx(5 / 8)


def test_predicting_the_mean_scores_exactly_one() -> None:
    target = torch.randn(3, 7, 5, dtype=torch.float64) + 10
    mean = target.mean((0, 1)).expand_as(target)
    assert nmse(mean, target).item() == pytest.approx(1, abs=1e-12)
    assert nmse(target, target).item() == 0


def test_nmse_is_a_ratio_of_sums() -> None:
    """One token that lies at the mean must not blow up the figure, as a mean of per-token ratios does."""
    target = torch.cat([torch.randn(99, 4), torch.zeros(1, 4)])
    assert nmse(target + 0.1, target).item() < 0.02


def test_nmse_sends_no_gradient_into_its_target() -> None:
    target, prediction = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    nmse(prediction, target).backward()
    assert target.grad is None
    denominator = (target - target.mean(0)).square().sum()
    assert torch.allclose(prediction.grad, 2 * (prediction - target) / denominator)


def test_nmse_through_its_target_does_not_reward_shrinking() -> None:
    """Scaling prediction and target together changes nothing, so the gradients along that direction cancel."""
    target = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    prediction = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    assert torch.equal(nmse(prediction, target, through_target=True), nmse(prediction, target))
    nmse(prediction, target, through_target=True).backward()
    along = (prediction.grad * prediction).sum() + (target.grad * target).sum()
    assert along.item() == pytest.approx(0, abs=1e-12)
    assert target.grad.norm() > 0


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("through_target", [False, True])
def test_nmse_over_two_processes_with_equal_batches_is_that_of_both(together: bool, through_target: bool) -> None:
    """Whose sums are twice one's own; gradients are averaged afterwards, so that each is already the whole one."""
    x, targets = torch.randn(2, 3, 4, 5).double(), [torch.randn(3, 4, 5).double().requires_grad_() for _ in range(2)]
    weight = torch.randn(2, 1, 1, 5).double().requires_grad_()
    both = [torch.cat([t, t]) for t in targets]
    wanted = sum(nmse(torch.cat([x[i], x[i]]) * weight[i], both[i], through_target=through_target) for i in range(2))
    grads = torch.autograd.grad(0.5 * wanted, [weight, *targets], allow_unused=True)
    rule = {"scale": 0.5, "through_target": through_target, "total": lambda values: 2 * values}
    if together:
        found = nmse_backward_together(x * weight, targets, **rule)
    else:
        found = nmse_backward(lambda i: x[i] * weight[i], targets, **rule)
    assert found.sum().item() == pytest.approx(wanted.item(), rel=1e-12)
    torch.testing.assert_close(weight.grad, grads[0])
    for target, grad in zip(targets, grads[1:], strict=True):
        assert (target.grad is None) == (grad is None)
        if grad is not None:
            torch.testing.assert_close(target.grad, grad)


def test_kl_by_hand() -> None:
    target, logits = torch.tensor([[math.log(3.0), 0.0]]), torch.tensor([[0.0, 0.0]])
    assert kl(target, logits).item() == pytest.approx(0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5))


def test_kl_is_a_mean_over_tokens_whatever_the_shape() -> None:
    """A batch mean over 3-D logits would be as many times too large as the sequence is long."""
    target, logits = torch.randn(2, 16, 9), torch.randn(2, 16, 9)
    assert kl(target, logits).item() == pytest.approx(kl(target.flatten(0, 1), logits.flatten(0, 1)).item(), rel=1e-5)
    single = [kl(target[b, p], logits[b, p]).item() for b in range(2) for p in range(16)]
    assert kl(target, logits).item() == pytest.approx(sum(single) / 32, rel=1e-5)


def test_kl_sees_the_whole_vocabulary() -> None:
    """All the difference lies outside the target's top 64 tokens."""
    target = torch.zeros(1, 1000)
    target[:, :64] = 1.0
    logits = target.clone()
    logits[:, 64:] -= 20
    assert kl(target, logits).item() > 10


def test_kl_is_zero_on_equal_logits_up_to_a_constant_and_detaches_its_target() -> None:
    target = torch.randn(4, 9, requires_grad=True)
    logits = (target.detach() + 3).requires_grad_()
    value = kl(target, logits)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-6)
    assert target.grad is None


def test_next_token_loss_by_hand() -> None:
    logits = torch.zeros(1, 3, 4)
    logits[0, 0, 2] = math.log(5.0)  # predicts token 2 with 5/8
    tokens = torch.tensor([[1, 2, 0]])
    assert next_token_loss(logits, tokens).item() == pytest.approx(-(math.log(5 / 8) + math.log(1 / 4)) / 2)


@pytest.mark.parametrize(("dtype", "wide"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_losses_of_narrow_logits_are_computed_in_float32(dtype: torch.dtype, wide: torch.dtype) -> None:
    logits, target = (20 * torch.randn(6, 50, dtype=dtype) for _ in range(2))
    following = torch.randint(50, (6,))
    for found, exact in (
        (token_loss(logits, following), token_loss(logits.double(), following)),
        (kl(target, logits), kl(target.double(), logits.double())),
    ):
        assert found.dtype == wide
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_the_kl_by_hand() -> None:
    """(q - p) / tokens, times what comes from above; nothing else, and not twice."""
    target, logits = torch.randn(5, 7), torch.randn(5, 7, requires_grad=True)
    (3 * kl(target, logits)).backward()
    torch.testing.assert_close(logits.grad, 3 * (logits.detach().softmax(-1) - target.softmax(-1)) / 5)

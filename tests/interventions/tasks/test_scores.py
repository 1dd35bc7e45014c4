"""What is measured on a batch of prompts, against values by hand."""

import math

import pytest
import torch

from interventions.tasks.base import (
    TaskBatch,
    answer_probabilities,
    pair_accuracy,
    since_difference,
    task_loss,
)


def _batch(answers: list[list[int]]) -> TaskBatch:
    """Pairs of one prompt token, predicted at position 1 of 3."""
    n_pairs = len(answers)
    return TaskBatch(
        tokens=torch.zeros(n_pairs, 2, 3, dtype=torch.int64),
        answers=torch.tensor(answers),
        last=torch.ones(n_pairs, dtype=torch.int64),
        prompts=[("", "")] * n_pairs,
    )


def test_scores_by_hand() -> None:
    logits = torch.full((2, 2, 3, 4), 9.0)  # positions other than the last must not matter
    logits[:, :, 1] = 0.0
    logits[0, 0, 1, 2] = math.log(3)  # right 3 : wrong 1
    logits[0, 1, 1, 1] = math.log(7)  # right 7 : wrong 1
    logits[1, 0, 1, 0] = math.log(3)  # right 3 : wrong 1, the other member is a tie
    batch = _batch([[2, 1], [0, 3]])
    expected = -(math.log(3 / 4) + math.log(7 / 8) + math.log(3 / 4) + math.log(1 / 2)) / 4
    assert task_loss(logits, batch).item() == pytest.approx(expected)
    assert pair_accuracy(logits, batch).item() == 0.5
    right, wrong = answer_probabilities(logits, batch)
    assert torch.allclose(right, torch.tensor([[3 / 6, 7 / 10], [3 / 6, 1 / 4]]))
    assert torch.allclose(wrong, torch.tensor([[1 / 6, 1 / 10], [1 / 6, 1 / 4]]))


def test_the_loss_has_a_gradient_at_the_last_position_only() -> None:
    logits = torch.zeros(1, 2, 3, 4, requires_grad=True)
    task_loss(logits, _batch([[2, 1]])).backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad.abs().sum((0, 1, 3)) > 0, torch.tensor([False, True, False]))


def test_since_difference_by_hand() -> None:
    first = torch.tensor([[1, 2, 3, 4, 0], [1, 2, 3, 4, 5]])
    second = torch.tensor([[1, 9, 3, 4, 7], [1, 2, 3, 4, 5]])
    mask = since_difference(first, second, torch.tensor([3, 4]))
    assert mask.int().tolist() == [[0, 1, 1, 1, 0], [0, 0, 0, 0, 0]]

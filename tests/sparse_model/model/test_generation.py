"""Generation step by step, on logits that are known."""

from itertools import islice

import torch

from sparse_model.model.generation import generate_steps, take_tokens


def test_each_step_is_given_what_the_last_one_took() -> None:
    seen = []

    def next_logits(given: torch.Tensor) -> torch.Tensor:
        seen.append(given.tolist())
        return torch.nn.functional.one_hot((given[:, -1] + 1) % 7, 7).float()

    steps = list(islice(generate_steps(next_logits, torch.tensor([[1, 2], [4, 5]])), 3))
    assert [step.tokens.tolist() for step in steps] == [[3, 6], [4, 0], [5, 1]]
    assert seen == [[[1, 2], [4, 5]], [[3], [6]], [[4], [0]]]


def test_a_step_that_nobody_asks_for_is_not_run() -> None:
    calls = []
    steps = generate_steps(lambda given: calls.append(given) or torch.zeros(1, 4), torch.tensor([[1]]))
    assert calls == []
    next(steps)
    assert len(calls) == 1


def test_draws_follow_the_temperature_and_repeat_with_the_seed() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]]).repeat(20_000, 1)
    for temperature in (0.5, 1.0, 2.0):
        drawn = take_tokens(logits, temperature, torch.Generator().manual_seed(0))
        expected = (logits[0] / temperature).softmax(-1)
        assert torch.allclose(drawn.bincount(minlength=3) / len(drawn), expected, atol=0.015)
        assert torch.equal(drawn, take_tokens(logits, temperature, torch.Generator().manual_seed(0)))
    assert take_tokens(logits, 0.0).unique().tolist() == [2]

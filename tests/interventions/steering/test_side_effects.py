"""Side effects against those written out by hand."""

import dataclasses
import statistics

import pytest
import torch
from support.steering_runs import SMALL, TASK, VOCAB, p_target

from bridges.hybrid import residuals, suffix
from bridges.run_folder import Run
from interventions.steering import side_effects
from interventions.steering.side_effects import Bystanders, SideEffects, fixed_vector, mean_effects
from interventions.steering.steered_prompts import plain_model, prompts_of
from interventions.tasks.base import pair_accuracy
from interventions.tasks.catalogue import get_task, list_tasks


@pytest.fixture(scope="module")
def bystanders(dense, run: Run) -> Bystanders:
    """An untrained model solves no task, so here every task counts as solved."""
    text = torch.randint(VOCAB, (5, 24), generator=torch.Generator().manual_seed(3))
    prompts = prompts_of(get_task(TASK, run.tokenizer).sample(6, split="evaluation", seed=0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(side_effects, "solves", lambda accuracy: True)
        plan = dataclasses.replace(SMALL, task=TASK, where="stream", seed=0)
        return Bystanders(plain_model(dense), run, prompts, 2, plan, text)


def test_a_zero_edit_has_no_side_effects(bystanders: Bystanders) -> None:
    unsteered = bystanders.measure(None)
    assert bystanders.measure(torch.zeros(16)) == unsteered
    assert unsteered.kl == 0
    assert bystanders.measure(torch.randn(16)).kl > 0.01


def test_side_effects_equal_those_written_out(bystanders: Bystanders, run: Run, monkeypatch) -> None:
    vector, prompts = torch.randn(16), bystanders.prompts

    def steered(tokens: torch.Tensor) -> torch.Tensor:
        return suffix(run.dense, 2, residuals(run.dense, tokens)[2] + vector, tokens)

    generated = torch.randint(VOCAB, (6, 3))
    monkeypatch.setattr(bystanders, "_sample", lambda: generated)
    found = bystanders.measure(vector)
    text = torch.cat(bystanders.text)
    p, q = run.dense(text).log_softmax(-1), steered(text).log_softmax(-1)
    assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert found.p_target == pytest.approx(float(p_target(steered(prompts.tokens), prompts).mean()), rel=1e-3)
    assert set(found.pair_accuracy) == set(list_tasks()) - {TASK}
    for name in ("with_open", "while_return_true", "var_swap"):
        batch = get_task(name, run.tokenizer, max_tokens=64).sample(2, split="evaluation", seed=0)
        logits = steered(batch.tokens.flatten(0, 1)).unflatten(0, (-1, 2))
        assert found.pair_accuracy[name] == float(pair_accuracy(logits, batch))
    for tokens, perplexity in (
        (prompts.tokens, found.perplexity),
        (prompts.counterfactual, found.perplexity_counterfactual),
    ):
        losses = []
        for prompt, last, new in zip(tokens, prompts.last, generated, strict=True):
            whole = torch.cat([prompt[: last + 1], new])
            logp = run.dense(whole[None])[0].log_softmax(-1)
            losses += [-float(logp[last + i, token]) for i, token in enumerate(new)]
        assert perplexity == pytest.approx(2.718281828 ** statistics.mean(losses), rel=1e-3)


def test_text_is_sampled_under_the_edit(bystanders: Bystanders) -> None:
    """A vector that makes one token all but certain, generated tokens included."""
    head = bystanders.hf.lm_head.weight
    sure = Bystanders.__new__(Bystanders)
    sure.__dict__ |= bystanders.__dict__ | {"site": 4, "where": "read"}
    with sure._edited(100 * head[17] / head[17].norm()):
        drawn = sure._sample()
    likely = (head @ (head[17] - head[17].mean())).argmax()
    assert (drawn == likely).all()
    assert torch.equal(bystanders._sample(), bystanders._sample())
    assert not (bystanders._sample() == likely).all()


def test_sampling_goes_on_behind_each_prompts_last_token(
    bystanders: Bystanders, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def most_likely(p: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
        return p.argmax(1, keepdim=True)

    monkeypatch.setattr(torch, "multinomial", most_likely)
    drawn = bystanders._sample()
    for prompt, last, new in zip(bystanders.prompts.tokens, bystanders.prompts.last, drawn, strict=True):
        tokens = prompt[: last + 1]
        for token in new:
            assert int(run.dense(tokens[None])[0, -1].argmax()) == int(token)
            tokens = torch.cat([tokens, token[None]])


def test_the_fixed_vector_is_the_mean_over_moved_tokens() -> None:
    edit = torch.zeros(2, 3, 4)
    edit[0, 1], edit[1, 2] = torch.tensor([1.0, 0, 0, 0]), torch.tensor([0, 3.0, 0, 0])
    assert fixed_vector(edit).tolist() == [0.5, 1.5, 0, 0]
    assert fixed_vector(torch.zeros(2, 3, 4)).tolist() == [0, 0, 0, 0]
    effects = [SideEffects(1.0, 0.2, kl, {"with_as": accuracy}, 4.0, 6.0) for kl, accuracy in ((1.0, 0.5), (2.0, 1.0))]
    assert mean_effects(effects) == SideEffects(1.0, 0.2, 1.5, {"with_as": 0.75}, 4.0, 6.0)

"""Answers under edits: batched passes against one whole pass each."""

import pytest
import torch
from support.steering_runs import TASK, p_target

from bridges.run_folder import Run
from interventions import intervene_vector
from interventions.steering import steered_prompts as answers
from interventions.steering.steered_prompts import SteeredPrompts, plain_model, prompts_of
from interventions.tasks.catalogue import get_task, list_tasks


@pytest.mark.parametrize("where", ["read", "stream"])
@pytest.mark.parametrize("site", [0, 3, 4])
def test_batched_edits_equal_one_whole_pass_each(
    dense, run: Run, site: int, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the TransformerLens model, without a cache; of four edits three go into a chunk, and few into a pass."""
    prompts = prompts_of(get_task(TASK, run.tokenizer).sample(20, split="evaluation", seed=0))
    monkeypatch.setattr(answers, "_TOKENS", 24)
    monkeypatch.setattr(answers, "_ENTRIES", 3 * prompts.tokens.numel() * 16)
    edits = torch.randn(4, *prompts.tokens.shape, 16) * prompts.open[..., None]
    steered = SteeredPrompts(plain_model(dense), prompts, site, where)  # type: ignore[arg-type]
    assert 1 < len(steered._groups) < 8
    assert any(group.suffix._absent is not None and group.suffix._absent.any() for group in steered._groups)
    found = steered.answers(edits, (0.4, 1))
    for number, strength in enumerate((0.4, 1)):
        for at, edit in enumerate(edits):
            with intervene_vector(dense, site, edit, strength=strength, where=where):  # type: ignore[arg-type]
                logits = dense(prompts.tokens)
            assert torch.allclose(found.target[number, at], p_target(logits, prompts), rtol=1e-3, atol=1e-7)
    assert (found.target[1] / steered.base.target - 1).abs().max() > 0.05


def test_every_task_is_steered_from_its_own_answer(dense, run: Run) -> None:
    for name in list_tasks():
        prompts = prompts_of(get_task(name, run.tokenizer, max_tokens=64).sample(4, split="evaluation", seed=1))
        base = SteeredPrompts(plain_model(dense), prompts, 1, "read").base
        p = p_target(run.dense(prompts.tokens), prompts)
        own = p_target(run.dense(prompts.tokens), prompts._replace(target=prompts.own_answer))
        assert torch.allclose(base.target, p, rtol=1e-3), name
        assert torch.allclose(base.two_way, p / (p + own), rtol=1e-3), name


def test_what_there_is_to_reach_is_what_the_counterfactual_prompts_have(
    dense, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "_ROWS", 8)  # in parts
    prompts = prompts_of(get_task(TASK, run.tokenizer).sample(20, split="evaluation", seed=0))
    steered = SteeredPrompts(plain_model(dense), prompts, 2, "read")
    here, there = (float(p_target(run.dense(tokens), prompts).mean()) for tokens in prompts[:2])
    assert steered.reach == pytest.approx(there, rel=1e-4)
    steered.reach = 2 * here
    assert [steered.p_at(share) for share in (0.0, 0.05, 1.0)] == pytest.approx([here, 1.05 * here, 2 * here], rel=1e-4)
    steered.reach = here / 2  # nothing to reach
    assert steered.p_at(0.5) == pytest.approx(here, rel=1e-4)

"""The controls' edits, in cases whose answer is known."""

import pytest
import torch
from support.steering_runs import TASK, p_target

from bridges.hybrid import residuals, suffix
from bridges.run_folder import Run
from interventions.steering import edits, ridge, rivals
from interventions.steering.steered_prompts import Prompts, SteeredPrompts, plain_model, prompts_of
from interventions.tasks.catalogue import get_task


@pytest.mark.parametrize("site", range(4))
def test_exact_patch_is_the_models_own_counterfactual(dense, run: Run, prompts: Prompts, site: int) -> None:
    hf = plain_model(dense)
    streams = [residuals(run.dense, tokens) for tokens in (prompts.tokens, prompts.counterfactual)]
    here, there = streams[0][site], streams[1][site]
    own = {
        "stream": run.dense(prompts.counterfactual),
        "read": suffix(run.dense, site + 1, here + run.dense.sublayer(site, there) - there, prompts.tokens),
    }
    for where, logits in own.items():
        edit = rivals.exact_patch(run.dense, site, prompts, where)  # type: ignore[arg-type]
        found = SteeredPrompts(hf, prompts, site, where).answers([edit], (1,))  # type: ignore[arg-type]
        assert torch.allclose(found.target[0, 0], p_target(logits, prompts), rtol=1e-3, atol=1e-7)


def test_drawn_controls_are_as_long_as_the_edit_at_every_token(run: Run, prompts: Prompts) -> None:
    generator = torch.Generator().manual_seed(0)
    norm = torch.rand(*prompts.tokens.shape, 1) * prompts.open[..., None]
    directions = rivals.random_directions(4, 16, generator)
    for edit in rivals.along(directions, norm):
        assert torch.allclose(edit.norm(dim=-1, keepdim=True), norm, atol=1e-6)
    changes = edits.sparse_changes(run, 2, prompts)
    columns = run.bridges.directions(2)
    assert (changes[~prompts.open] == 0).all()
    moved = changes[..., [3, 11]].norm(dim=-1, keepdim=True) > 0
    assert moved.any()
    fresh = list(rivals.untrained_columns(run.bridges, 2, seed=0))
    assert not torch.equal(fresh[0], fresh[1])
    for one in (*rivals.shuffled_columns(columns, 2, generator), *fresh):
        assert one.shape == columns.shape
        edit = edits.scaled(edits.channel_edit(changes, one, [3, 11]), norm)
        assert torch.allclose(edit.norm(dim=-1, keepdim=True), norm * moved, atol=1e-6)


def test_random_channels_are_signed_sums_of_other_columns() -> None:
    drawn = rivals.random_channels(torch.eye(12), {0, 5, 7}, 4, 50, torch.Generator().manual_seed(0))
    assert ((drawn != 0).sum(1) == 4).all()
    assert (drawn[:, [0, 5, 7]] == 0).all()
    assert torch.allclose(drawn[drawn != 0].abs(), torch.tensor(0.5))
    assert (drawn < 0).any()
    assert (drawn > 0).any()
    everything = rivals.random_channels(torch.eye(3), {0, 1, 2}, 3, 2, torch.Generator())
    assert torch.allclose(everything.abs(), torch.full((2, 3), 3**-0.5))


def test_ridge_recovers_a_linear_relation_and_shrinks_noise() -> None:
    x, columns, bias = torch.randn(400, 12) * torch.logspace(-1, 1, 12), torch.randn(12, 5), torch.randn(5)
    exact = ridge.fit_ridge(x, x @ columns + bias)
    assert torch.allclose(exact.columns, columns, atol=1e-4)
    assert torch.allclose(exact.bias, bias, atol=1e-4)
    assert exact.penalty == min(ridge.PENALTIES)
    noise = ridge.fit_ridge(x, torch.randn(400, 5))
    assert noise.penalty > 0.01
    # By hand: variance and covariance are 2/3, and the penalty is in units of the variance.
    one = ridge.fit_ridge(torch.tensor([[-1.0], [0.0], [1.0]]), torch.tensor([[0.0], [1.0], [2.0]]), (0.5,))
    assert float(one.columns) == pytest.approx(1 / 1.5)
    assert float(one.bias) == pytest.approx(1)


def test_difference_of_means_is_one_vector_per_kind_of_token(run: Run) -> None:
    batch = get_task(TASK, run.tokenizer).sample(8, split="selection", seed=0)
    prompts = prompts_of(batch)
    laid_out = rivals.difference_of_means(run.dense, batch, 2, prompts)
    streams = [residuals(run.dense, batch.tokens[:, m])[2] for m in (0, 1)]
    differs = batch.tokens[:, 0] != batch.tokens[:, 1]
    mean = (streams[1] - streams[0])[differs].mean(0)
    assert torch.allclose(laid_out[differs], mean.expand(int(differs.sum()), -1), atol=1e-5)
    assert (laid_out[~prompts.open] == 0).all()
    later = laid_out[prompts.open & ~differs]
    assert torch.equal(later, later[:1].expand_as(later))

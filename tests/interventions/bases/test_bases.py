"""What each basis moves, and what it adds to the dense stream."""

from itertools import pairwise

import pytest
import torch

from bridges.hybrid import residuals
from bridges.run_folder import Run
from interventions.bases.bases import Place, directions, fit_probe, make_bases
from interventions.bases.coders import Coder, sample_site, train_coders
from interventions.bases.result import OURS
from interventions.editing.intervene import intervene_vector
from interventions.steering.edits import channel_edit, sparse_changes
from interventions.steering.logistic import logistic
from interventions.steering.rivals import exact_patch
from interventions.steering.setting import Setting
from interventions.steering.steered_prompts import prompts_of
from sparse_model.data.prepare import prepare_corpus

MLP = 3  # what the second MLP reads; the named channel's site, 2, is read by an attention


def coders(run: Run, site: int, **others: object):
    blocks = prepare_corpus(run.config, run.tokenizer)
    settings = {"kept": (2, 4), "transcoder": False, "tokens": 4096, "seed": 0}
    return train_coders(run, site, blocks.train, blocks.val[:8].long(), **(settings | others))  # type: ignore[arg-type]


@torch.no_grad()
@pytest.mark.parametrize("name", ["principal components", "rotated axes"])
def test_all_axes_together_are_the_exact_patch(name: str, run: Run, setting: Setting) -> None:
    basis = make_bases(run, setting.site, setting.train, {}, 0)[name]
    assert basis.place == Place(setting.site, "read")
    torch.testing.assert_close(basis.columns @ basis.columns.T, torch.eye(run.dense.d_model), atol=1e-5, rtol=0)
    everything = list(range(run.dense.d_model))
    edit = channel_edit(basis.changes(setting.prompts), basis.columns, everything)
    exact = exact_patch(run.dense, setting.site, setting.prompts, "read")
    torch.testing.assert_close(edit, exact, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(channel_edit(basis.changes(setting.prompts), basis.columns, everything[:4]), exact)


@torch.no_grad()
def test_components_are_in_the_order_of_their_variance(run: Run, setting: Setting) -> None:
    basis = make_bases(run, setting.site, setting.train, {}, 0)["principal components"]
    read = sample_site(run, setting.site, setting.train).read
    variance = (read @ basis.columns.T).var(0)
    assert variance.sum() == pytest.approx(float(read.var(0).sum()), rel=1e-4)
    assert all(a >= b - 1e-5 for a, b in pairwise(variance))


@torch.no_grad()
def test_the_sparse_channels_are_those_of_a_steering_experiment(run: Run, setting: Setting) -> None:
    basis = make_bases(run, setting.site, setting.train, {}, 0)[OURS]
    torch.testing.assert_close(basis.changes(setting.prompts), sparse_changes(run, setting.site, setting.prompts))
    torch.testing.assert_close(basis.columns, run.bridges.decoders[setting.site].weight.T)


@torch.no_grad()
def test_a_coder_keeps_the_largest_positive_latents() -> None:
    coder = Coder(6, 6, 10, 3, torch.Generator().manual_seed(0))
    coder.encoder.bias += 0.1
    coder.centre += 0.2
    coder.scale *= 3
    x = torch.randn(7, 6, generator=torch.Generator().manual_seed(1))
    for row, found in zip(x, coder.latents(x), strict=True):
        by_hand = [float(w @ (row - 0.2)) + 0.1 for w in coder.encoder.weight]
        kept = sorted(range(10), key=by_hand.__getitem__)[-3:]
        expected = torch.tensor([max(v, 0.0) if c in kept else 0.0 for c, v in enumerate(by_hand)])
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(coder(x), 3 * (coder.latents(x) @ coder.columns + coder.bias))
    with pytest.raises(ValueError, match="kept=11: an autoencoder of 10 latents can keep 1 to 10"):
        Coder(6, 6, 10, 11, torch.Generator())


def test_coders_learn_what_they_are_for(run: Run) -> None:
    """More text and more latents are less error; every column keeps length 1; the error is that of held-out text."""
    short, long = coders(run, MLP, transcoder=True), coders(run, MLP, transcoder=True, tokens=160_000)
    assert list(long) == ["TopK autoencoder, k 2", "TopK autoencoder, k 4", "transcoder, k 4"]
    assert all(long[name].nmse < short[name].nmse for name in long)
    assert long["TopK autoencoder, k 4"].nmse < long["TopK autoencoder, k 2"].nmse < 0.6
    assert long["transcoder, k 4"].nmse < 0.95
    text = prepare_corpus(run.config, run.tokenizer).val[:8].long()
    here, there = residuals(run.dense, text)[MLP : MLP + 2]
    read, written = torch.nn.functional.layer_norm(here, here.shape[-1:]), there - here
    for name, target in (("TopK autoencoder, k 4", read), ("transcoder, k 4", written)):
        coder = long[name].coder
        torch.testing.assert_close(coder.columns.norm(dim=1), torch.ones(len(coder.columns)))
        error = (coder(read) - target).square().sum() / (target - target.flatten(0, 1).mean(0)).square().sum()
        assert long[name].nmse == pytest.approx(float(error), rel=1e-3)
        assert long[name].unused == int((coder.latents(read) == 0).flatten(0, 1).all(0).sum())


@torch.no_grad()
def test_a_transcoders_latents_move_what_its_sublayer_writes(run: Run, setting: Setting) -> None:
    trained = coders(run, MLP, transcoder=True)
    basis = make_bases(run, MLP, setting.train, trained, 0)["transcoder, k 4"]
    coder, prompts = trained["transcoder, k 4"].coder, setting.prompts
    assert basis.place == Place(MLP + 1, "stream")
    reads = [
        torch.nn.functional.layer_norm(residuals(run.dense, tokens)[MLP], (run.dense.d_model,))
        for tokens in (prompts.tokens, prompts.counterfactual)
    ]
    edit = channel_edit(basis.changes(prompts), basis.columns, range(len(coder.columns)))
    expected = (coder(reads[1]) - coder(reads[0])) * prompts.open[..., None]
    torch.testing.assert_close(edit, expected, atol=1e-4, rtol=1e-4)


def test_a_logistic_regression_is_at_its_optimum() -> None:
    """Where the gradient, written out, is zero: X' (p - y) / n + 2 penalty w."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 5, generator=generator).double()
    y = (x[:, 0] + torch.randn(40, generator=generator) > 0.3).double()
    weights, intercept = logistic(x, y, 0.01, steps=200)
    left = torch.sigmoid(x @ weights + intercept) - y
    torch.testing.assert_close(x.T @ left / 40 + 0.02 * weights, torch.zeros(5).double(), atol=1e-4, rtol=0)
    assert float(left.mean()) == pytest.approx(0, abs=1e-5)


@torch.no_grad()
def test_the_probe_points_to_the_counterfactual(run: Run, setting: Setting) -> None:
    selection = prompts_of(setting.selection)
    probe = fit_probe(run.dense, setting.site, selection)
    assert float(probe.norm()) == pytest.approx(1)
    here, there = (residuals(run.dense, t)[setting.site] for t in (selection.tokens, selection.counterfactual))
    d = (run.dense.d_model,)
    apart = (torch.nn.functional.layer_norm(there, d) - torch.nn.functional.layer_norm(here, d)) @ probe
    assert float(apart[selection.open].mean()) > 0


@torch.no_grad()
def test_directions_are_made_from_selection_prompts(run: Run, setting: Setting) -> None:
    made = directions(run.dense, setting.site, setting.selection)
    edits = {name: make(setting.prompts) for name, make in made.items()}
    assert list(edits) == ["difference of means", "difference of means, last token", "logistic probe"]
    row = torch.arange(len(setting.prompts.last))
    last = edits["difference of means, last token"]
    torch.testing.assert_close(last[row, setting.prompts.last], edits["difference of means"][row, setting.prompts.last])
    assert int((last.norm(dim=-1) > 0).sum()) == len(row)
    moved = edits["logistic probe"].norm(dim=-1) > 0
    assert torch.equal(moved, setting.prompts.open)
    with intervene_vector(setting.hf, setting.site, edits["difference of means"], where="read"):
        pass  # an edit of the shape that interventions take

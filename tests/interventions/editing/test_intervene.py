"""intervene(): a predicted effect must equal the measured one, on small random models."""

import copy
from pathlib import Path

import pytest
import torch
from support.helpers import CHANNEL, make_tiny_run

from bridges.hybrid import residuals, suffix
from bridges.run_folder import Run
from interventions import intervene, intervene_vector, load_dense
from interventions.bundle.bundle import get_bundle
from interventions.bundle.channels import load_channels, residual_reads
from interventions.editing.vectors import channel_direction


def run_from_read(run: Run, site: int, resid: torch.Tensor, change: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The dense suffix from a site whose reading norm's output is changed: written on the HF modules."""
    body = run.dense.hf.transformer
    if site == 2 * run.dense.n_layers:
        return run.dense.hf.lm_head(body.ln_f(resid) + change)
    block = body.h[site // 2]
    if site % 2 == 0:
        after = resid + block.attn(block.ln_1(resid) + change)[0]
    else:
        after = resid + block.mlp(block.ln_2(resid) + change)
    return suffix(run.dense, site + 1, after, tokens)


def norm_of(run: Run, site: int) -> torch.nn.LayerNorm:
    body = run.dense.hf.transformer
    if site == 2 * run.dense.n_layers:
        return body.ln_f
    return body.h[site // 2].ln_1 if site % 2 == 0 else body.h[site // 2].ln_2


def test_the_lens_model_is_the_hf_model(dense, run: Run, tokens: torch.Tensor) -> None:
    assert torch.allclose(dense(tokens), run.dense.hf(tokens).logits, atol=2e-5)
    assert run.dense.hf.config._attn_implementation == "sdpa"
    assert get_bundle(dense).channels == {"pair": CHANNEL}


@pytest.mark.parametrize("site", range(5))
def test_stream_edit_equals_a_direct_edit_at_every_site(dense, run: Run, tokens: torch.Tensor, site: int) -> None:
    v = torch.randn(16)
    resid = residuals(run.dense, tokens)[site]
    with intervene_vector(dense, site, v, where="stream", strength=0.7):
        measured = dense(tokens)
    predicted = suffix(run.dense, site, resid + 0.7 * v, tokens)
    assert torch.allclose(measured, predicted, atol=3e-5)
    assert (predicted - dense(tokens)).abs().max() > 0.01


@pytest.mark.parametrize("site", range(5))
def test_read_edit_changes_only_the_next_read(dense, run: Run, tokens: torch.Tensor, site: int) -> None:
    v = torch.randn(16)
    resid = residuals(run.dense, tokens)[site]
    norm = norm_of(run, site)
    std = (resid.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
    with intervene_vector(dense, site, v):
        measured = dense(tokens)
    predicted = run_from_read(run, site, resid, norm.weight * (v - v.mean()) / std, tokens)
    assert torch.allclose(measured, predicted, atol=3e-5)


@pytest.mark.parametrize("site", range(5))
def test_read_edit_is_the_norms_response_to_a_small_stream_change(run: Run, tokens: torch.Tensor, site: int) -> None:
    """The documented formula against a finite difference, up to the change of the scale itself."""
    resid = residuals(run.dense, tokens)[site].double()
    norm = norm_of(run, site).double()
    try:
        v = torch.randn(16, dtype=torch.float64)
        centred = resid - resid.mean(-1, keepdim=True)
        # The part of v along the stream changes std instead; the formula is the response at fixed std.
        v = v - v.mean()
        v = v - (v * centred).sum(-1, keepdim=True) / centred.square().sum(-1, keepdim=True) * centred
        step = 1e-5
        measured = (norm(resid + step * v) - norm(resid - step * v)) / (2 * step)
        std = (resid.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
        assert torch.allclose(measured, norm.weight * (v - v.mean(-1, keepdim=True)) / std, atol=1e-6)
    finally:
        norm.float()


def test_delta_moves_along_the_decoder_in_units_of_the_sparse_rms(dense, run: Run, tokens: torch.Tensor) -> None:
    weight, resid = run.bridges.decoders[2].weight, residuals(run.dense, tokens)[2]
    column = weight[:, 3] - 0.5 * weight[:, 11]
    direction = run.bridges.encode(2, resid).square().mean(-1, keepdim=True).sqrt() * column
    with intervene(dense, channel="pair", delta=-3, where="stream") as handle:
        measured = dense(tokens)
    assert torch.allclose(handle.vector(), -3 * run.bridges.rms_sparse[2] * column)
    predicted = suffix(run.dense, 2, resid - 3 * direction, tokens)
    assert torch.allclose(measured, predicted, atol=3e-5)
    rows = torch.tensor([2.0, -1.0])
    with intervene(dense, "pair", delta=rows, where="stream"):
        measured = dense(tokens)
    predicted = suffix(run.dense, 2, resid + rows[:, None, None] * direction, tokens)
    assert torch.allclose(measured, predicted, atol=3e-5)


def test_vector_of_a_read_edit_is_what_is_added_at_the_mean_scale(dense, run: Run) -> None:
    handle = intervene(dense, "pair", delta=2.0)
    stream = intervene(dense, "pair", delta=2.0, where="stream").vector()
    expected = norm_of(run, 2).weight * (stream - stream.mean()) / run.bridges.std_dense[2]
    assert torch.allclose(handle.vector(), expected)


def test_identity_decoder_steers_like_a_direct_edit_of_the_dense_channel(tmp_path: Path) -> None:
    run = make_tiny_run(tmp_path / "run", d_dense=16, d_sparse=16)
    dense = load_dense(run.folder)
    bundle_run = get_bundle(dense).run
    with torch.no_grad():
        bundle_run.bridges.decoders[1].weight.copy_(torch.eye(16))
        bundle_run.bridges.encoders[1].weight.copy_(torch.eye(16))
    bundle_run.bridges.encoder_k = 16
    tokens = torch.randint(384, (2, 9))
    edited = residuals(run.dense, tokens)[1]
    edited[..., 7] += 2.5 * edited.square().mean(-1).sqrt()
    with intervene(dense, "mlp.0.read.7", delta=2.5, where="stream"):
        assert torch.allclose(dense(tokens), suffix(run.dense, 1, edited, tokens), atol=3e-5)


def test_toward_adds_the_scaled_difference_of_the_sparse_reads(dense, run: Run, tokens: torch.Tensor) -> None:
    other = tokens.clone()
    other[:, 4] = (other[:, 4] + 7) % 384
    change = (residual_reads(run.sparse, other, 2) - residual_reads(run.sparse, tokens, 2))[..., [3, 11]]
    rms = residuals(run.sparse, tokens)[2].square().mean(-1, keepdim=True).sqrt()
    v = rms * change @ run.bridges.decoders[2].weight[:, [3, 11]].T
    resid = residuals(run.dense, tokens)[2]
    for strength in (0.5, 1.0):
        with intervene(dense, "pair", toward=other, strength=strength, where="stream"):
            measured = dense(tokens)
        assert torch.allclose(measured, suffix(run.dense, 2, resid + strength * v, tokens), atol=3e-5)
    assert torch.equal(v[:, :4], torch.zeros_like(v[:, :4]))


def test_toward_follows_tokens_that_are_changed_in_place(dense, tokens: torch.Tensor) -> None:
    other, prompt = tokens.flip(1), tokens.clone()
    handle = intervene(dense, "pair", toward=other, strength=3)
    with handle:
        dense(prompt)
        prompt[:, 2:] = (prompt[:, 2:] + 5) % 384
        again = dense(prompt)
    with intervene(dense, "pair", toward=other, strength=3):
        assert torch.equal(again, dense(prompt.clone()))


def test_residual_reads_divide_out_the_gain(run: Run, tokens: torch.Tensor) -> None:
    """The node is the normalised value before the gain, where AbsTopK lets it through."""
    gain = run.sparse.blocks[1].ln1.weight
    with torch.no_grad():
        gain.copy_(torch.rand(32) + 0.5)
        gain[5] = 0
        resid = residuals(run.sparse, tokens)[2]
        nodes = residual_reads(run.sparse, tokens, 2)
        normalised = resid / resid.square().mean(-1, keepdim=True).sqrt()
        gain.fill_(1)
    kept = nodes != 0
    assert kept.sum(-1).max() <= 8
    assert torch.allclose(nodes[kept], normalised[kept], rtol=1e-4)
    assert (nodes[..., 5] == 0).all()


def test_set_to_moves_the_channel_as_the_encoder_reads_it(dense, run: Run, tokens: torch.Tensor) -> None:
    resid = residuals(run.dense, tokens)[2]
    encoded = run.bridges.encode(2, resid)
    rms = encoded.square().mean(-1, keepdim=True).sqrt()
    read = encoded / rms
    now = (read[..., 3] - 0.5 * read[..., 11]) / 1.25
    weight = run.bridges.decoders[2].weight
    direction = rms * (weight[:, 3] - 0.5 * weight[:, 11])
    with intervene(dense, "pair", set_to=1.5, where="stream"):
        measured = dense(tokens)
    predicted = suffix(run.dense, 2, resid + (1.5 - now)[..., None] * direction, tokens)
    assert torch.allclose(measured, predicted, atol=3e-5)


def test_nothing_changes_at_zero_or_after_exit(dense, tokens: torch.Tensor) -> None:
    before = dense(tokens)
    hooks = {name: list(point.fwd_hooks) for name, point in dense.hook_dict.items()}
    for handle in (
        intervene(dense, "pair", delta=0),
        intervene(dense, "pair", delta=0, where="stream"),
        intervene(dense, "pair", toward=tokens.flip(1), strength=0),
    ):
        with handle:
            assert torch.equal(dense(tokens), before)
    with pytest.raises(RuntimeError, match="inside"), intervene(dense, "pair", delta=5):
        raise RuntimeError("inside")
    assert {name: list(point.fwd_hooks) for name, point in dense.hook_dict.items()} == hooks
    assert torch.equal(dense(tokens), before)


def test_a_users_own_hooks_stay_and_interventions_survive_run_with_hooks(dense, tokens: torch.Tensor) -> None:
    seen: list[int] = []

    def spy(value: torch.Tensor, hook: object) -> None:
        seen.append(1)

    dense.add_hook("blocks.1.ln1.hook_out", spy)
    handle = intervene(dense, "pair", delta=4)
    with handle:
        steered = dense(tokens)
        with handle:  # entered twice: applied twice
            twice = dense(tokens)
        again = dense.run_with_hooks(tokens, fwd_hooks=[("blocks.0.hook_mlp_out", spy)])
    assert torch.equal(steered, again)
    assert not torch.allclose(steered, twice)
    count = len(seen)
    dense(tokens)
    assert len(seen) == count + 1
    dense.reset_hooks()


def test_sum_equals_nesting_and_hooks_equal_the_context(dense, tokens: torch.Tensor) -> None:
    a, b = intervene(dense, "pair", delta=2), intervene(dense, "mlp.1.read.9", delta=-1, where="stream")
    with a + b:
        together = dense(tokens)
    with a, b:
        nested = dense(tokens)
    hooked = dense.run_with_hooks(tokens, fwd_hooks=(a + b).hooks())
    assert torch.allclose(together, nested, atol=1e-6)
    assert torch.equal(together, hooked)


def test_positions_select_tokens(dense, run: Run, tokens: torch.Tensor) -> None:
    v = torch.randn(16)
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[:, 5] = mask[:, 6] = True
    resid = residuals(run.dense, tokens)[2]
    predicted = suffix(run.dense, 2, resid + mask[..., None] * v, tokens)
    for positions in (mask, [5, 6], slice(5, 7), [-7, -6], lambda t: mask):
        with intervene_vector(dense, 2, v, where="stream", positions=positions):
            assert torch.allclose(dense(tokens), predicted, atol=3e-5), positions


def test_generation_with_and_without_cache_agree(dense, tokens: torch.Tensor) -> None:
    other = tokens.flip(1)
    for handle in (
        intervene(dense, "pair", delta=6),
        intervene(dense, "pair", toward=other, strength=3.0),
        intervene(dense, "mlp.0.read.4", delta=5, positions=[3, 11], where="stream"),
        intervene(dense, "pair", set_to=3.0, where="stream"),
    ):
        with handle:
            options = {"max_new_tokens": 8, "do_sample": False, "verbose": False, "stop_at_eos": False}
            cached = dense.generate(tokens, use_past_kv_cache=True, **options)
            uncached = dense.generate(tokens, use_past_kv_cache=False, **options)
        assert torch.equal(cached, uncached)


def test_a_prompt_longer_than_the_context_is_named(dense) -> None:
    with pytest.raises(ValueError, match="has 65 tokens but the model's context holds 64"):
        dense(torch.randint(384, (1, 65)))
    with pytest.raises(ValueError, match="has 65 tokens but the model's context holds 64"):
        dense.generate(torch.randint(384, (1, 60)), max_new_tokens=8, verbose=False, stop_at_eos=False)


def test_bad_requests_are_named(dense, tokens: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="unknown channel 'pear': did you mean pair"):
        intervene(dense, "pear", delta=1)
    with pytest.raises(ValueError, match=r"no attn\.7; sites are attn\.0"):
        intervene(dense, "attn.7.read.1", delta=1)
    with pytest.raises(ValueError, match="index 99 is out of range, the sparse stream has 32"):
        intervene(dense, "attn.1.read.99", delta=1)
    with pytest.raises(ValueError, match="exactly one of delta, set_to, toward"):
        intervene(dense, "pair")
    with pytest.raises(ValueError, match=r"site 9 is out of range: 2 layers have sites 0 \.\. 4"):
        intervene_vector(dense, 9, torch.zeros(16))
    with pytest.raises(ValueError, match="width 5, the dense stream 16"):
        intervene_vector(dense, 0, torch.zeros(5))
    with pytest.raises(ValueError, match="aligned token by token"), intervene(dense, "pair", toward=tokens[:, :5]):
        dense(tokens)
    rows = intervene(dense, "pair", delta=torch.ones(3))
    with pytest.raises(ValueError, match="delta has 3 rows but the batch has 2"), rows:
        dense(tokens)
    foreign = intervene(load_dense(make_tiny_run(tmp_path / "other").folder), "attn.0.read.1", delta=1)
    with pytest.raises(ValueError, match="belong to different models"):
        _ = intervene(dense, "pair", delta=1) + foreign
    (tmp_path / "other" / "channels.json").write_text('{"x": {"name"')
    with pytest.raises(ValueError, match=r"channels\.json is damaged"):
        load_channels(tmp_path / "other")


def test_a_channels_direction_is_in_the_precision_of_the_bridges(run) -> None:
    bridges = copy.deepcopy(run.bridges).double()
    direction = channel_direction(bridges, CHANNEL)
    weight = bridges.decoders[2].weight.detach()
    assert direction.dtype == torch.float64
    torch.testing.assert_close(direction, weight[:, 3] - 0.5 * weight[:, 11])


@pytest.mark.parametrize("where", ["read", "stream"])
def test_other_hooks_come_and_go_and_leave_the_edit_alone(dense, tokens: torch.Tensor, where: str) -> None:
    plain = dense(tokens)
    with intervene(dense, channel="pair", delta=3.0, where=where):
        edited = dense(tokens)
        assert not torch.equal(edited, plain)
        points = ("blocks.1.ln1.hook_in", "blocks.1.ln1.hook_out", "blocks.1.hook_resid_pre")
        hooks = [(name, lambda value, hook: None) for name in points]
        assert torch.equal(dense.run_with_hooks(tokens, fwd_hooks=hooks), edited)
        assert torch.equal(dense(tokens), edited)
        dense.reset_hooks()
        assert torch.equal(dense(tokens), edited)
    assert torch.equal(dense(tokens), plain)


def test_a_vector_per_token_is_added_to_the_prompt_and_to_nothing_after_it(dense, run, tokens: torch.Tensor) -> None:
    vectors = torch.randn(2, 12, 16)
    longer = torch.cat([tokens, torch.randint(384, (2, 3))], 1)
    with intervene_vector(dense, 2, vectors, where="stream", strength=2.0):
        for shown in (tokens, longer):  # the second pass continues the first one's prompt
            change = torch.nn.functional.pad(2 * vectors, (0, 0, 0, shown.shape[1] - 12))
            expected = suffix(run.dense, 2, residuals(run.dense, shown)[2] + change, shown)
            torch.testing.assert_close(dense(shown), expected, rtol=1e-4, atol=1e-4)


def test_no_positions_are_no_tokens(dense, tokens: torch.Tensor) -> None:
    plain = dense(tokens)
    for steps in ("all", "prompt"):
        with intervene(dense, channel="pair", delta=3.0, positions=[], steps=steps):
            assert torch.equal(dense(tokens), plain)


def test_positions_reach_to_both_ends_of_the_context(dense) -> None:
    for position in (-64, 63):
        intervene(dense, channel="pair", delta=1.0, positions=position)
    for position in (-65, 64):
        with pytest.raises(IndexError, match=f"positions={position} is out of range: the model's context holds 64"):
            intervene(dense, channel="pair", delta=1.0, positions=position)

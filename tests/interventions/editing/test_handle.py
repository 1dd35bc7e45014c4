"""The handle itself: what it attaches and takes off, how handles compose, what it refuses."""

from pathlib import Path

import pytest
import torch
from support.helpers import CHANNEL

from bridges.hybrid import residuals, suffix
from bridges.run_folder import Run
from interventions import Intervention, intervene, intervene_vector, load_dense
from interventions.bundle.bundle import get_bundle


def hooks_of(dense) -> dict[str, list]:
    """Every hook on every module, TransformerLens' own lists included."""
    found = {}
    for name, module in dense.named_modules():
        found[name] = [list(module._forward_hooks), list(module._forward_pre_hooks)]
        if hasattr(module, "fwd_hooks"):
            found[name].append([id(h) for h in module.fwd_hooks])
    return found


EVERYWHERE = [
    (f"{site}.read.5", where) for site in ("attn.0", "mlp.0", "mlp.1", "unembed") for where in ("read", "stream")
]


@pytest.mark.parametrize(("address", "where"), EVERYWHERE)
def test_only_its_own_hooks_come_off_also_after_an_exception(dense, tokens: torch.Tensor, address: str, where: str):
    calls: list[str] = []

    def temporary(value: torch.Tensor, hook) -> None:
        calls.append("temporary")

    def permanent(value: torch.Tensor, hook) -> None:
        calls.append("permanent")

    for name in ("blocks.0.ln2.hook_out", "blocks.1.hook_attn_out", "ln_final.hook_out", "blocks.0.hook_resid_pre"):
        dense.add_hook(name, temporary)
        dense.add_hook(name, permanent, is_permanent=True)
    try:
        plain, before = dense(tokens), hooks_of(dense)
        with intervene(dense, address, delta=4, where=where):
            assert hooks_of(dense) != before
            assert not torch.equal(dense(tokens), plain)
        assert hooks_of(dense) == before
        with pytest.raises(RuntimeError, match="inside"), intervene(dense, address, delta=4, where=where):
            raise RuntimeError("inside")
        assert hooks_of(dense) == before
        calls.clear()
        assert torch.equal(dense(tokens), plain)
        assert calls.count("temporary") == calls.count("permanent") == 4
    finally:
        dense.reset_hooks(including_permanent=True)


def test_a_failed_enter_leaves_nothing(dense, monkeypatch: pytest.MonkeyPatch) -> None:
    before = hooks_of(dense)

    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("no hook here")

    monkeypatch.setattr(dense.hook_dict["blocks.0.hook_attn_out"], "add_hook", fail)
    handle = intervene(dense, ["attn.1.read.2", "mlp.0.read.1"], delta=1, where="stream")
    with pytest.raises(RuntimeError, match="no hook here"):
        handle.__enter__()
    assert hooks_of(dense) == before


def test_handles_are_left_in_any_order_and_count_their_entries(dense, tokens: torch.Tensor) -> None:
    a, b = intervene(dense, "pair", delta=2), intervene(dense, "mlp.1.read.9", delta=-1, where="stream")
    plain, before = dense(tokens), hooks_of(dense)
    with a:
        only_a = dense(tokens)
    with b:
        only_b = dense(tokens)
    a.__enter__()
    b.__enter__()
    a.__exit__(None, None, None)
    assert torch.equal(dense(tokens), only_b)
    a.__enter__()
    a.__enter__()
    b.__exit__(None, None, None)
    with intervene(dense, "pair", delta=4):
        doubled = dense(tokens)
    doubled_b = dense(tokens)
    a.__exit__(None, None, None)
    assert torch.equal(dense(tokens), only_a)
    a.__exit__(None, None, None)
    with intervene(dense, "pair", delta=4):
        assert torch.allclose(doubled_b, dense(tokens), atol=1e-5)
    assert not torch.allclose(doubled, doubled_b, atol=1e-2)
    assert hooks_of(dense) == before
    assert torch.equal(dense(tokens), plain)


def test_set_to_sees_the_stream_edits_before_it(dense, run: Run, tokens: torch.Tensor) -> None:
    """The documented order: at one place in order of attachment, otherwise where the edit sits."""
    move = intervene(dense, "attn.1.read.5", delta=3, where="stream")
    fix = intervene(dense, "attn.1.read.5", set_to=1.0, where="stream")
    resid = residuals(run.dense, tokens)[2]

    def moved(stream: torch.Tensor, *, fixed: bool) -> torch.Tensor:
        encoded = run.bridges.encode(2, stream)
        rms = encoded.square().mean(-1, keepdim=True).sqrt()
        change = 1.0 - encoded[..., 5:6] / rms if fixed else 3
        return stream + change * rms * run.bridges.decoders[2].weight[:, 5]

    first = moved(moved(resid, fixed=False), fixed=True)
    second = moved(moved(resid, fixed=True), fixed=False)
    assert not torch.allclose(first, second, atol=1e-2)
    for handle, expected in ((move + fix, first), (fix + move, second)):
        with handle:
            assert torch.allclose(dense(tokens), suffix(run.dense, 2, expected, tokens), atol=3e-5)
    with move, fix:
        assert torch.allclose(dense(tokens), suffix(run.dense, 2, first, tokens), atol=3e-5)
    early = intervene(dense, "attn.0.read.5", delta=3, where="stream")
    with fix + early:
        one = dense(tokens)
    with early + fix:
        assert torch.equal(dense(tokens), one)


def test_zero_is_the_model_without_hooks_bit_for_bit(dense, tokens: torch.Tensor) -> None:
    plain, before = dense(tokens), hooks_of(dense)
    for options in (
        {"delta": 0},
        {"delta": 7, "strength": 0},
        {"set_to": 3.0, "strength": 0},
        {"toward": tokens.flip(1), "strength": 0.0},
        {"delta": torch.zeros(2)},
        {"delta": 7, "steps": "generated"},
    ):
        for where in ("read", "stream"):
            with intervene(dense, ["pair", "mlp.0.read.2"], where=where, **options):
                assert torch.equal(dense(tokens), plain), options
    with intervene(dense, {"pair": 1.0, "mlp.0.read.2": 2}, delta=0):
        assert hooks_of(dense) == before
    rows = intervene(dense, "pair", delta=torch.tensor([0.0, 5.0]), where="stream")
    with rows:
        assert torch.equal(dense(tokens)[0], plain[0])


def test_strength_scales_every_kind_of_change(dense, run: Run, tokens: torch.Tensor) -> None:
    resid = residuals(run.dense, tokens)[2]

    def moved(**options) -> torch.Tensor:
        kept = []
        with intervene(dense, "pair", where="stream", **options):
            dense.run_with_hooks(
                tokens, fwd_hooks=[("blocks.1.ln1.hook_in", lambda value, hook: kept.append(value))], return_type=None
            )
        return kept[0] - resid

    for options in ({"delta": 4}, {"set_to": 3.0}, {"toward": tokens.flip(1)}, {"delta": torch.tensor([1.0, 5.0])}):
        full = moved(**options)
        assert full.abs().max() > 0.1
        assert torch.allclose(moved(**options, strength=0.25), 0.25 * full, atol=1e-5)


def test_several_channels_with_weights(dense, run: Run, tokens: torch.Tensor) -> None:
    d2 = run.bridges.rms_sparse[2] * (run.bridges.decoders[2].weight @ torch.eye(32)[5])
    handle = intervene(dense, {"attn.1.read.5": 1.0, "attn.1.read.7": -0.5}, delta=2.0, where="stream")
    d7 = run.bridges.rms_sparse[2] * run.bridges.decoders[2].weight[:, 7]
    assert torch.allclose(handle.vector(), 2 * d2 - d7, atol=1e-6)
    with handle:
        resid = residuals(run.dense, tokens)[2]
        for change in (2 * d2, -d7):  # the second reads its scale in the stream that the first has left
            scale = run.bridges.encode(2, resid).square().mean(-1, keepdim=True).sqrt() / run.bridges.rms_sparse[2]
            resid = resid + scale * change
        expected = suffix(run.dense, 2, resid, tokens)
        assert torch.allclose(dense(tokens), expected, atol=3e-5)
    both = {"pair": 1.0, "mlp.1.read.9": -0.5}
    for options in ({"delta": 2.0}, {"toward": tokens.flip(1), "strength": 0.8}):
        single = {"delta": -1.0} if "delta" in options else options | {"strength": -0.4}
        with intervene(dense, both, **options):
            together = dense(tokens)
        with intervene(dense, "pair", **options) + intervene(dense, "mlp.1.read.9", **single):
            assert torch.allclose(dense(tokens), together, atol=1e-6)
    with intervene(dense, both, set_to=2.0):
        together = dense(tokens)
    with intervene(dense, "pair", set_to=2.0) + intervene(dense, "mlp.1.read.9", set_to=-1.0):
        assert torch.equal(dense(tokens), together)
    with intervene(dense, ["pair", CHANNEL], delta=1):
        twice = dense(tokens)
    with intervene(dense, "pair", delta=2):
        assert torch.allclose(twice, dense(tokens), atol=1e-5)
    with pytest.raises(ValueError, match="several places"):
        intervene(dense, both, delta=1).vector()
    with pytest.raises(ValueError, match="channel is empty"):
        intervene(dense, [], delta=1)
    with pytest.raises(KeyError, match="unknown channel 'pear': did you mean pair"):
        intervene(dense, {"pair": 1, "pear": 1}, delta=1)


def test_positions_that_nothing_reaches_are_reported(dense, tokens: torch.Tensor) -> None:
    v, mask = torch.randn(16), torch.zeros(2, 20, dtype=torch.bool)
    mask[:, 15] = True
    for positions, named in ((40, 40), ([3, 12], 12), (torch.tensor([13]), 13), (mask, 15)):
        expected = pytest.raises(IndexError, match=f"positions={named} is out of range for 12 tokens")
        with expected, intervene_vector(dense, 2, v, positions=positions):
            dense(tokens)
        handle = intervene_vector(dense, 2, v, positions=positions)
        with expected:
            dense.run_with_hooks(tokens, fwd_hooks=handle.hooks())
    before = intervene_vector(dense, 2, v, positions=-13)
    with pytest.raises(IndexError, match="positions=-13 is out of range for 12 tokens"), before:
        dense(tokens)
    with pytest.raises(IndexError, match="positions=64 is out of range: the model's context holds 64"):
        intervene_vector(dense, 2, v, positions=[0, 64])
    handle = intervene_vector(dense, 2, v, positions=40)
    with pytest.raises(ZeroDivisionError), handle:  # the block's own error is the one to see
        dense(tokens)[0, 0, 0] // (1 // 0)
    with intervene_vector(dense, 2, v, positions=40):
        pass
    padding = torch.ones_like(tokens)
    padding[:, :2] = 0
    with pytest.raises(IndexError, match="out of range for 10 tokens"), intervene_vector(dense, 2, v, positions=11):
        dense(tokens, attention_mask=padding)


def test_selections_that_do_not_fit_are_named(dense, tokens: torch.Tensor) -> None:
    v = torch.randn(16)
    for positions, message in (
        (torch.ones(3, 12, dtype=torch.bool), "positions has 3 rows but the batch has 2"),
        (lambda t: t, r"positions gave torch.int64 of shape \(2, 12\)"),
        (lambda t: (t > 5)[:, 1:], r"positions gave torch.bool of shape \(2, 11\)"),
    ):
        with pytest.raises(ValueError, match=message), intervene_vector(dense, 2, v, positions=positions):
            dense(tokens)
    with pytest.raises(ValueError, match="the step must be at least 1"):
        intervene_vector(dense, 2, v, positions=slice(None, None, -1))
    short = intervene_vector(dense, 2, torch.ones(2, 5, 16))
    with pytest.raises(ValueError, match=r"vector has shape \(2, 5, 16\) but the prompt \(2, 12\)"), short:
        dense(tokens)
    with pytest.raises(RuntimeError, match="outside a forward pass"), intervene(dense, "pair", delta=1):
        dense.blocks[1](torch.randn(1, 3, 16))


def test_gradients_flow_through_the_edit_and_into_a_vector(dense, tokens: torch.Tensor) -> None:
    for where in ("read", "stream"):
        v = torch.randn(16, requires_grad=True)

        def loss(vector: torch.Tensor, where: str = where) -> torch.Tensor:
            with intervene_vector(dense, 1, vector, where=where, positions=slice(4, None)):
                return dense(tokens).square().mean()

        (gradient,) = torch.autograd.grad(loss(v), v)
        direction, step = gradient / gradient.norm(), 1e-2
        with torch.no_grad():
            measured = (loss(v + step * direction) - loss(v - step * direction)) / (2 * step)
        assert float(gradient.norm()) == pytest.approx(float(measured), rel=0.02)


def test_inference_mode_no_grad_and_later_gradients(dense, tokens: torch.Tensor) -> None:
    """A handle used in inference mode first must not hand inference tensors to autograd afterwards."""
    embedded = {}

    def embed(value: torch.Tensor, hook) -> torch.Tensor:
        embedded["x"] = value.detach().clone().requires_grad_()
        return embedded["x"]

    for options in ({"delta": 3}, {"toward": tokens.flip(1)}, {"set_to": 2.0}):
        handle = intervene(dense, "pair", **options)
        with handle:
            with torch.inference_mode():
                first = dense(tokens)
            with torch.no_grad():
                second = dense(tokens)
            logits = dense.run_with_hooks(tokens, fwd_hooks=[("embed.hook_out", embed)])
            logits.logsumexp(-1).sum().backward()
        assert torch.equal(first, second)
        assert torch.allclose(logits, second, atol=1e-6)
        assert embedded["x"].grad.abs().max() > 0


@torch.no_grad()
@pytest.mark.parametrize("where", ["read", "stream"])
def test_a_bfloat16_model_is_steered_in_its_own_type(folder: Path, tokens: torch.Tensor, where: str) -> None:
    low, full = load_dense(folder).to(torch.bfloat16), load_dense(folder)
    for address in ("attn.1.read.4", "mlp.1.read.4", "unembed.read.4"):
        for options in ({"delta": 4}, {"set_to": 6.0}, {"toward": tokens.flip(1), "strength": 3}):
            changes = []
            for model in (low, full):
                with intervene(model, address, where=where, **options):
                    steered = model(tokens)
                assert steered.dtype == next(model.parameters()).dtype
                changes.append(steered.float() - model(tokens).float())
            assert (changes[0] - changes[1]).norm() < 0.1 * changes[1].norm(), (address, options)
    assert get_bundle(low).bridges.rms_sparse.dtype == torch.float32


@torch.no_grad()
def test_half_precision_is_rounded_once_at_the_end(folder: Path, tokens: torch.Tensor) -> None:
    low = load_dense(folder).to(torch.bfloat16)
    kept: dict[str, list[torch.Tensor]] = {"blocks.1.ln1.hook_in": [], "blocks.1.ln1.hook_out": []}
    spies = [(name, lambda value, hook, kept=found: kept.append(value.clone())) for name, found in kept.items()]
    low.run_with_hooks(tokens, fwd_hooks=spies)
    v = torch.randn(16)
    with intervene_vector(low, 2, v):
        low.run_with_hooks(tokens, fwd_hooks=spies)
    stream, (before, after) = kept["blocks.1.ln1.hook_in"][0].float(), kept["blocks.1.ln1.hook_out"]
    std = (stream.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    gain = low.blocks[1].ln1.weight.float()
    assert torch.equal(after, (before.float() + gain * (v - v.mean()) / std).bfloat16())


def test_compatibility_mode_is_refused_before_and_after(folder: Path, tokens: torch.Tensor, tmp_path: Path) -> None:
    dense = load_dense(folder)
    handle = intervene(dense, "pair", delta=2)
    handle.save(tmp_path / "handle")
    dense.enable_compatibility_mode(disable_warnings=True)
    for use in (
        handle.__enter__,
        handle.hooks,
        lambda: intervene(dense, "pair", delta=2),
        lambda: intervene_vector(dense, 2, torch.ones(16)),
        lambda: Intervention.load(tmp_path / "handle", dense),
    ):
        with pytest.raises(ValueError, match="compatibility mode: its processed weights"):
            use()

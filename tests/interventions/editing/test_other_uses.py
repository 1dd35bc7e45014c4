"""Offloaded models, pickled models and handles, and what a pass reports under an edit."""

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload

from interventions import Intervention, intervene, load_hf


def test_an_offloaded_model_is_steered_like_a_loaded_one(folder, tokens: torch.Tensor, tmp_path: Path) -> None:
    hf, options = load_hf(folder), ({"delta": 4}, {"set_to": 2.0, "positions": -1}, {"toward": tokens.flip(1)})
    handles = [
        lambda m, o=o, w=w: intervene(m, ["pair", "unembed.read.4"], **o, where=w)
        for o in options
        for w in ("read", "stream")
    ]
    expected, vector = [], intervene(hf, "pair", delta=4).vector()
    for make in handles:
        with make(hf):
            expected.append(hf(tokens).logits)
    offloaded = cpu_offload(load_hf(folder), execution_device=torch.device("cpu"))
    assert offloaded.transformer.h[0].ln_1.weight.is_meta
    for make, logits in zip(handles, expected, strict=True):
        with make(offloaded):
            assert torch.allclose(offloaded(tokens).logits, logits, atol=1e-5)
    assert torch.equal(intervene(offloaded, "pair", delta=4).vector(), vector)
    with pytest.raises(ValueError, match="weights are offloaded"):
        intervene(offloaded, "pair", delta=4).save(tmp_path / "handle")
    assert not list(tmp_path.iterdir())


def test_a_model_is_pickled_and_copied_whole_and_a_handle_is_not(folder, dense, tokens: torch.Tensor) -> None:
    hf = load_hf(folder)
    handle = intervene(hf, "pair", delta=4, positions=-1)
    with handle:
        expected = hf.generate(tokens, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
        hf(tokens, use_cache=True)
    file = io.BytesIO()
    torch.save(hf, file)
    file.seek(0)
    for other in (torch.load(file, weights_only=False), copy.deepcopy(hf), pickle.loads(pickle.dumps(hf))):
        with intervene(other, "pair", delta=4, positions=-1):
            assert torch.equal(hf(tokens).logits, load_hf(folder)(tokens).logits)  # the first model is left alone
            answer = other.generate(tokens, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert torch.equal(answer, expected)
        assert other.generate._model is other
    for keep in (pickle.dumps, copy.copy, copy.deepcopy, lambda handle: torch.save(handle, io.BytesIO())):
        for any_handle in (handle, intervene(dense, "pair", delta=4)):
            with pytest.raises(TypeError, match=r"cannot be pickled or copied: keep it with handle\.save\(folder\)"):
                keep(any_handle)


@pytest.mark.parametrize("looked_before", [False, True])
def test_hidden_states_are_the_stream_that_the_model_goes_on_with(
    folder, tokens: torch.Tensor, looked_before: bool
) -> None:
    hf = load_hf(folder)
    plain = hf(tokens, output_hidden_states=looked_before).hidden_states
    block = hf.transformer.h[1]
    for site in ("attn.0", "mlp.0", "attn.1", "mlp.1", "unembed"):
        for options in ({"delta": 4}, {"set_to": 2.0}):
            entered: dict[str, Any] = {}
            spies = [
                block.register_forward_pre_hook(lambda m, inputs, e=entered: e.update(second=inputs[0])),
                hf.transformer.ln_f.register_forward_pre_hook(lambda m, inputs, e=entered: e.update(last=inputs[0])),
            ]
            first_edit = intervene(hf, f"{site}.read.5", where="stream", **options)
            handle = first_edit + intervene(hf, "attn.0.read.2", delta=1)
            with handle, intervene(hf, f"{site}.read.6", where="stream", delta=2):
                states = hf(tokens, output_hidden_states=True).hidden_states
                assert torch.equal(states[1], entered["second"]), site
                assert torch.equal(states[2], hf.transformer.ln_f(entered["last"])) or torch.equal(
                    states[2], entered["last"]
                )
                first = hf.transformer.wte(tokens) + hf.transformer.wpe.weight[:12]
                assert torch.allclose(states[0], first, atol=1e-6) == (site != "attn.0")
            for spy in spies:
                spy.remove()
    assert (plain is None) == (not looked_before)


def test_the_first_generated_token_is_chosen_at_the_prompt_s_last(folder, tokens: torch.Tensor) -> None:
    """What the docstring of steps says: "generated" leaves it alone, positions=slice(-1, None) does not."""
    hf = load_hf(folder)

    def first_and_last(**options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        with intervene(hf, "pair", delta=6, **options):
            out = hf.generate(
                tokens,
                max_new_tokens=3,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
            )
        return out.logits[0], out.logits[-1]

    plain, everywhere = first_and_last(strength=0), first_and_last(steps="generated")
    assert torch.equal(everywhere[0], plain[0])
    assert not torch.allclose(everywhere[1], plain[1], atol=1e-3)
    assert not torch.allclose(first_and_last(positions=slice(-1, None))[0], plain[0], atol=1e-3)
    assert isinstance(intervene(hf, "pair", delta=6), Intervention)

"""Where the page starts, and its random direction: computed here another way, delta by delta and token by token."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.helpers import CHANNEL

from interventions import intervene, intervene_vector, load_dense
from interventions.app import start
from interventions.app.live import channel_named, compare, encode_prompt, example_prompts, own_batch
from interventions.app.start import delta_range, start_of
from interventions.bundle.bundle import get_bundle
from interventions.bundle.channels import Channel


@pytest.fixture(scope="module")
def demo() -> Any:
    return load_dense("demo")


@pytest.mark.parametrize("name", ["quote_type", "true_keyword", "loop_type"])
@torch.no_grad()
def test_it_starts_on_the_smallest_delta_that_flips_its_own_prompt(demo: Any, name: str) -> None:
    channel, run = channel_named(demo, name), get_bundle(demo).run
    batch = own_batch(run, channel)
    assert batch is not None
    own, wanted = batch.answers[0].tolist()
    prompt = batch.prompts[0][0]
    assert prompt == example_prompts(demo, channel)[0]
    tokens, step = encode_prompt(run, prompt)[None], delta_range(channel).largest / 20
    assert int(demo(tokens)[0, -1].argmax()) == own

    def flips(delta: float) -> bool:
        with intervene(demo, name, delta=delta):
            return int(demo(tokens)[0, -1].argmax()) == wanted

    works = next(d for size in range(1, 21) for d in (size * step, -size * step) if flips(d))
    found = start_of(demo, channel)
    assert found.delta == pytest.approx(works)
    shown = compare(demo, prompt, name, found.delta, new_tokens=0)
    assert (int(shown.unsteered.argmax()), int(shown.steered.argmax())) == (own, wanted)
    assert int(shown.random.argmax()) == own
    assert f"the smallest in steps of {step:g}, turns" in found.words


def test_the_sentence_says_where_nothing_works(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    channel = channel_named(demo, "quote_type")
    idle = replace(channel, weights=(1e-6, 1e-6), statistics={})
    found = start_of(demo, idle)
    assert found.words.startswith("No delta up to ±10 turns <code>&#34;)</code> into <code>&#39;)</code> at the first")
    assert 0.5 <= abs(found.delta) <= 10
    plain = compare(demo, example_prompts(demo, channel)[0], "quote_type", 0, new_tokens=0).unsteered
    (token,) = get_bundle(demo).run.tokenizer.encode("')", add_special_tokens=False)
    assert found.words.endswith(f"with p = {float(plain[token]):.3f}.")
    batch = own_batch(get_bundle(demo).run, channel)
    assert batch is not None
    monkeypatch.setattr(start, "own_batch", lambda *_: batch._replace(answers=batch.answers.flip(1)))
    assert start_of(demo, channel).delta == 0
    assert "already ends in <code>&#34;)</code>" in start_of(demo, channel).words
    nameless = Channel(name="x", site=0, indices=(0,), weights=(1.0,))
    monkeypatch.undo()
    assert start_of(demo, nameless).delta == 0
    assert "was not measured" in start_of(demo, nameless).words


@pytest.mark.parametrize("where", ["read", "stream"])
@torch.no_grad()
def test_the_random_direction_is_everywhere_as_long(dense: Any, run: Any, where: Any) -> None:
    tokens = encode_prompt(run, "for cat in dog")[None]
    stream = dense.run_with_cache(tokens)[1]["blocks.1.hook_resid_pre"]
    with intervene(dense, "pair", delta=30, where="stream"):
        moved = dense.run_with_cache(tokens)[1]["blocks.1.hook_resid_pre"]
    lengths = (moved - stream).norm(dim=-1, keepdim=True)
    assert float(lengths.std()) > 0.01  # not the same everywhere
    drawn = torch.randn(1, stream.shape[-1], generator=torch.Generator().manual_seed(0))
    with intervene_vector(dense, CHANNEL.site, lengths * drawn / drawn.norm(), where=where):
        wanted = dense(tokens)[0, -1].softmax(-1)
    found = compare(dense, "for cat in dog", "pair", 30, where=where, new_tokens=3)
    assert torch.allclose(found.random, wanted, atol=1e-5)
    assert not torch.allclose(found.random, found.unsteered, atol=1e-3)
    p, q = found.unsteered.log(), wanted.log()
    assert found.random_kl == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-3)

"""The local page without a browser: both sides of a comparison are the model's own, what is shown is escaped."""

import socket
import sys
import threading
from dataclasses import replace

import pytest
import torch
from support.helpers import CHANNEL

from interventions import intervene, load_dense
from interventions.app import html, server
from interventions.app.live import (
    Comparison,
    Generation,
    Sampling,
    channel_named,
    compare,
    encode_prompt,
    example_problem,
    example_prompts,
)
from interventions.app.start import DeltaRange, Start, delta_range
from interventions.bundle.channels import Channel
from interventions.steering.steered_prompts import plain_model

PROMPT = "cat.load('old hat')\nprint(\"red cup"
EVIL = "<script>alert(1)</script> & </pre>"


@pytest.fixture(scope="module")
def demo():
    return load_dense("demo")


def wrong_quote(found: Comparison) -> tuple[float, float]:
    """P(`')`), unsteered and steered."""
    (token,) = found.tokenizer.encode("')", add_special_tokens=False)
    return float(found.unsteered[token]), float(found.steered[token])


def test_delta_moves_the_quote_of_the_packaged_bundle(demo) -> None:
    means = delta_range(channel_named(demo, "quote_type")).means
    assert means
    difference = means[1] - means[0]
    moved = [compare(demo, PROMPT, "quote_type", k * difference, new_tokens=1) for k in (0, 3, 5, 6)]
    before = wrong_quote(moved[0])[0]
    assert before < 0.05
    assert max(wrong_quote(found)[1] for found in moved) > 0.5
    best = max(moved, key=lambda found: wrong_quote(found)[1])
    assert (best.unsteered_generation.text, best.steered_generation.text) == ('")', "')")
    assert best.kl > 0.5
    away = compare(demo, PROMPT, "quote_type", -difference)
    assert wrong_quote(away)[1] < 0.05


@torch.no_grad()
@pytest.mark.parametrize("where", ["read", "stream"])
def test_both_sides_are_those_of_intervene(dense, where) -> None:
    found = compare(dense, "for cat in dog", "pair", 30, where=where, new_tokens=9)
    tokens = dense.to_tokens("for cat in dog")
    assert torch.equal(found.prompt, tokens[0])
    plain = dense(tokens)[0, -1]
    options = {"max_new_tokens": 9, "do_sample": False, "verbose": False, "stop_at_eos": False}
    greedy = dense.generate(tokens, **options)[0, tokens.shape[1] :].tolist()
    with intervene(dense, "pair", delta=30, where=where):
        moved = dense(tokens)[0, -1]
        steered = dense.generate(tokens, **options)[0, tokens.shape[1] :].tolist()
    assert torch.allclose(found.unsteered, plain.softmax(-1), atol=1e-5)
    assert torch.allclose(found.steered, moved.softmax(-1), atol=1e-5)
    p, q = plain.log_softmax(-1), moved.log_softmax(-1)
    assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-3)
    for side, wanted in ((found.unsteered_generation, greedy), (found.steered_generation, steered)):
        assert list(side.tokens) == wanted[: len(side.tokens)]
        assert side.ended == "end of text" or len(side.tokens) == 9
    assert greedy != steered


@pytest.mark.parametrize("sampling", [None, Sampling(temperature=1.5, seed=3)])
def test_delta_zero_is_the_unsteered_model_exactly(dense, sampling) -> None:
    found = compare(dense, "def cat(dog):", "pair", 0, new_tokens=20, sampling=sampling)
    assert torch.equal(found.unsteered, found.steered)
    assert found.unsteered_generation == found.steered_generation == found.random_generation
    assert found.kl == found.random_kl == 0
    assert all(likely.unsteered == likely.steered == likely.random for likely in found.top())


def test_sampling_is_drawn_by_its_seed_and_leaves_torchs_own_alone(dense) -> None:
    def drawn(seed: int, temperature: float = 1.0) -> tuple[int, ...]:
        sampling = Sampling(temperature=temperature, seed=seed)
        return compare(dense, "cat", "pair", 2, new_tokens=12, sampling=sampling).steered_generation.tokens

    state = torch.get_rng_state()
    assert drawn(1) == drawn(1)
    assert len({drawn(seed) for seed in range(4)}) > 1
    assert torch.equal(torch.get_rng_state(), state)
    greedy = compare(dense, "cat", "pair", 2, new_tokens=12).steered_generation.tokens
    assert drawn(5, temperature=1e-4) == greedy


def test_generation_ends_with_the_context(dense, run) -> None:
    n_ctx = run.dense.n_ctx
    words = next(n for n in range(n_ctx) if len(run.tokenizer.encode("cat" + " cat" * n)) >= n_ctx - 4)
    prompt = "cat" + " cat" * words
    room = n_ctx - len(encode_prompt(run, prompt))
    assert room > 0
    found = compare(dense, prompt, "pair", 2, new_tokens=room + 5)
    assert len(found.steered_generation.tokens) == room
    assert found.steered_generation.ended == "context"
    while len(run.tokenizer.encode(prompt)) < n_ctx - 1:
        prompt += "("
    full = compare(dense, prompt, "pair", 2)
    assert (full.steered_generation, full.unsteered_generation) == (((), "", "context"), ((), "", "context"))
    with pytest.raises(ValueError, match=rf"the prompt has {n_ctx} tokens, .* room for {n_ctx - 1} after"):
        compare(dense, prompt + "(", "pair", 2)
    assert compare(dense, "cat", "pair", 2, new_tokens=0).steered_generation == ((), "", "length")


def test_generation_ends_with_the_text(dense, run) -> None:
    end = run.tokenizer.eos_token_id

    def finish(head: torch.nn.Module, inputs: object, logits: torch.Tensor) -> torch.Tensor:
        return logits + 1e4 * torch.nn.functional.one_hot(torch.tensor(end), logits.shape[-1])

    hook = plain_model(dense).lm_head.register_forward_hook(finish)
    found = compare(dense, "cat", "pair", 2)
    hook.remove()
    assert found.steered_generation == ((end,), run.tokenizer.eos_token, "end of text")


def test_mistakes_name_what_is_wrong(dense) -> None:
    for prompt, channel, delta, kind, sentence in (
        ("", "pair", 1, ValueError, "the prompt is empty: type some text"),
        ("\ud800", "pair", 1, ValueError, "not valid Unicode at character 0"),
        ("cat", "pear", 1, KeyError, "unknown channel 'pear': did you mean pair"),
        ("cat", "", 1, KeyError, "unknown channel ''"),
        ("cat", "mlp.1.read.999", 1, ValueError, "index 999 is out of range"),
        ("cat", "pair", float("nan"), ValueError, "delta=nan: give a finite number"),
        ("cat", "pair", float("-inf"), ValueError, "delta=-inf: give a finite number"),
        ("cat", "pair", 1e300, ValueError, r"delta=1e\+300 is not finite, or too large"),
    ):
        with pytest.raises(kind, match=sentence):
            compare(dense, prompt, channel, delta)
        shown, *continued = html.answer(dense, prompt, channel, delta, "read", 4, False, 1.0, 0)
        assert continued == [html.NOTHING] * 3
        assert 'class="error"' in shown
    with pytest.raises(ValueError, match="new_tokens=-1"):
        compare(dense, "cat", "pair", 1, new_tokens=-1)
    for temperature in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="give a number above 0"):
            Sampling(temperature=temperature)
    with pytest.raises(ValueError, match="seed=-1"):
        Sampling(seed=-1)
    assert torch.isfinite(compare(dense, "cat", "pair", 1).steered).all()  # nothing stays behind


def test_the_prompt_is_text(dense, run) -> None:
    ids = encode_prompt(run, "<|endoftext|>").tolist()
    assert run.tokenizer.eos_token_id not in ids[1:]
    assert run.tokenizer.decode(ids[1:]) == "<|endoftext|>"
    assert compare(dense, "cat\n\tdog\x00", "pair", 1).prompt_text == "cat↵\n\tdog␀"


def test_the_likeliest_of_both_come_first(dense) -> None:
    found = compare(dense, "cat", "pair", 8)
    top = found.top(20)
    best = float(found.unsteered.max()), float(found.steered.max())
    shares = [max(likely.unsteered / best[0], likely.steered / best[1]) for likely in top]
    assert shares == sorted(shares, reverse=True)
    assert {int(found.unsteered.argmax()), int(found.steered.argmax())} <= {likely.token for likely in top[:2]}
    assert len(found.top(10_000)) == len(found.steered)


def test_threads_do_not_steer_each_other(dense) -> None:
    wanted = {delta: compare(dense, "cat = dog", "pair", delta).steered for delta in (-8, 0, 8)}
    found: dict[int, list[torch.Tensor]] = {delta: [] for delta in wanted}

    def work(delta: int) -> None:
        found[delta].extend(compare(dense, "cat = dog", "pair", delta).steered for _ in range(5))

    threads = [threading.Thread(target=work, args=(delta,)) for delta in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for delta, all_found in found.items():
        assert len(all_found) == 5
        assert all(torch.equal(one, wanted[delta]) for one in all_found)


def test_the_range_of_delta_comes_from_the_class_means() -> None:
    means = {"mean_member_0": [1.0, -0.5], "mean_member_1": [-1.0, 0.5]}
    measured = replace(CHANNEL, statistics=means)
    # (1 * 1 + 0.5 * 0.5) / (1 + 0.25) = 1 in class 0
    assert delta_range(measured) == DeltaRange(largest=20.0, means=(1.0, -1.0))
    assert measured.value(torch.eye(32)[3] - torch.eye(32)[11] / 2) == 1
    unmeasured = DeltaRange(largest=10.0, means=None)
    for statistics in ({}, {"mean_member_0": [1.0], "mean_member_1": [2.0]}, {"mean_member_0": 1, "mean_member_1": 2}):
        assert delta_range(replace(CHANNEL, statistics=statistics)) == unmeasured
    equal = replace(CHANNEL, statistics={"mean_member_0": [1.0, 0.0], "mean_member_1": [1.0, 0.0]})
    assert delta_range(equal) == DeltaRange(largest=10.0, means=(0.8, 0.8))


def test_examples_are_those_of_the_channels_task(demo) -> None:
    own = example_prompts(demo, channel_named(demo, "quote_type"))
    assert len(own) == 6
    for number, prompt in enumerate(own):
        quote = prompt.split("(")[-1][0]
        assert quote == ('"', "'")[number % 2], prompt
    every = example_prompts(demo, channel_named(demo, "attn.0.read.1"), 9)
    assert len(set(every)) == 9
    for prompt in own + every:
        compare(demo, prompt, "quote_type", 0, new_tokens=0)
    unknown = Channel(name="x", site=0, indices=(0,), weights=(1.0,), selection={"task": EVIL})
    assert example_prompts(demo, unknown, 9) == every


def test_what_the_page_shows_is_escaped(dense, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("interventions.app.live.inline", lambda *_: EVIL)
    pages = [
        html.answer(dense, "cat", "pair", 1, "read", 4, False, 1.0, 0).html,
        html.heading(EVIL),
        html.answer(dense, "cat", EVIL, 1, "read", 4, False, 1.0, 0).html,
    ]
    monkeypatch.setattr(html, "channel_named", lambda *_: replace(CHANNEL, name=EVIL, description=EVIL))
    pages.append(html.about(dense, EVIL, Start(0.0, EVIL)))
    for page in pages:
        assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &lt;/pre&gt;" in page
        assert "<script" not in page
    assert "a number is missing" in html.answer(dense, "cat", "pair", None, "read", 4, False, 1.0, 0).html


def test_the_continuation_is_marked_where_it_departs(dense) -> None:
    found = compare(dense, "cat", "pair", 1)
    sides = {
        f"{side}_generation": Generation((), text, "length")
        for side, text in (("unsteered", "for dog"), ("steered", "for cup"), ("random", "for dog"))
    }
    plain, moved, random = html.continuations(replace(found, **sides))
    assert plain == ("Unsteered", [("cat", None), ("for dog", html.NEW)])
    assert moved == ("Steered", [("cat", None), ("for ", html.NEW), ("cup", html.OTHER)])
    assert random == ("Random direction", plain.parts)
    ended = {"steered_generation": Generation((), "", "context")}
    assert html.continuations(replace(found, **ended))[1] == (
        "Steered: stopped at the context's end",
        [("cat", None)],
    )


def test_only_a_loopback_address_is_served_on_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with server.listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        assert server.address("127.0.0.1", listener) == f"http://127.0.0.1:{port}/"
        assert not caplog.messages
        with pytest.raises(OSError, match=rf"port {port} of 127.0.0.1 is in use: choose another, or 0"):
            server.listen("127.0.0.1", port)
    with server.listen("0.0.0.0", 0) as listener:
        assert not server.is_loopback(listener)
    assert "0.0.0.0 is no loopback address" in caplog.text
    with pytest.raises(ValueError, match="port=70000: use 0 to 65535"):
        server.listen("127.0.0.1", 70000)
    with pytest.raises(OSError, match=r"cannot serve on port 0 of 203.0.113.9: "):
        server.listen("203.0.113.9", 0)
    assert isinstance(listener, socket.socket)


def test_without_gradio_one_sentence_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ValueError, match=r"pip install 'sparse-bridges\[serve\]'"):
        server.serve("demo")


def test_why_a_channels_own_prompts_are_missing_is_shown(demo) -> None:
    name = "quote_type"
    channel = channel_named(demo, name)
    assert example_problem(demo, channel) == ""
    gone = {"prompts": "file", "file": "/gone/mine.jsonl", "sha256": "0"}
    lost = replace(channel, selection=channel.selection | {"task": "mine", "prompts": gone})
    assert example_problem(demo, lost).startswith("the task file /gone/mine.jsonl is gone")
    assert example_prompts(demo, lost)  # of other tasks

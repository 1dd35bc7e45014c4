"""Generation under an intervention: every step's logits must be those of one edited pass over the whole sequence."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from bridges.hybrid import residuals, suffix
from bridges.run_folder import Run
from interventions import intervene, intervene_vector
from interventions.bundle.channels import residual_reads

NEW = 6
V = torch.linspace(-2, 3, 16).roll(5)


@contextmanager
def steps_of(dense) -> Iterator[list[torch.Tensor]]:
    """Collects the last token's logits of every pass."""
    steps: list[torch.Tensor] = []
    handle = dense.unembed.hook_out.register_forward_hook(lambda module, inputs, value: steps.append(value[:, -1]))
    try:
        yield steps
    finally:
        handle.remove()


def generate(dense, tokens: torch.Tensor, *, cache: bool, sample: bool = False, **options):
    """(sequence, logits [batch, step, d_vocab])"""
    torch.manual_seed(1)
    with steps_of(dense) as steps:
        options = {"max_new_tokens": NEW, "do_sample": sample, "verbose": False, "stop_at_eos": False} | options
        out = dense.generate(tokens, use_past_kv_cache=cache, **options)
    return out, torch.stack(steps, 1)


def one_pass(run: Run, out: torch.Tensor, site: int, change: torch.Tensor, prompt: int) -> torch.Tensor:
    """The logits that chose each generated token, from one pass whose stream is changed at a site."""
    seen = out[:, :-1]
    return suffix(run.dense, site, residuals(run.dense, seen)[site] + change, seen)[:, prompt - 1 :]


def selected(*columns: int, batch: int = 2, length: int = 12 + NEW - 1) -> torch.Tensor:
    mask = torch.zeros(batch, length, 1)
    mask[:, list(columns)] = 1
    return mask


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("sample", [True, False])
@pytest.mark.parametrize("site", [0, 1, 2, 3, 4])
def test_every_step_is_one_edited_pass(dense, run: Run, tokens: torch.Tensor, site: int, sample: bool, cache: bool):
    with intervene_vector(dense, site, V, where="stream", positions=[2, 11, 13]):
        out, logits = generate(dense, tokens, cache=cache, sample=sample)
    expected = one_pass(run, out, site, selected(2, 11, 13) * V, 12)
    assert torch.allclose(logits, expected, atol=1e-4)
    assert (expected - one_pass(run, out, site, 0 * V, 12)).abs().max() > 0.1


@pytest.mark.parametrize("where", ["read", "stream"])
@pytest.mark.parametrize("sample", [True, False])
def test_the_cache_makes_no_difference(dense, tokens: torch.Tensor, where: str, sample: bool) -> None:
    plain, _ = generate(dense, tokens, cache=True, sample=sample)
    rows = torch.tensor([6.0, -4.0])
    for options in (
        {"delta": 6},
        {"delta": rows},
        {"toward": tokens.flip(1), "strength": 3.0},
        {"set_to": 3.0},
        {"delta": 9, "positions": [-1, -4]},
        {"delta": 9, "positions": slice(-3, None), "steps": "generated"},
        {"delta": 9, "positions": lambda t: t % 2 == 0},
        {"delta": 9, "steps": "prompt"},
        {"delta": 9, "steps": "generated"},
    ):
        with intervene(dense, ["pair", "mlp.0.read.4"], where=where, **options):
            cached, cached_logits = generate(dense, tokens, cache=True, sample=sample)
            # The same handle, still entered: the prompt is recognised again.
            uncached, uncached_logits = generate(dense, tokens, cache=False, sample=sample)
        assert torch.equal(cached, uncached), options
        assert torch.allclose(cached_logits, uncached_logits, atol=1e-4), options
        assert not torch.equal(cached_logits, generate(dense, tokens, cache=True, sample=sample)[1]), options
    assert torch.equal(plain, generate(dense, tokens, cache=True, sample=sample)[0])


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize(
    ("positions", "steps", "columns"),
    [
        (None, "prompt", range(12)),
        (None, "generated", range(12, 17)),
        (None, "all", range(17)),
        (-1, "all", [11]),
        (slice(-2, None), "all", range(10, 17)),
        (slice(-2, None), "prompt", [10, 11]),
        (slice(3, 16, 5), "all", [3, 8, 13]),
        (slice(None, -9), "all", [0, 1, 2]),
        ([0, -12, 14], "all", [0, 14]),
        (torch.tensor([5, 12]), "generated", [12]),
        (torch.arange(12) == 7, "all", [7]),
    ],
)
def test_positions_and_steps_mean_the_same_tokens_in_generation(
    dense, run: Run, tokens: torch.Tensor, positions, steps: str, columns, cache: bool
) -> None:
    with intervene_vector(dense, 2, V, where="stream", positions=positions, steps=steps):
        out, logits = generate(dense, tokens, cache=cache)
    assert torch.allclose(logits, one_pass(run, out, 2, selected(*columns) * V, 12), atol=1e-4)


def test_a_handle_entered_after_the_prompt_knows_how_long_it_was(dense, tokens: torch.Tensor) -> None:
    later = torch.randint(384, (2, 3))
    _, cache = dense(tokens, return_type="logits_and_cache")
    dense(later[:, :1], past_key_values=cache)
    # Aligned with the prompt, hence no error; and what follows the prompt has no counterfactual.
    with intervene(dense, "pair", toward=tokens.flip(1), strength=5.0):
        last = dense(later[:, 1:], past_key_values=cache)
    assert torch.allclose(last, dense(torch.cat([tokens, later], 1))[:, 13:], atol=1e-4)


def test_a_callable_sees_every_token_so_far(dense, run: Run, tokens: torch.Tensor) -> None:
    even: Callable[[torch.Tensor], torch.Tensor] = lambda t: t % 2 == 0  # noqa: E731
    for cache in (True, False):
        with intervene_vector(dense, 3, V, where="stream", positions=even):
            out, logits = generate(dense, tokens, cache=cache)
        assert torch.allclose(logits, one_pass(run, out, 3, even(out[:, :-1])[..., None] * V, 12), atol=1e-4)


def test_toward_leaves_generated_tokens_alone(dense, run: Run, tokens: torch.Tensor) -> None:
    other = tokens.flip(1)
    change = torch.zeros(2, 17, 16)
    nodes = (residual_reads(run.sparse, other, 2) - residual_reads(run.sparse, tokens, 2))[..., [3, 11]]
    rms = residuals(run.sparse, tokens)[2].square().mean(-1, keepdim=True).sqrt()
    change[:, :12] = 2 * rms * nodes @ run.bridges.decoders[2].weight[:, [3, 11]].T
    for cache in (True, False):
        with intervene(dense, "pair", toward=other, strength=2.0, where="stream"):
            out, logits = generate(dense, tokens, cache=cache)
        assert torch.allclose(logits, one_pass(run, out, 2, change, 12), atol=1e-4)


def padded(tokens: torch.Tensor, *, by: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """The second row with its first tokens made padding, and the attention mask."""
    mask = torch.ones_like(tokens)
    mask[1, :by] = 0
    return tokens.masked_fill(mask == 0, 0), mask


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("where", ["read", "stream"])
def test_left_padded_rows_are_steered_as_if_alone(dense, tokens: torch.Tensor, where: str, cache: bool) -> None:
    ids, mask = padded(tokens)
    column = torch.zeros(2, 12, dtype=torch.bool)
    column[:, 6] = True
    for options in (
        {"delta": 9},
        {"delta": 9, "positions": [0, 3, 9]},
        {"delta": 9, "positions": [-1, -8]},
        {"delta": 9, "positions": slice(-3, None), "steps": "prompt"},
        {"set_to": 2.0, "steps": "generated"},
        {"toward": tokens.flip(1), "strength": 3.0},
        {"delta": 9, "positions": column},
    ):
        with intervene(dense, "pair", where=where, **options):
            both, logits = generate(dense, ids, cache=cache, attention_mask=mask)
            plain = dense(ids, attention_mask=mask)
        alone = dict(options)
        if "toward" in alone:
            alone["toward"] = tokens.flip(1)[1:, 4:]
        if options.get("positions") is column:
            alone["positions"] = column[1:, 4:]
        with intervene(dense, "pair", where=where, **alone):
            out, single = generate(dense, tokens[1:, 4:], cache=cache)
            row = dense(tokens[1:, 4:])[0]
        assert torch.equal(both[1, 4:], out[0]), options
        assert torch.allclose(logits[1], single[0], atol=1e-4), options
        assert torch.allclose(plain[1, 4:], row, atol=1e-4), options


def test_padding_is_never_edited(dense, tokens: torch.Tensor) -> None:
    ids, mask = padded(tokens)
    kept: dict[str, torch.Tensor] = {}

    def keep(value: torch.Tensor, hook) -> None:
        kept[hook.name] = value

    handle = intervene(dense, "pair", delta=50, where="stream")
    dense.run_with_hooks(ids, attention_mask=mask, fwd_hooks=[("blocks.1.ln1.hook_in", keep)])
    before = kept["blocks.1.ln1.hook_in"]
    with handle:
        dense.run_with_hooks(ids, attention_mask=mask, fwd_hooks=[("blocks.1.ln1.hook_in", keep)])
    changed = (kept["blocks.1.ln1.hook_in"] != before).any(-1)
    assert torch.equal(changed, mask.bool())


def test_right_padding_counts_from_each_row_s_own_end(dense, tokens: torch.Tensor) -> None:
    mask = torch.ones_like(tokens)
    mask[1, 9:] = 0
    with intervene(dense, "pair", delta=9, positions=[-1, -9]):
        both = dense(tokens, attention_mask=mask)
        last = dense(tokens[:1])[0]
    with intervene(dense, "pair", delta=9, positions=[8, 0]):
        assert torch.allclose(both[1, :9], dense(tokens[1:, :9])[0], atol=1e-5)
    assert torch.allclose(both[0], last, atol=1e-5)


def test_a_list_of_texts_is_padded_and_steered_right(dense) -> None:
    """The mask that TransformerLens makes for a list of strings is seen too."""
    texts = ["x = 1", "def f(a, b):\n    return a"]
    options = {"max_new_tokens": NEW, "do_sample": False, "verbose": False, "stop_at_eos": False}
    with intervene(dense, "pair", delta=9, positions=[1, -1]):
        together = dense.generate(texts, return_type="tokens", **options)
        alone = [dense.generate(text, return_type="tokens", **options)[0] for text in texts]
    assert len(alone[0]) < len(alone[1])
    for row, single in zip(together, alone, strict=True):
        assert torch.equal(row[-NEW:], single[-NEW:])


def test_a_cache_continues_the_tokens_that_filled_it(dense, run: Run, tokens: torch.Tensor) -> None:
    """Also when the handle is entered in the middle, and with two generations that take turns."""
    later = torch.randint(384, (2, 3))
    _, first = dense(tokens, return_type="logits_and_cache")
    _, second = dense(tokens[:, :5], return_type="logits_and_cache")
    with intervene_vector(dense, 2, V, where="stream", positions=[-1, 13], prompt_length=12):
        dense(later, past_key_values=second, return_type="logits")
        logits = dense(later, past_key_values=first)
    whole = torch.cat([tokens, later], 1)
    expected = suffix(run.dense, 2, residuals(run.dense, whole)[2] + selected(13, length=15) * V, whole)
    assert torch.allclose(logits, expected[:, 12:], atol=1e-4)


@torch.no_grad()
def test_a_cache_of_unknown_origin_is_refused_where_tokens_matter(dense, tokens: torch.Tensor) -> None:
    _, cache = dense(tokens, return_type="logits_and_cache")
    foreign = copy.deepcopy(cache)
    with (
        pytest.raises(ValueError, match="a KV cache that other calls filled"),
        intervene(dense, "pair", toward=tokens),
    ):
        dense(tokens[:, :1], past_key_values=foreign)
    with intervene(dense, "pair", delta=3, positions=12):
        steered = dense(tokens[:, :1], past_key_values=copy.deepcopy(cache))
    with intervene(dense, "pair", delta=3, positions=12):
        known = dense(tokens[:, :1], past_key_values=cache)
    assert torch.equal(steered, known)


def test_a_prompt_that_another_begins_may_be_either(dense, tokens: torch.Tensor) -> None:
    """A pass with more tokens than an earlier one may continue it or be a prompt of its own: only the caller knows."""
    handle = intervene(dense, "pair", delta=9, positions=-1)
    with handle:
        dense(tokens[:, :8])
        with pytest.raises(ValueError, match=r"with the tokens of an earlier pass does not say.*give prompt_length="):
            dense(tokens)
        other = dense(tokens.flip(1))
    with intervene(dense, "pair", delta=9, positions=-1, prompt_length=8):
        dense(tokens[:, :8])
        continued = dense(tokens)
    with handle:
        fresh = dense(tokens)
    with intervene(dense, "pair", delta=9, positions=7):
        assert torch.equal(continued, dense(tokens))
    with intervene(dense, "pair", delta=9, positions=11):
        assert torch.equal(fresh, dense(tokens))
        assert torch.equal(other, dense(tokens.flip(1)))


def beams(dense, tokens: torch.Tensor, *, cache: bool):
    return dense.hf_generate(
        tokens,
        max_new_tokens=NEW,
        do_sample=False,
        num_beams=3,
        stop_at_eos=False,
        use_past_kv_cache=cache,
        use_cache=cache,
        output_scores=True,
    )


@pytest.mark.parametrize("cache", [True, False])
def test_beam_search_scores_are_those_of_one_edited_pass(dense, run: Run, tokens: torch.Tensor, cache: bool) -> None:
    with intervene_vector(dense, 2, V, where="stream", positions=[3, 11, 13]):
        found = beams(dense, tokens, cache=cache)
    out = found.sequences
    log_p = one_pass(run, out, 2, selected(3, 11, 13) * V, 12).log_softmax(-1)
    chosen = log_p.gather(2, out[:, 12:, None]).squeeze(2)
    assert torch.allclose(found.sequences_scores, chosen.mean(1), atol=1e-4)


def test_beam_search_takes_a_row_per_beam_and_refuses_what_it_cannot_follow(dense, tokens: torch.Tensor) -> None:
    plain = beams(dense, tokens, cache=True).sequences
    for options in (
        {"delta": torch.tensor([6.0, -6.0]).repeat_interleave(3), "steps": "generated"},
        {"toward": tokens.flip(1).repeat_interleave(3, 0), "strength": 4.0},
    ):
        with intervene(dense, "pair", where="stream", **options):
            cached, uncached = (beams(dense, tokens, cache=cache).sequences for cache in (True, False))
        assert torch.equal(cached, uncached), options
        assert not torch.equal(cached, plain), options
    rows = intervene(dense, "pair", delta=torch.ones(2))
    with pytest.raises(ValueError, match=r"delta has 2 rows but the batch has 6.*repeat_interleave"), rows:
        beams(dense, tokens, cache=True)
    even = intervene(dense, "pair", delta=9, positions=lambda t: t % 2 == 0)
    with pytest.raises(ValueError, match=r"changed places \(beam search\)"), even:
        beams(dense, tokens, cache=True)
    with even:
        assert not torch.equal(beams(dense, tokens, cache=False).sequences, plain)

"""The same tokens are edited in every way of decoding that gives the same text, or a sentence refuses the way."""

import copy
from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList

from interventions import intervene, load_hf

NEW = 6

EDITS: list[dict[str, Any]] = [
    {"delta": 8, "steps": "prompt"},
    {"delta": 8, "steps": "generated"},
    {"delta": 8, "positions": [-1, -4, 13]},
    {"delta": 8, "positions": slice(-2, None), "where": "stream"},
    {"toward": True, "strength": 4.0},
]


@pytest.fixture(scope="module")
def hf(folder):
    return load_hf(folder)


@pytest.fixture
def prompt() -> torch.Tensor:
    return torch.randint(1, 384, (1, 12))


def opened(edit: dict[str, Any], prompt: torch.Tensor) -> dict[str, Any]:
    return edit | ({"toward": prompt.flip(1)} if "toward" in edit else {})


def generate(hf, prompt: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(sequence, logits) of greedy decoding."""
    defaults = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    out = hf.generate(prompt, **(defaults | options), output_logits=True, return_dict_in_generate=True)
    return out.sequences, torch.stack(out.logits)


def a_loop_of_ones_own(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
    """Custom decoding: the prompt in uneven chunks, then a token at a time."""
    cache, logits = None, []
    for chunk in (*input_ids.split([5, 6, 1], 1), *[None] * (NEW - 1)):
        shown = input_ids[:, -1:] if chunk is None else chunk
        out = model(shown, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        if chunk is None or shown.shape[1] == 1:
            logits.append(out.logits[:, -1])
            input_ids = torch.cat([input_ids, logits[-1].argmax(-1, keepdim=True)], 1)
    return type("Out", (), {"sequences": input_ids, "logits": logits})


MODES = ["no cache", "chunks of 5", "chunks of 1", "prompt lookup", "assistant", "custom", "given part", "foreign part"]


def in_mode(hf, folder, prompt: torch.Tensor, mode: str, cache: Any) -> tuple[torch.Tensor, torch.Tensor]:
    options: dict[str, dict[str, Any]] = {
        "no cache": {"use_cache": False},
        "chunks of 5": {"prefill_chunk_size": 5},
        "chunks of 1": {"prefill_chunk_size": 1},
        "prompt lookup": {"prompt_lookup_num_tokens": 3},
        "custom": {"custom_generate": a_loop_of_ones_own},
    }
    if mode == "assistant":
        return generate(hf, prompt, assistant_model=load_hf(folder))
    return generate(hf, prompt, **options.get(mode, {"past_key_values": cache}))


@pytest.mark.parametrize("edit", EDITS, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_generate_edits_the_same_tokens_in_every_mode(hf, folder, prompt, mode: str, edit: dict[str, Any]) -> None:
    prompt[:, 6:] = prompt[:, :6]  # something to look up
    edits = opened(edit, prompt)
    with intervene(hf, ["pair", "mlp.0.read.2"], **edits, prompt_length=12):
        cache = hf(prompt[:, :8], use_cache=True).past_key_values if mode.endswith("part") else None
        hf(torch.cat([prompt, prompt[:, :3]], 1))  # position 13 is reached
    cache = copy.deepcopy(cache) if mode == "foreign part" else cache
    with intervene(hf, ["pair", "mlp.0.read.2"], **edits):
        sequence, logits = generate(hf, prompt)
        other, other_logits = in_mode(hf, folder, prompt, mode, cache)
    assert torch.equal(sequence, other)
    assert torch.allclose(logits, other_logits, atol=1e-4)
    assert not torch.allclose(logits, generate(hf, prompt)[1], atol=1e-2)


@pytest.mark.parametrize("kind", ["plain", "padded"])
@pytest.mark.parametrize("edit", EDITS, ids=str)
def test_transformer_lens_generates_alike_in_all_its_ways(dense, hf, tokens, kind: str, edit: dict[str, Any]) -> None:
    mask = torch.ones_like(tokens)
    mask[1, :3] = int(kind == "plain")
    options = {"max_new_tokens": NEW, "do_sample": False, "attention_mask": mask}
    lens = options | {"verbose": False, "stop_at_eos": False}
    with intervene(dense, ["pair", "mlp.0.read.2"], **opened(edit, tokens)):
        # One block, prompts one after the other, of which one begins the other.
        dense.generate(tokens[:, :10], **lens | {"attention_mask": mask[:, :10]}) if "toward" not in edit else None
        first = dense.generate(tokens, **lens)
        ways = [
            dense.generate(tokens, use_past_kv_cache=False, **lens),
            torch.cat(list(dense.generate_stream(tokens, max_tokens_per_yield=2, **lens)), 1),
            dense.hf_generate(tokens, use_cache=True, stop_at_eos=False, **options),
        ]
    with intervene(hf, ["pair", "mlp.0.read.2"], **opened(edit, tokens)):
        ways.append(hf.generate(tokens, eos_token_id=None, **options))
    for sequence in ways:
        sequence = getattr(sequence, "sequences", sequence)
        assert torch.equal(sequence[:, -NEW:], first[:, -NEW:])


@pytest.mark.parametrize("edit", EDITS[:4], ids=str)
def test_passes_of_ones_own_need_the_prompt_s_length(dense, hf, prompt, edit: dict[str, Any]) -> None:
    """Chunks, draft tokens behind the prompt, and a growing sequence: with the length right, without it refused."""
    longer = torch.cat([prompt, torch.randint(1, 384, (1, 3))], 1)
    for model in (dense, hf):
        with intervene(model, "pair", **edit, prompt_length=12):
            expected = logits_of(model, longer)
            for sizes in ([8, 7], [12, 1, 2], [1] * 15, [13, 2]):
                assert torch.allclose(chunked(model, longer, sizes), expected, atol=1e-4), sizes
            logits_of(model, prompt)
            assert torch.equal(logits_of(model, longer), expected)
        for sizes in ([12, 3], [2, 13], [1] * 15):  # too few tokens for -4 in the first pass of the last two
            refused = pytest.raises(
                (ValueError, IndexError), match=r"where the prompt ends.*prompt_length=|-4 is out of"
            )
            with refused, intervene(model, "pair", **edit):
                chunked(model, longer, sizes)


def logits_of(model, tokens: torch.Tensor) -> torch.Tensor:
    out = model(tokens)
    return getattr(out, "logits", out)


def chunked(model, tokens: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Logits of a sequence that comes in chunks, with a KV cache."""
    cache, logits = None, []
    for chunk in tokens.split(sizes, 1):
        if hasattr(model, "to_tokens"):
            out, cache = model(chunk, past_key_values=cache, return_type="logits_and_cache", use_cache=True)
        else:
            answer = model(chunk, past_key_values=cache, use_cache=True)
            out, cache = answer.logits, answer.past_key_values
        logits.append(out)
    return torch.cat(logits, 1)


def test_positions_are_those_that_the_caller_gives(hf, prompt: torch.Tensor) -> None:
    shifted = torch.arange(5, 17)[None]
    with intervene(hf, "pair", delta=8, positions=[7, -1]):
        given = hf(prompt, position_ids=shifted).logits
    with intervene(hf, "pair", delta=8, positions=(torch.arange(12) == 2) | (torch.arange(12) == 11)):
        assert torch.equal(given, hf(prompt, position_ids=shifted).logits)
    packed = torch.arange(6).repeat(2)[None]
    with intervene(hf, "pair", delta=8, positions=2):
        given = hf(prompt, position_ids=packed).logits
    with intervene(hf, "pair", delta=8, positions=torch.arange(12) % 6 == 2):
        assert torch.equal(given, hf(prompt, position_ids=packed).logits)
    with pytest.raises(ValueError, match="do not count up by one"), intervene(hf, "pair", delta=8, positions=-1):
        hf(prompt, position_ids=packed)
    with pytest.raises(ValueError, match="packs several sequences"), intervene(hf, "pair", delta=8):
        hf(prompt, cu_seq_lens_q=torch.tensor([0, 6, 12]))


def test_a_logits_processor_that_calls_the_model_is_no_part_of_the_prompt(hf, prompt: torch.Tensor) -> None:
    other = torch.randint(1, 384, (1, 5))

    def call(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        inner.append(hf(other).logits)
        return scores

    inner: list[torch.Tensor] = []
    with intervene(hf, "pair", delta=8, positions=-1):
        expected, alone = generate(hf, prompt)[1], hf(other).logits
        logits = generate(hf, prompt, logits_processor=LogitsProcessorList([call]))[1]
        with pytest.raises(ValueError, match="depends on where the prompt ends"):
            generate(hf, prompt, guidance_scale=2.0)
    assert torch.equal(logits, expected)
    assert all(torch.equal(x, alone) for x in inner)


# Padding that no mask announces.


def test_unannounced_padding_is_refused_where_positions_depend_on_it(dense, hf) -> None:
    texts = ["x = 1", "def f(a, b):\n    return a"]
    right, left = (dense.to_tokens(texts, padding_side=side) for side in ("right", "left"))
    mask = torch.ones_like(right)
    mask[0, 1:] = right[0, 1:] != 0
    for positions in (-1, [2, -2], slice(-3, None)):
        for model, shown in ((dense, texts), (dense, right), (dense, left), (hf, right), (hf, left)):
            refused = pytest.raises(ValueError, match=r"no attention mask says which are real.*attention_mask=")
            with refused, intervene(model, "pair", delta=8, positions=positions):
                model(shown)
    with pytest.raises(ValueError, match="no attention mask says"), intervene(dense, "pair", delta=8, positions=3):
        dense(left)
    with intervene(dense, "pair", delta=8, positions=3):
        dense(right)  # counted from the beginning, where nothing is padding
    for model in (dense, hf):
        with intervene(model, "pair", delta=8, positions=-1):
            both = getattr(out := model(right, attention_mask=mask), "logits", out)
            alone = [getattr(out := model(row[None, : int(m.sum())]), "logits", out) for row, m in zip(right, mask)]  # noqa: B905
            model(right, attention_mask=torch.ones_like(right))  # the caller says that nothing is padding
        for row, single in zip(both, alone, strict=True):
            assert torch.allclose(row[: single.shape[1]], single[0], atol=1e-4)
    with intervene(dense, "pair", delta=8):  # at every token: padding behind a text changes nothing before it
        dense(texts)

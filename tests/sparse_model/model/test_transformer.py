"""The architecture: equal to a naive implementation and to OpenAI's, sublayer by sublayer, with hooks and cache."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.reference import naive_run, random_model

from sparse_model.config import (
    TOPK_LOCATIONS,
    SparseConfig,
)
from sparse_model.model.transformer import KVCache, SparseTransformer, sinusoidal_table

GOLDEN = Path(__file__).parents[2] / "data" / "openai_golden"
SMALL = SparseConfig(n_layers=2, d_model=24, d_mlp=40, n_heads=3, d_head=8, n_ctx=12, d_vocab=30)
CONCAT = replace(SMALL, positions="concat_learned", d_pos=4)
CONFIGS = {
    "defaults": SMALL,
    "sink": replace(SMALL, sink=True),
    "learned positions": replace(SMALL, positions="learned"),
    "concat learned": CONCAT,
    "concat sinusoidal": replace(SMALL, positions="concat_sinusoidal", d_pos=6),
    "concat, sink, odd fraction": replace(CONCAT, sink=True, topk_fraction=0.3),
    "relu, no bigram": replace(SMALL, act_fn="relu", bigram="none"),
    "fixed bigram": replace(SMALL, bigram="fixed"),
    "tied, no bias": replace(SMALL, tied=True, bias=False),
    "no top-k": replace(SMALL, topk_locations=()),
    "reads only": replace(SMALL, topk_locations=("attn_in", "mlp_in")),
    "residual stream": replace(SMALL, topk_locations=("attn_q", "resid_post_attn", "resid_post_mlp")),
    "every location": replace(SMALL, topk_locations=(*TOPK_LOCATIONS, "resid_post_attn", "resid_post_mlp")),
    "wide attention": replace(SMALL, n_heads=5, topk_fraction=1 / 3),
}
every_config = pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)


def some_tokens(cfg: SparseConfig, batch: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(cfg.d_vocab, (batch, length))


@every_config
def test_logits_and_activations_equal_the_naive_implementation(cfg: SparseConfig) -> None:
    model, tokens = random_model(cfg), some_tokens(cfg)
    # The library's sinusoids are stored in single precision.
    tolerance = 1e-5 if cfg.positions == "concat_sinusoidal" else 1e-9
    logits, cache = model.run_with_cache(tokens)
    for b, row in enumerate(tokens.tolist()):
        expected, seen = naive_run(model, row)
        np.testing.assert_allclose(logits[b].detach().numpy(), expected, atol=tolerance, rtol=0)
        for name, value in seen.items():
            np.testing.assert_allclose(
                cache[name][b].detach().numpy(), value, atol=tolerance, rtol=tolerance, err_msg=name
            )


def openai_config(raw: dict) -> SparseConfig:
    """Our config of a released one (fields in the golden files)."""
    return SparseConfig(
        n_layers=raw["n_layer"],
        d_model=raw["d_model"],
        d_mlp=raw["d_mlp"],
        n_heads=raw["n_head"],
        d_head=raw["d_head"],
        n_ctx=raw["block_size"],
        d_vocab=raw["vocab_size"],
        positions="concat_learned" if raw["d_pos_emb"] else "learned",
        d_pos=raw["d_pos_emb"] or 0,
        sink=raw["sink"],
        bigram="learned" if raw["enable_bigram_table"] else "none",
        act_fn=raw["activation_type"],
        topk_fraction=raw["afrac"],
        topk_locations=tuple(raw["afrac_loctypes"].split(",")),
        bias=raw["bias"],
        tied=raw["tied_unembed"],
    )


OPENAI_WEIGHTS = {
    "transformer.wte": "token_embed",
    "transformer.wpe": "pos_embed",
    "transformer.ln_f": "ln_final",
    "lm_head": "unembedding",
    "transformer.h.": "blocks.",
    ".ln_1.": ".ln1.",
    ".ln_2.": ".ln2.",
    ".ln_p1.": ".ln1_pos.",
    ".ln_p2.": ".ln2_pos.",
    ".attn.c_attn.": ".attn.qkv.",
    ".attn.c_proj.": ".attn.out.",
    ".attn.attn_imp.sink_logit": ".attn.sink_logit",
    ".mlp.c_fc.": ".mlp.fc.",
    ".mlp.c_proj.": ".mlp.out.",
    "bigram_table": "bigram",
    "final_logits_bias": "logits_bias",
}
OPENAI_HOOKS = {
    "resid_in": "hook_resid_pre",
    "attn.act_in": "attn.hook_in",
    "attn.q": "attn.hook_q",
    "attn.k": "attn.hook_k",
    "attn.v": "attn.hook_v",
    "attn.y": "attn.hook_z",
    "attn.resid_delta": "hook_attn_out",
    "resid_mid": "hook_resid_mid",
    "mlp.act_in": "mlp.hook_in",
    "mlp.post_act": "mlp.hook_post",
    "mlp.resid_delta": "hook_mlp_out",
}


@pytest.mark.parametrize("name", ["cat_pos_emb", "sink_bigram"])
def test_openais_released_code_gives_the_same_logits_and_activations(name: str) -> None:
    """Two random models in the released format, with values computed by the released inference code."""
    folder = GOLDEN / name
    cfg = openai_config(json.loads((folder / "beeg_config.json").read_text()))
    state = {}
    for key, tensor in torch.load(folder / "final_model.pt", weights_only=True).items():
        for theirs, ours in OPENAI_WEIGHTS.items():
            key = key.replace(theirs, ours)
        state[key] = tensor
    model = SparseTransformer(cfg)
    model.load_state_dict(state)
    expected = load_file(folder / "expected.safetensors")
    logits, cache = model.run_with_cache(expected["tokens"])
    torch.testing.assert_close(logits, expected["logits"], atol=1e-4, rtol=0)
    hooks = {f"hook.{i}.{a}": f"blocks.{i}.{b}" for i in range(cfg.n_layers) for a, b in OPENAI_HOOKS.items()}
    hooks["hook.final_resid"] = f"blocks.{cfg.n_layers - 1}.hook_resid_post"
    assert {"tokens", "logits", *hooks} == set(expected)
    for theirs, ours in hooks.items():
        value = cache[ours].reshape(expected[theirs].shape)
        torch.testing.assert_close(value, expected[theirs], atol=1e-4, rtol=0, msg=lambda m, n=theirs: f"{n}: {m}")


@every_config
def test_the_sublayers_in_turn_are_the_forward_pass(cfg: SparseConfig) -> None:
    model, tokens = random_model(cfg), some_tokens(cfg)
    logits, cache = model.run_with_cache(tokens)
    resid = model.embed(tokens)
    for i in range(cfg.n_sites - 1):
        seen = cache[f"blocks.{i // 2}.hook_resid_{'mid' if i % 2 else 'pre'}"]
        torch.testing.assert_close(resid, seen, atol=1e-10, rtol=0)
        resid = model.sublayer(i, resid)
    torch.testing.assert_close(model.unembed(resid, tokens), logits, atol=1e-10, rtol=0)
    assert torch.equal(model.unembed(resid, tokens), model(tokens))


@every_config
def test_a_later_token_never_changes_earlier_logits(cfg: SparseConfig) -> None:
    model, tokens = random_model(cfg), some_tokens(cfg, batch=1)
    logits = model(tokens)
    for place in range(tokens.shape[1]):
        changed = tokens.clone()
        changed[0, place] = (changed[0, place] + 1) % cfg.d_vocab
        difference = (model(changed) - logits).abs()[0].amax(-1)
        assert difference[:place].sum() < 1e-12
        assert difference[place] > 1e-6


def location_values(cache, cfg: SparseConfig, layer: int) -> dict[str, torch.Tensor]:
    """The value at every top-k location of a layer, its width last."""
    block = f"blocks.{layer}."
    return {
        "attn_in": cache[block + "attn.hook_in"],
        **{f"attn_{n}": cache[f"{block}attn.hook_{n}"].flatten(2) for n in "qkv"},
        "attn_out": cache[block + "hook_attn_out"],
        "mlp_in": cache[block + "mlp.hook_in"],
        "mlp_neuron": cache[block + "mlp.hook_post"],
        "mlp_out": cache[block + "hook_mlp_out"],
        "resid_post_attn": cache[block + "hook_resid_mid"],
        "resid_post_mlp": cache[block + "hook_resid_post"],
    }


@every_config
def test_each_location_has_at_most_k_nonzeros_and_the_others_are_dense(cfg: SparseConfig) -> None:
    model = random_model(cfg)
    _, cache = model.run_with_cache(some_tokens(cfg))
    for layer in range(cfg.n_layers):
        for location, value in location_values(cache, cfg, layer).items():
            nonzeros, k = (value != 0).sum(-1), int(cfg.topk_fraction * value.shape[-1])
            if location in cfg.topk_locations:
                assert (nonzeros <= k).all(), location
                if not (cfg.act_fn == "relu" and location == "mlp_neuron"):
                    assert (nonzeros == k).all(), location
            elif not any(name.startswith("resid_post") for name in cfg.topk_locations):
                assert (nonzeros == value.shape[-1]).all(), location


def standard_hook_names(cfg: SparseConfig) -> set[str]:
    """TransformerLens' names of what this architecture has."""
    names = {"hook_embed", "ln_final.hook_normalized"}
    for i in range(cfg.n_layers):
        names |= {f"blocks.{i}.{n}" for n in ("hook_resid_pre", "hook_resid_mid", "hook_resid_post")}
        names |= {f"blocks.{i}.{n}" for n in ("hook_attn_out", "hook_mlp_out")}
        names |= {f"blocks.{i}.{n}.hook_normalized" for n in ("ln1", "ln2")}
        names |= {f"blocks.{i}.attn.hook_{n}" for n in ("q", "k", "v", "z", "attn_scores", "pattern")}
        names |= {f"blocks.{i}.mlp.hook_{n}" for n in ("pre", "post")}
    return names


@every_config
def test_run_with_cache_records_the_standard_names_and_shapes(cfg: SparseConfig) -> None:
    _, cache = SparseTransformer(cfg).run_with_cache(some_tokens(cfg, 2, 5))
    assert standard_hook_names(cfg) <= set(cache)
    assert cache["blocks.1.attn.hook_q"].shape == (2, 5, cfg.n_heads, cfg.d_head)
    assert cache["blocks.1.attn.hook_pattern"].shape == (2, cfg.n_heads, 5, 5)
    assert cache["blocks.1.mlp.hook_post"].shape == (2, 5, cfg.d_mlp)
    assert cache["blocks.1.hook_attn_out"].shape == (2, 5, cfg.d_model)


@every_config
def test_every_hook_point_takes_edits(cfg: SparseConfig) -> None:
    """Whatever is recorded is used: changing it changes the logits."""
    model, tokens = random_model(cfg), some_tokens(cfg)
    logits = model(tokens)
    _, cache = model.run_with_cache(tokens)
    for name in cache:
        noise = torch.randn_like(cache[name])
        edited = model.run_with_hooks(tokens, fwd_hooks=[(name, lambda value, hook, noise=noise: value + noise)])
        assert (edited - logits).abs().max() > 1e-6, name
    assert torch.equal(model(tokens), logits)  # and no hook is left behind


def test_an_edit_does_what_it_says() -> None:
    model, tokens = random_model(SMALL), some_tokens(SMALL)
    edited = model.run_with_hooks(
        tokens, fwd_hooks=[("blocks.1.hook_mlp_out", lambda value, hook: torch.zeros_like(value))]
    )
    resid = model.embed(tokens)
    for i in range(3):
        resid = model.sublayer(i, resid)
    assert torch.equal(edited, model.unembed(resid, tokens))


@every_config
def test_hooking_the_pattern_does_not_change_the_result(cfg: SparseConfig) -> None:
    """Scores are only materialised where a hook wants them."""
    model, tokens = random_model(cfg), some_tokens(cfg)
    logits = model(tokens)
    for name in ("hook_pattern", "hook_attn_scores"):
        hooks = [(f"blocks.{i}.attn.{name}", lambda value, hook: value) for i in range(cfg.n_layers)]
        torch.testing.assert_close(model.run_with_hooks(tokens, fwd_hooks=hooks), logits, atol=1e-10, rtol=0)


@every_config
def test_patterns_sum_to_one_or_with_a_sink_to_less(cfg: SparseConfig) -> None:
    _, cache = random_model(cfg).run_with_cache(some_tokens(cfg))
    for i in range(cfg.n_layers):
        totals = cache[f"blocks.{i}.attn.hook_pattern"].sum(-1)
        if cfg.sink:
            assert ((totals > 0) & (totals < 1)).all()
        else:
            torch.testing.assert_close(totals, torch.ones_like(totals))


@every_config
@pytest.mark.parametrize("chunks", [[1] * 9, [3, 1, 4, 1]])
@torch.no_grad()
def test_cached_logits_equal_uncached_at_every_step(cfg: SparseConfig, chunks: list[int]) -> None:
    model, tokens = random_model(cfg), some_tokens(cfg)
    logits, cache, start = model(tokens), KVCache(), 0
    for size in chunks:
        stop = start + size
        torch.testing.assert_close(model(tokens[:, start:stop], cache), logits[:, start:stop], atol=1e-10, rtol=0)
        start = stop
    assert cache.length == 9


@every_config
@torch.no_grad()
def test_greedy_generation_equals_the_naive_loop(cfg: SparseConfig) -> None:
    model, tokens = random_model(cfg), some_tokens(cfg, 3, 4)
    expected = tokens
    for _ in range(cfg.n_ctx - 4):
        expected = torch.cat([expected, model(expected)[:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(tokens, cfg.n_ctx - 4), expected)
    assert torch.equal(model.generate(tokens, 0), tokens)


def test_sampling_follows_the_softmax() -> None:
    model, prompt = random_model(SMALL), some_tokens(SMALL, 1, 4)
    drawn = model.generate(prompt.expand(4000, -1), 1, temperature=2.0)[:, -1]
    expected = (model(prompt)[0, -1] / 2).softmax(-1)
    frequency = torch.bincount(drawn, minlength=SMALL.d_vocab) / 4000
    assert (frequency - expected).abs().max() < 0.04


def test_a_sequence_longer_than_the_context_is_an_error_with_both_lengths() -> None:
    model = SparseTransformer(SMALL)
    fits, cache = some_tokens(SMALL, 1, SMALL.n_ctx), KVCache()
    model(fits, cache)
    for call in (
        lambda: model(some_tokens(SMALL, 1, 13)),
        lambda: model(fits[:, :1], cache),
        lambda: model.generate(fits, 1),
    ):
        with pytest.raises(ValueError, match=r"13 tokens .* 12"):
            call()


@every_config
def test_every_trainable_parameter_gets_a_gradient(cfg: SparseConfig) -> None:
    model, tokens = random_model(cfg), some_tokens(cfg, 4, 12)
    torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == (
        ["bigram"] if cfg.bigram == "fixed" else []
    )
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is not None, name
            assert p.grad.abs().sum() > 0, name


@pytest.mark.parametrize("width", [1, 2, 5, 6])
def test_sinusoids_by_hand(width: int) -> None:
    table = sinusoidal_table(7, width)
    for position in range(7):
        for column in range(width):
            angle = position / 10_000 ** (2 * (column // 2) / width)
            expected = np.cos(angle) if column % 2 else np.sin(angle)
            assert table[position, column] == pytest.approx(expected, abs=1e-5)


def test_tied_weights_are_one_parameter() -> None:
    model = SparseTransformer(replace(SMALL, tied=True))
    assert model.unembedding.weight is model.token_embed.weight
    assert "unembedding.weight" not in dict(model.named_parameters())

"""Every family taken apart and put together again is the Hugging Face model, at every site."""

import pytest
import torch
from support.families import SETTINGS, tiny_lm
from support.helpers import TINY_VOCAB
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from bridges.dense import DenseModel, cast_parameters
from bridges.families import FAMILIES
from bridges.hybrid import residuals, suffix


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", FAMILIES)
def test_the_sublayers_composed_and_every_suffix_are_the_hf_model(kind: str, tied: bool, tokens: torch.Tensor) -> None:
    lm = tiny_lm(kind, tie_word_embeddings=tied)
    expected = lm(tokens).logits
    dense = DenseModel(lm)
    assert (dense.n_layers, dense.d_model, dense.n_ctx, dense.d_vocab) == (2, 16, 64, TINY_VOCAB)
    assert torch.allclose(dense(tokens), expected, atol=1e-6)
    for site, resid in enumerate(residuals(dense, tokens)):
        assert torch.allclose(suffix(dense, site, resid, tokens), expected, atol=1e-6)
    assert (lm.get_output_embeddings().weight is lm.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_sites_are_the_streams_of_the_hf_model(kind: str, tokens: torch.Tensor) -> None:
    """Even sites against HF's own hidden states, odd ones and the last against what their norms are given."""
    lm = tiny_lm(kind)
    dense = DenseModel(lm)
    given: dict[int, torch.Tensor] = {}
    for site in range(5):
        norm = dense.anatomy.norm(site)
        norm.register_forward_pre_hook(lambda norm, inputs, site=site: given.update({site: inputs[0]}))
    hidden = lm(tokens, output_hidden_states=True).hidden_states
    streams = [given[site].view(2, 12, 16) for site in range(5)]
    for site, resid in enumerate(residuals(dense, tokens)):
        assert torch.allclose(resid, streams[site], atol=1e-6)
    for layer in (0, 1):
        assert torch.allclose(streams[2 * layer], hidden[layer], atol=1e-6)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_norm_as_arithmetic_is_the_norm(kind: str) -> None:
    dense, stream = DenseModel(tiny_lm(kind)), 3 * torch.randn(2, 12, 16) + 0.5
    for site in range(5):
        norm, module = dense.anatomy.read_norm(site), dense.anatomy.norm(site)
        assert norm.centred == isinstance(module, nn.LayerNorm)
        value = norm.response(stream, norm.scale(stream))
        bias = getattr(module, "bias", None)
        assert torch.allclose(value if bias is None else value + bias, module(stream), atol=1e-5)


@pytest.mark.parametrize("kind", ["gpt_neo", "mistral", "qwen2", "phi3"])
def test_windows_slide_beyond_their_length(kind: str, tokens: torch.Tensor) -> None:
    """A window of 4 in two layers reaches at most six tokens back."""
    dense, other = DenseModel(tiny_lm(kind)), tokens.clone()
    other[:, 0] += 1
    moved = (dense(other % TINY_VOCAB) - dense(tokens)).abs().amax((0, 2))
    assert moved[3] > 1e-4
    slides_everywhere = kind in ("mistral", "phi3")
    assert (moved[8:].max() == 0) == slides_everywhere


def test_half_precision_sublayers_add_up_in_float32(tokens: torch.Tensor) -> None:
    lm = tiny_lm("gemma")
    expected = lm(tokens).logits.detach()
    cast_parameters(lm, torch.bfloat16)
    dense = DenseModel(lm)
    assert dense.embed(tokens).dtype == torch.float32
    assert dense(tokens).dtype == torch.bfloat16
    assert torch.allclose(dense(tokens).float(), expected, atol=0.1 * float(expected.abs().max()))


def test_positions_survive_half_precision(tokens: torch.Tensor) -> None:
    """Rotary frequencies are no parameters: rounded to bfloat16 they would turn far positions by another angle."""
    lm = tiny_lm("llama")
    frequencies = lm.model.rotary_emb.inv_freq.clone()
    cast_parameters(lm, torch.bfloat16)
    DenseModel(lm).float()
    assert torch.equal(lm.model.rotary_emb.inv_freq, frequencies)
    assert not torch.equal(frequencies, frequencies.bfloat16().float())


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        ("gptj", {"n_embd": 16, "n_layer": 1, "n_head": 2, "rotary_dim": 4}, "read the stream side by side"),
        ("gpt_neox", {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}, "side by side"),
        ("phi", {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}, "side by side"),
        ("stablelm", SETTINGS["stablelm"] | {"use_parallel_residual": True}, "side by side"),
        ("opt", SETTINGS["opt"] | {"do_layer_norm_before": False}, "norms behind its sublayers"),
        ("bert", {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}, "is a 'bert' model"),
    ],
)
def test_other_blocks_are_refused_with_the_reason(kind: str, settings: dict, reason: str) -> None:
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=TINY_VOCAB, **settings))
    with pytest.raises(ValueError, match=reason):
        DenseModel(lm)

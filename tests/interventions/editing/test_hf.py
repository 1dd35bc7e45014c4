"""intervene() on a plain Hugging Face model: the same numbers as in TransformerLens, and none of its code."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.helpers import make_tiny_run

from interventions import intervene, intervene_vector, load_hf


@pytest.fixture(scope="module")
def hf(folder: Path):
    return load_hf(folder)


@pytest.mark.parametrize("where", ["read", "stream"])
@pytest.mark.parametrize("site", ["attn.0", "mlp.0", "attn.1", "mlp.1", "unembed"])
def test_the_same_logits_as_in_transformer_lens(dense, hf, tokens: torch.Tensor, site: str, where: str) -> None:
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    assert torch.allclose(hf(tokens).logits, dense(tokens), atol=1e-5)
    for options in (
        {"delta": 4},
        {"delta": torch.tensor([3.0, -3.0]), "positions": [1, -2]},
        {"set_to": 3.0},
        {"toward": tokens.flip(1), "strength": 2.0},
    ):
        with intervene(hf, f"{site}.read.5", where=where, **options):
            measured = hf(tokens).logits
            padded = hf(tokens, attention_mask=mask, position_ids=position_ids).logits
        with intervene(dense, f"{site}.read.5", where=where, **options):
            assert torch.allclose(measured, dense(tokens), atol=1e-5), options
            expected = dense(tokens, attention_mask=mask)
        assert torch.allclose(padded[mask.bool()], expected[mask.bool()], atol=1e-5), options
        assert (measured - hf(tokens).logits).abs().max() > 1e-2


def test_vector_and_sums_are_those_of_transformer_lens(dense, hf, tokens: torch.Tensor) -> None:
    for where in ("read", "stream"):
        assert torch.allclose(
            intervene(hf, "pair", delta=2, where=where).vector(),
            intervene(dense, "pair", delta=2, where=where).vector(),
        )
    v = torch.randn(16)

    def both(model):
        return intervene(model, "pair", delta=2) + intervene_vector(model, 2, v, where="stream")

    with both(hf):
        measured = hf(tokens).logits
    with both(dense):
        assert torch.allclose(measured, dense(tokens), atol=1e-5)


@pytest.mark.parametrize("sample", [True, False])
def test_generate_agrees_with_and_without_cache_and_with_transformer_lens(dense, hf, tokens, sample: bool) -> None:
    def generate(cache: bool, **options):
        torch.manual_seed(0)
        options = {"max_new_tokens": 6, "do_sample": sample, "eos_token_id": None, "top_k": 0} | options
        return hf.generate(tokens, use_cache=cache, output_logits=True, return_dict_in_generate=True, **options)

    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    for padding in (None, mask):
        for options in (
            {"delta": 8, "positions": [2, -1, 13], "where": "stream"},
            {"delta": 8, "steps": "generated"},
            {"toward": tokens.flip(1), "strength": 4.0},
        ):
            with intervene(hf, ["pair", "mlp.0.read.2"], **options):
                cached, uncached = (generate(cache, attention_mask=padding) for cache in (True, False))
            assert torch.equal(cached.sequences, uncached.sequences)
            for a, b in zip(cached.logits, uncached.logits, strict=True):
                assert torch.allclose(a, b, atol=1e-4)
            assert not torch.equal(generate(True, attention_mask=padding).logits[-1], cached.logits[-1])
            if not sample:
                with intervene(dense, ["pair", "mlp.0.read.2"], **options):
                    out = dense.generate(
                        tokens,
                        max_new_tokens=6,
                        do_sample=False,
                        verbose=False,
                        stop_at_eos=False,
                        attention_mask=padding,
                    )
                assert torch.equal(out, cached.sequences)


@pytest.mark.parametrize("start", ["tokens", "embeddings", "static cache"])
def test_other_ways_to_generate(hf, tokens: torch.Tensor, start: str) -> None:
    """From embeddings the tokens are not known, a static cache gets another mask; positions are right all the same."""
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "output_logits": True}
    options |= {"return_dict_in_generate": True, "attention_mask": mask}
    ways = {
        "tokens": {"inputs": tokens},
        "embeddings": {"inputs_embeds": hf.transformer.wte(tokens)},
        "static cache": {"inputs": tokens, "cache_implementation": "static"},
    }
    for edit in ({"positions": [2, -1, 13], "where": "stream"}, {"steps": "generated"}, {"steps": "prompt"}):
        with intervene(hf, ["pair", "mlp.0.read.2"], delta=8, **edit):
            found = torch.stack(hf.generate(**ways[start], **options).logits)
            expected = torch.stack(hf.generate(tokens, use_cache=False, **options).logits)
        assert torch.allclose(found, expected, atol=1e-4), edit
        assert not torch.allclose(found, torch.stack(hf.generate(tokens, **options).logits), atol=1e-2), edit


def test_a_mask_per_row_also_where_the_model_is_given_embeddings(hf, tokens: torch.Tensor) -> None:
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[0, 3] = mask[1, 7] = True
    with intervene(hf, "pair", delta=4, positions=mask):
        found, expected = hf(inputs_embeds=hf.transformer.wte(tokens)).logits, hf(tokens).logits
    assert torch.allclose(found, expected, atol=1e-4)
    assert not torch.allclose(found, hf(tokens).logits, atol=1e-2)


def test_only_its_own_hooks_come_off(hf, tokens: torch.Tensor) -> None:
    seen = []
    user = hf.transformer.h[1].ln_1.register_forward_hook(lambda module, inputs, output: seen.append(1))

    def hooks():
        return [(list(m._forward_hooks), list(m._forward_pre_hooks)) for m in hf.modules()]

    try:
        before, plain = hooks(), hf(tokens).logits
        for site in ("attn.1", "mlp.1", "unembed"):
            for where in ("read", "stream"):
                handle = intervene(hf, f"{site}.read.5", delta=4, where=where)
                with handle:
                    assert hooks() != before
                assert hooks() == before
                with pytest.raises(RuntimeError, match="inside"), handle, handle:
                    raise RuntimeError("inside")
                assert hooks() == before
        assert torch.equal(hf(tokens).logits, plain)
        assert len(seen) == 2
    finally:
        user.remove()
    with intervene(hf, "pair", delta=0):
        assert torch.equal(hf(tokens).logits, plain)
    with pytest.raises(ValueError, match="has no run_with_hooks"):
        intervene(hf, "pair", delta=1).hooks()


def test_a_bfloat16_model_keeps_its_type(folder: Path, tokens: torch.Tensor) -> None:
    low = load_hf(folder, dtype=torch.bfloat16)
    for options in ({"delta": 4}, {"set_to": 3.0, "where": "stream"}, {"toward": tokens.flip(1)}):
        with intervene(low, ["pair", "mlp.1.read.4"], **options):
            assert low(tokens).logits.dtype == torch.bfloat16
        assert not torch.equal(intervene_logits(low, tokens, options), low(tokens).logits)


def intervene_logits(model, tokens: torch.Tensor, options: dict) -> torch.Tensor:
    with intervene(model, "pair", **options):
        return model(tokens).logits


def test_a_folder_that_is_no_run_is_named(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"dense/config\.json does not exist"):
        load_hf(tmp_path)
    make_tiny_run(tmp_path / "run")
    (tmp_path / "run" / "bridges" / "bridges.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ValueError, match=r"bridges\.safetensors is damaged"):
        load_hf(tmp_path / "run")


WITHOUT_LENS = """
import sys
sys.modules["transformer_lens"] = None  # any import of it fails
import torch
from interventions import Intervention, intervene, load_hf
folder, out = sys.argv[1:]
hf = load_hf(folder)
tokens = torch.load(out + "/tokens.pt")
logits = []
for options in ({"delta": 3}, {"set_to": 2.0, "where": "stream", "positions": [1, -1]}):
    with intervene(hf, ["pair", "mlp.0.read.7"], **options):
        logits.append(hf(tokens).logits)
        generated = hf.generate(tokens, max_new_tokens=4, do_sample=False, eos_token_id=None)
try:
    with intervene(hf, "pair", toward=tokens):
        hf(tokens)
except ImportError as error:
    assert "toward runs the sparse model, which is built on TransformerLens" in str(error), error
else:
    raise AssertionError("toward worked without the sparse model")
with Intervention.load(out + "/handle", hf):
    logits.append(hf(tokens).logits)
torch.save([logits, generated], out + "/logits.pt")
"""


def test_it_works_where_transformer_lens_cannot_be_imported(dense, folder: Path, tmp_path: Path, tokens) -> None:
    torch.save(tokens, tmp_path / "tokens.pt")
    handle = intervene(dense, "pair", delta=torch.tensor([1.0, 2.0]))
    handle.save(tmp_path / "handle")
    command = [sys.executable, "-c", WITHOUT_LENS, str(folder), str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    logits, generated = torch.load(tmp_path / "logits.pt")
    for found, options in zip(
        logits[:2], ({"delta": 3}, {"set_to": 2.0, "where": "stream", "positions": [1, -1]}), strict=True
    ):
        with intervene(dense, ["pair", "mlp.0.read.7"], **options):
            assert torch.allclose(found, dense(tokens), atol=1e-5)
            expected = dense.generate(tokens, max_new_tokens=4, do_sample=False, verbose=False, stop_at_eos=False)
    assert torch.equal(generated, expected)
    with handle:
        assert torch.allclose(logits[2], dense(tokens), atol=1e-5)

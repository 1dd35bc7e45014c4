"""Edits of every family: on the plain HF model, in TransformerLens and by hand they are the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import tiny_lm
from support.helpers import make_tiny_run

from bridges.families import FAMILIES
from bridges.hybrid import residuals, suffix
from interventions import intervene, intervene_vector, load_dense, load_hf
from interventions.steering.steered_prompts import Prompts, SteeredPrompts


@pytest.fixture(scope="module", params=FAMILIES)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A family's model on a run, in TransformerLens and plain."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    make_tiny_run(folder, lm=tiny_lm(request.param))
    return load_dense(folder), load_hf(folder)


def read_by_hand(dense: Any, site: int, resid: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """What the edited norm gives, written out."""
    norm = dense.anatomy.norm(site)
    if isinstance(norm, torch.nn.LayerNorm):
        std = (resid.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
        return norm(resid) + norm.weight * (v - v.mean()) / std
    eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
    gain = 1 + norm.weight if "Gemma" in type(norm).__name__ else norm.weight
    return gain * (resid + v) / (resid.square().mean(-1, keepdim=True) + eps).sqrt()


@pytest.mark.parametrize("where", ["read", "stream"])
@pytest.mark.parametrize("site", range(5))
def test_every_site(both: tuple[Any, Any], tokens: torch.Tensor, site: int, where: str) -> None:
    dense, hf = both
    run, v = dense.bundle.run, torch.randn(16)
    with torch.no_grad():
        resid = residuals(run.dense, tokens)[site]
        if where == "stream":
            expected = suffix(run.dense, site, resid + v, tokens)
        elif site == 4:
            expected = run.dense.anatomy.head(read_by_hand(run.dense, site, resid, v))
        else:
            sublayer = run.dense.anatomy.mlp if site % 2 else run.dense.anatomy.attend
            after = resid + sublayer(site // 2, read_by_hand(run.dense, site, resid, v))
            expected = suffix(run.dense, site + 1, after, tokens)
    with intervene_vector(hf, site, v, where=where):
        assert torch.allclose(hf(tokens).logits, expected, atol=1e-5)
        assert (expected - run.dense.hf(tokens).logits).abs().max() > 1e-2
    with intervene_vector(dense, site, v, where=where):
        assert torch.allclose(dense(tokens), expected, atol=1e-5)
    label = ("attn.0", "mlp.0", "attn.1", "mlp.1", "unembed")[site]
    for options in ({"set_to": 3.0}, {"toward": tokens.flip(1), "strength": 2.0}):
        with intervene(hf, f"{label}.read.5", where=where, **options):
            measured = hf(tokens).logits
        with intervene(dense, f"{label}.read.5", where=where, **options):
            assert torch.allclose(measured, dense(tokens), atol=1e-5)


def test_the_direction_is_the_mean_response_of_the_norm(both: tuple[Any, Any]) -> None:
    v, bundle = torch.randn(16), both[1].bundle
    bridges = bundle.bridges
    for site in range(5):
        norm = bundle.anatomy.read_norm(site)
        expected = norm.gain * (
            (v - v.mean()) / bridges.std_dense[site] if norm.centred else v / bridges.rms_dense[site]
        )
        for model in both:
            assert torch.allclose(intervene_vector(model, site, v).vector(), expected)


def test_generation_with_and_without_a_cache(both: tuple[Any, Any], tokens: torch.Tensor) -> None:
    """The prompt is longer than the sliding windows; the edits depend on absolute positions and on the prompt."""
    dense, hf = both
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    plain = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    for padding in (None, mask):
        for options in (
            {"delta": 8, "positions": [2, -1, 13], "where": "stream"},
            {"toward": tokens.flip(1), "strength": 4.0},
        ):
            outs = []
            for cache in (True, False):
                with intervene(hf, ["attn.1.read.3", "mlp.0.read.2"], **options):
                    outs.append(
                        hf.generate(
                            tokens,
                            attention_mask=torch.ones_like(tokens) if padding is None else padding,
                            use_cache=cache,
                            output_logits=True,
                            return_dict_in_generate=True,
                            **plain,
                        )
                    )
            assert torch.equal(outs[0].sequences, outs[1].sequences)
            for a, b in zip(outs[0].logits, outs[1].logits, strict=True):
                assert torch.allclose(a, b, atol=1e-4)
            with intervene(dense, ["attn.1.read.3", "mlp.0.read.2"], **options):
                seen = dense.generate(
                    tokens, max_new_tokens=6, do_sample=False, verbose=False, stop_at_eos=False, attention_mask=padding
                )
            assert torch.equal(seen, outs[0].sequences)


def test_the_copy_in_the_run_is_the_model(tmp_path: Path, tokens: torch.Tensor) -> None:
    for kind in ("gpt2", "gemma"):
        for tied in (True, False):
            lm = tiny_lm(kind, tie_word_embeddings=tied)
            run = make_tiny_run(tmp_path / f"{kind}-{tied}", lm=lm)
            assert torch.equal(run.dense.hf(tokens).logits, lm(tokens).logits)


def test_static_caches_bring_masks_by_kind_of_layer(tmp_path: Path, tokens: torch.Tensor) -> None:
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    plain = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    outs = []
    make_tiny_run(tmp_path / "qwen2", lm=tiny_lm("qwen2"))
    hf = load_hf(tmp_path / "qwen2")
    for cache in (None, "static"):
        with intervene(hf, "attn.1.read.3", delta=20, positions=[1, -1, 13], where="stream"):
            outs.append(hf.generate(tokens, cache_implementation=cache, **plain))
    assert torch.equal(*outs)
    make_tiny_run(tmp_path / "mistral", lm=tiny_lm("mistral"))
    hf = load_hf(tmp_path / "mistral")
    with pytest.raises(ValueError, match="masks of its sliding window alone"):
        hf.generate(tokens, cache_implementation="static", **plain)


@pytest.mark.parametrize("kind", ["gpt_neo", "mistral", "gemma"])
def test_many_edits_in_one_pass_share_a_prefix_longer_than_the_window(tmp_path: Path, kind: str) -> None:
    make_tiny_run(tmp_path / "run", lm=tiny_lm(kind))
    hf, tokens = load_hf(tmp_path / "run"), torch.randint(384, (3, 12))
    other, last = tokens.clone(), torch.tensor([11, 11, 10])
    other[:, 9] = (other[:, 9] + 1) % 384
    prompts = Prompts(tokens, other, torch.tensor([5, 6, 7]), torch.tensor([8, 9, 10]), last)
    steered = SteeredPrompts(hf, prompts, 2, "stream")
    edits = torch.randn(2, 3, 12, 16) * prompts.open[..., None]
    found = steered.answers(list(edits), [0.5])
    with torch.no_grad():
        for row in range(3):
            for number, strength in ((None, 0), (0, 0.5), (1, 0.5)):
                edit = edits[number or 0, row : row + 1, : last[row] + 1]
                with intervene_vector(hf, 2, edit, strength=strength, where="stream"):
                    p = hf(tokens[row : row + 1, : last[row] + 1]).logits[0, -1].softmax(-1)[prompts.target[row]]
                answers = steered.base.target[row] if number is None else found.target[0, number, row]
                assert torch.allclose(answers, p, atol=1e-6)

"""Looking inside: each call gives what the models themselves compute."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.helpers import CHANNEL, make_tiny_run
from transformer_lens import ActivationCache

from bridges.run_folder import Run
from bridges.sites import Site
from interventions import Channel, Circuit, intervene, intervene_vector, load_dense
from interventions.bundle.channels import read_nodes
from interventions.circuits.ablation import Ablation, Calibration
from interventions.circuits.node_model import locations
from interventions.looking.activations import activations, sparse_cache, top_channels
from interventions.looking.examples import logit_lens, top_examples
from interventions.report import channels as report_channels
from sparse_model.model.transformer import SparseTransformer
from sparse_model.sparsity.abs_topk import abs_topk

TEXTS = ["cat.load('old hat')", "x = 1\nif x:\n    y"]


def test_text_is_tokenized_as_for_training(run: Run) -> None:
    tokens = run.sparse.to_tokens(TEXTS)
    ids = [run.tokenizer.encode(text) for text in TEXTS]
    for row, own in zip(tokens, ids, strict=True):
        assert row.tolist() == [0, *own, *[0] * (tokens.shape[1] - len(own) - 1)]
    assert torch.equal(run.sparse(TEXTS), run.sparse(tokens))
    assert run.sparse.to_string(ids[0]) == TEXTS[0] == "".join(run.sparse.to_str_tokens(TEXTS[0])[1:])
    assert run.sparse.to_single_token("('") == run.tokenizer.encode("('")[0]
    with pytest.raises(ValueError, match=r"is \d+ tokens, .*, not one"):
        run.sparse.to_single_token(TEXTS[0])
    assert run.sparse.to_tokens("<|endoftext|>").numel() > 2  # a text, not a token
    with pytest.raises(ValueError, match="has no tokenizer"):
        SparseTransformer(run.sparse.cfg).to_tokens("x")


def test_the_cache_is_the_models_own_and_padding_changes_nothing(dense, run: Run) -> None:
    cache = sparse_cache(dense, TEXTS)
    assert isinstance(cache, ActivationCache)
    _, own = run.sparse.run_with_cache(run.sparse.to_tokens(TEXTS))
    assert set(cache) == set(own)
    assert all(torch.equal(cache[name], own[name]) for name in own)
    alone = activations(dense, TEXTS[0], "mlp.0")
    assert torch.allclose(activations(dense, TEXTS, "mlp.0")[:1, : alone.shape[1]], alone, atol=1e-6)


def test_places(dense, run: Run, tokens: torch.Tensor) -> None:
    def equals(place: str | int | Channel, wanted: torch.Tensor) -> bool:
        return torch.allclose(activations(dense, tokens, place), wanted, atol=1e-5)

    _, cache = run.sparse.run_with_cache(tokens)
    reads = read_nodes(run.sparse, tokens, 2)
    assert equals(2, reads)
    assert equals("attn.1", reads)
    assert equals("attn.1.read.7", reads[..., 7])
    assert equals("pair", CHANNEL.value(reads))
    assert equals(CHANNEL, CHANNEL.value(reads))
    assert equals("0.mlp.post_act.3", cache["blocks.0.mlp.hook_post"][..., 3])
    assert equals("1.attn.q.head1.ch2", cache["blocks.1.attn.hook_q"][..., 1, 2])
    with pytest.raises(KeyError, match="unknown channel 'pairs': did you mean pair"):
        activations(dense, tokens, "pairs")


def test_the_encoder_reads_the_dense_stream(dense, run: Run, tokens: torch.Tensor) -> None:
    _, streams = dense.run_with_cache(tokens)
    for i in range(5):
        site = Site(i, 2)
        encoded = run.bridges.encode(i, streams[site.stream_hook])
        normalized = F.rms_norm(encoded, encoded.shape[-1:])
        wanted = normalized if site.is_final else abs_topk(normalized, int(0.25 * encoded.shape[-1]))
        assert torch.allclose(activations(dense, tokens, i, source="encoder"), wanted, atol=1e-4), i
    assert not torch.allclose(activations(dense, tokens, 2, source="encoder"), activations(dense, tokens, 2), atol=0.1)
    assert set(sparse_cache(dense, tokens, source="encoder")) >= {"blocks.1.mlp.hook_post", "hook_logits"}


def test_top_channels_are_the_largest(dense, tokens: torch.Tensor) -> None:
    reads = activations(dense, tokens, 1)
    top = top_channels(dense, tokens, 1, count=3)
    assert top.indices.shape == (*tokens.shape, 3)
    assert torch.equal(top.values, reads.gather(-1, top.indices))
    assert torch.equal(top.values.abs(), reads.abs().sort(descending=True).values[..., :3])


def test_top_examples_are_the_extremes_of_a_corpus(dense, run: Run) -> None:
    corpus = torch.randint(1, 300, (70, 40), dtype=torch.int32)
    values = activations(dense, corpus.long(), "attn.1.read.7")
    for lowest, peaks in ((False, values.amax(1)), (True, -values.amin(1))):
        found = top_examples(dense, "attn.1.read.7", corpus, count=5, lowest=lowest)
        wanted = peaks.sort(descending=True).values[:5]
        signed = torch.tensor([-example.value if lowest else example.value for example in found])
        assert torch.allclose(signed, wanted, atol=1e-6)
        for example in found:
            row, column = (values == example.value).nonzero()[0].tolist()
            assert example.tokens[example.peak] == corpus[row, column]
            assert example.text.partition("«")[2].startswith(run.tokenizer.decode([int(corpus[row, column])]))
            assert str(example).startswith(f"{example.value:+.3f}  ")


def test_the_lens_is_the_reports(dense, run: Run) -> None:
    raised, lowered = logit_lens(dense, "pair", count=report_channels.LENS_TOKENS)
    assert raised[0].logit == max(one.logit for one in (*raised, *lowered))
    shown = report_channels.logit_lens(run, dense, CHANNEL)
    assert [[one.logit for one in side] for side in shown] == [
        [round(one.logit, 3) for one in side] for side in (raised, lowered)
    ]
    # One unit of a channel of the last site, through the plain decoder column.
    last = Site(4, 2)
    (top, *_), _ = logit_lens(dense, f"{last.label}.read.5", count=1)
    column = run.bridges.rms_sparse[4] * run.bridges.directions(4)[5]
    read = run.dense.hf.transformer.ln_f.weight * (column - column.mean()) / run.bridges.std_dense[4]
    assert top.logit == pytest.approx(float((run.dense.hf.lm_head.weight @ read).max()), rel=1e-5)


def test_weights_have_the_lens_names_and_compute_what_the_model_does(tmp_path: Path, tokens: torch.Tensor) -> None:
    sparse = make_tiny_run(tmp_path / "run").sparse
    cfg = sparse.cfg
    for parameter in sparse.parameters():  # biases begin at zero
        parameter.data += 0.1 * torch.randn_like(parameter)
    logits, cache = sparse.run_with_cache(tokens)
    assert torch.equal(cache["hook_embed"], sparse.W_E[tokens])
    attn, mlp, z = (cache[f"blocks.1.{name}"] for name in ("attn.hook_in", "mlp.hook_in", "attn.hook_z"))
    for name in "QKV":
        heads = torch.einsum("bpr,hrd->bphd", attn, getattr(sparse, f"W_{name}")[1]) + getattr(sparse, f"b_{name}")[1]
        kept = abs_topk(heads.flatten(2), int(cfg.topk_fraction * heads[0, 0].numel())).unflatten(2, heads.shape[2:])
        assert torch.allclose(cache[f"blocks.1.attn.hook_{name.lower()}"], kept, atol=1e-5)
    write = torch.einsum("bphd,hdm->bpm", z, sparse.W_O[1]) + sparse.b_O[1]
    assert torch.allclose(cache["blocks.1.hook_attn_out"], abs_topk(write, cfg.d_model // 4), atol=1e-5)
    assert torch.allclose(cache["blocks.1.mlp.hook_pre"], mlp @ sparse.W_in[1] + sparse.b_in[1], atol=1e-5)
    write = cache["blocks.1.mlp.hook_post"] @ sparse.W_out[1] + sparse.b_out[1]
    assert torch.allclose(cache["blocks.1.hook_mlp_out"], abs_topk(write, cfg.d_model // 4), atol=1e-5)
    last = cache["ln_final.hook_normalized"]
    assert torch.allclose(logits, last @ sparse.W_U + sparse.b_U + sparse.bigram[tokens], atol=1e-5)
    with pytest.raises(ValueError, match="positions='none': the model has no W_pos"):
        _ = sparse.W_pos


def test_the_dense_model_takes_a_dtype(folder: Path, tokens: torch.Tensor) -> None:
    half, whole = load_dense(folder, dtype=torch.bfloat16), load_dense(folder)
    assert half.bundle.hf.dtype == torch.bfloat16
    assert half.bundle.sparse.W_E.dtype == half.bundle.bridges.rms_sparse.dtype == torch.float32
    with torch.no_grad(), intervene(half, "pair", delta=1.0):
        logits = half(tokens)
    with torch.no_grad(), intervene(whole, "pair", delta=1.0):
        wanted = whole(tokens)
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - wanted).norm() < 0.05 * wanted.norm()


def test_what_is_printed_can_be_read(dense, run: Run) -> None:
    assert repr(CHANNEL) == "<channel pair: 2 channels at site 2: 3 (+1.00), 11 (-0.50)>"
    assert str(dense.bundle) == f"{run.folder}: 5 sites, dense width 16, sparse 32; channels: pair"
    assert repr(intervene(dense, "pair", delta=-2, strength=0.5)) == (
        "<intervention: pair by -2 times 0.5 at attn.1, read, in all steps>"
    )
    both = intervene(dense, "pair", set_to=1, where="stream") + intervene_vector(dense, 0, 2 * torch.eye(16)[0])
    assert repr(both) == (
        "<intervention: pair to 1 at attn.1, stream, in all steps; a vector of length 2 at attn.0, read, in all steps>"
    )
    toward = intervene(dense, "pair", toward=torch.zeros(1, 4, dtype=torch.long), steps="prompt")
    assert "pair toward a counterfactual at attn.1, read, in prompt steps" in repr(toward)


def test_a_circuit_is_one_line(tmp_path: Path) -> None:
    run = make_tiny_run(tmp_path / "run")
    circuit = Circuit(
        task="with_as",
        model="sparse",
        shape=run.sparse.cfg,
        fingerprint="",
        nodes={location.name: () for location in locations(run.sparse.cfg)},
        edges=(),
        tied_qk=False,
        loss=0.25,
        unpruned_loss=0.1,
        calibration=Calibration(1.0, {}),
        ablation=Ablation("zero", {}),
    )
    assert repr(circuit) == "<circuit with_as, sparse model: 0 nodes, 0 edges, task loss 0.250, UNCONTROLLED>"

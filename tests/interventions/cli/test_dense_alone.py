"""--dense alone: the sparse model's shape follows, and every stage takes a model of another family than GPT-2."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from support.families import tiny_lm
from support.helpers import tiny_tokenizer

from bridges import load_lm, open_run
from interventions import intervene, load_dense, load_hf
from interventions.cli.main import main
from sparse_model.data.tokenizer import load_tokenizer, save_tokenizer, tokenizer_fingerprint

FEW = ["--steps", "1", "--corpus-tokens", "4000", "--eval-tokens", "64", "--log-every", "1"]


@pytest.fixture(autouse=True)
def _somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPARSE_BRIDGES_CACHE", str(tmp_path / "cache"))


def train(*options: str) -> None:
    main(["train-bridge", "tiny", "--dense", "lm", "--run", "run", *FEW, *options])


@pytest.mark.parametrize("kind", ["gpt2", "qwen3"])
def test_one_option_trains_and_everything_follows(
    kind: str, tokens: torch.Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    lm = tiny_lm(kind, seed=1)
    lm.save_pretrained("lm")
    if kind == "gpt2":
        tiny_tokenizer().backend_tokenizer.model.save("lm")
        assert {"vocab.json", "merges.txt"} <= {path.name for path in Path("lm").iterdir()}
    else:
        save_tokenizer(tiny_tokenizer(), "lm")
    train("--sparse.d-head", "8")
    said = capsys.readouterr().out
    assert f"lm is a {kind} model of 2 layers, width 16, context 64 and vocabulary 384; " in said
    assert "--sparse.n-layers 2 --sparse.d-vocab 384 --sparse.n-ctx 64 --sparse.d-model 32 --sparse.d-mlp 128" in said
    assert "--sparsity.nonzero-fraction 0.25" in said
    positions = "learned" if kind == "gpt2" else "none"
    assert f"--sparse.positions {positions} " in said
    run = open_run("run")
    assert run.config.sparse.positions == positions
    assert (run.config.dense, run.config.sparse.d_head, run.config.sparse.d_model) == ("lm", 8, 32)
    assert torch.equal(run.dense.hf(tokens).logits, lm(tokens).logits)
    assert tokenizer_fingerprint(run.tokenizer) == tokenizer_fingerprint(load_tokenizer("lm"))
    assert len(json.loads(Path("run/metrics.json").read_text())["sites"]) == 5
    shutil.rmtree("lm")  # the run holds all it needs
    train("--sparse.d-head", "8", "--resume")
    main(["evaluate", "--run", "run"])
    main(["report", "--run", "run"])
    if kind != "gpt2":
        main(["solved-tasks", "run", "--pairs", "2"])
    logits = []
    for model in (load_dense("run"), load_hf("run")):
        with intervene(model, "mlp.1.read.3", delta=4.0):
            out = model(tokens)
            logits.append(out if isinstance(out, torch.Tensor) else out.logits)
    assert torch.allclose(*logits, atol=1e-5)


def test_options_that_are_given_win(capsys: pytest.CaptureFixture[str]) -> None:
    tiny_lm("gpt2").save_pretrained("lm")
    save_tokenizer(tiny_tokenizer(), "lm")
    train("--sparse.n-ctx=24", "--sparse.d-model=48", "--sparsity.nonzero-fraction=0.5", "--sparse.positions=none")
    shape = json.loads(Path("run/config.json").read_text())
    assert (shape["sparse"]["n_ctx"], shape["sparse"]["d_model"], shape["sparsity"]["nonzero_fraction"]) == (
        24,
        48,
        0.5,
    )
    assert (shape["sparse"]["n_layers"], shape["sparse"]["positions"]) == (2, "none")
    assert "--sparse.n-ctx 24 --sparse.d-model 48" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: shutil.copytree("lm", "lm/dense"), "error: lm is a run folder: name the dense model in it, lm/dense"),
        (lambda: shutil.rmtree("lm"), "error: could not load a language model from 'lm': "),
        (lambda: Path("lm/config.json").write_text('{"model_type": "bert"}'), "error: 'lm' is a 'bert' model"),
        (lambda: Path("lm/tokenizer.json").unlink(), "error: lm has no tokenizer (no tokenizer.json, nor vocab.json"),
        (lambda: Path("lm/tokenizer.json").write_text(""), "tokenizer.json is empty: copy it again"),
        (lambda: Path("lm/model.safetensors").write_bytes(b""), "model.safetensors is empty: copy it again"),
        (
            lambda: tiny_lm("gpt2", vocab_size=300).save_pretrained("lm"),
            "error: the vocabulary of lm has 300 tokens, but its tokenizer gives ids up to 383: name the one that it",
        ),
        (
            lambda: tiny_lm("gpt2", scale_attn_weights=False).save_pretrained("lm"),
            "error: TransformerLens' view of this GPT2LMHeadModel give",
        ),
    ],
)
def test_refusals_are_one_sentence_and_leave_nothing(change, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_lm("gpt2").save_pretrained("lm")
    save_tokenizer(tiny_tokenizer(), "lm")
    change()
    with pytest.raises(SystemExit):
        train()
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(said) == 1
    assert message.removeprefix("error: ") in said[0]
    assert not Path("run").exists()


def test_a_padded_vocabulary_is_fine_and_another_tokenizer_can_be_named() -> None:
    tiny_lm("opt", vocab_size=448).save_pretrained("lm")
    save_tokenizer(tiny_tokenizer(), "tokenizer")
    train("--tokenizer", "tokenizer")
    assert open_run("run").config.sparse.d_vocab == 448
    assert load_lm("run/dense").config.model_type == "opt"

"""Text sampled from the dense model: its distribution, every family, resuming, and as a source of a run's corpus."""

import dataclasses
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import SETTINGS, tiny_lm
from support.helpers import TINY_VOCAB, make_tiny_run, tiny_tokenizer

from bridges import self_text
from bridges.config import RunConfig, SampleConfig
from bridges.pipeline import evaluate_run, train_bridge
from bridges.run_folder import open_run
from bridges.self_text import sample_documents
from sparse_model.config import SparseConfig, SparsityConfig
from sparse_model.data.encoding import encode_text
from sparse_model.training.pretrain import PretrainConfig, pretrain


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSE_BRIDGES_CACHE", str(tmp_path / "cache"))


def config(tokens: int = 300, spec: str = "self", **samples: Any) -> RunConfig:
    options = SampleConfig(**{"batch_size": 8, "longest": 12} | samples)
    return RunConfig(dense="somewhere", corpus=spec, corpus_tokens=tokens, samples=options)


def sampled(config: RunConfig, model: Any) -> list[dict[str, Any]]:
    path = sample_documents(config, model, tiny_tokenizer(), progress=False)
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("kind", SETTINGS)
def test_every_family_samples(kind: str) -> None:
    model = tiny_lm(kind)
    own = model.generation_config
    rows = sampled(config(), model)
    assert model.generation_config is own
    assert len(rows) % 8 == 0
    assert sum(row["tokens"] for row in rows) >= 1.15 * 300 > sum(row["tokens"] for row in rows[:-8])
    for row in rows:
        assert row["ended"] or row["tokens"] == 11  # 12 with the token that begins it
        assert not row["same"] or len(encode_text(tiny_tokenizer(), row["text"])) == row["tokens"]


def test_it_is_sampled_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # there is none: what moved there would fail
    model = tiny_lm("gpt2")
    sample_documents(config(), model, tiny_tokenizer(), torch.device("cpu"), progress=False)
    assert model.device.type == "cpu"


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_have_the_models_distribution(temperature: float) -> None:
    model, tokenizer = tiny_lm("gpt2"), tiny_tokenizer()
    model.generation_config.update(do_sample=True, top_k=3, repetition_penalty=5.0)  # what its owner set for chats
    n = 4000
    begun = [[0]] * n
    options = SampleConfig(temperature=temperature)
    drawn = self_text._draw(options, model, tokenizer, begun, 2, 0)
    ended = sum(document.ended for document in drawn) / n
    wanted = torch.softmax(model(torch.tensor([[0]])).logits[0, -1].detach() / temperature, -1)
    assert ended == pytest.approx(float(wanted[0]), abs=4 * (0.25 / n) ** 0.5)
    texts = [document.text for document in self_text._draw(options, model, tokenizer, begun, 2, 1)]
    of_text: Counter[str] = Counter()  # bytes that are no text by themselves are all written in one way
    for token, share in enumerate(wanted.tolist()):
        of_text[tokenizer.decode([token], skip_special_tokens=True)] += share
    for text, share in of_text.most_common(8):
        assert texts.count(text) / n == pytest.approx(share, abs=4 * (0.25 / n) ** 0.5)


@pytest.mark.parametrize("kind", ["gpt2", "opt", "llama", "gpt_neo"])
def test_prompts_of_any_length_go_on_as_they_do_alone(tmp_path: Path, kind: str) -> None:
    model, tokenizer = tiny_lm(kind), tiny_tokenizer()
    prompts = ["cat.load(", "while True:\n    x = 1"[:11], "if"]
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(prompts) + "\n\n")
    rows = sampled(config(prompts=str(path), temperature=1e-4, longest=16), model)
    for row, prompt in zip(rows, prompts * 9, strict=False):
        assert row["text"].startswith(prompt)
        ids = [0, *encode_text(tokenizer, prompt)]
        for _ in range(row["tokens"] + 1 - len(ids)):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert row["text"] == tokenizer.decode(ids[1:], skip_special_tokens=True)


def test_sampling_goes_on_after_a_kill(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, chosen, draw = tiny_lm("gpt2"), config(), self_text._draw
    whole = sample_documents(chosen, model, tiny_tokenizer(), progress=False)
    wanted = whole.read_bytes()
    shutil.rmtree(whole.parent)
    batches: list[int] = []

    def killed(*args: Any) -> Any:
        batches.append(args[-1])
        if len(batches) == 3:
            raise KeyboardInterrupt
        return draw(*args)

    monkeypatch.setattr(self_text, "_draw", killed)
    with pytest.raises(KeyboardInterrupt):
        sample_documents(chosen, model, tiny_tokenizer(), progress=False)
    (part,) = (tmp_path / "cache").glob("self-*.part.jsonl")
    with part.open("a") as file:
        file.write('{"text": "half a ba", "tokens": 3, "ended": true, "same": true}\n{"text": "and ha')
    again = sample_documents(chosen, model, tiny_tokenizer(), progress=False)
    assert batches[:4] == [0, 1, 2, 2]
    assert again.read_bytes() == wanted
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [again.parent.name]
    monkeypatch.setattr(self_text, "_draw", None)
    assert sample_documents(chosen, model, tiny_tokenizer(), progress=False) == again


def test_what_shapes_the_samples_is_in_their_name() -> None:
    model = tiny_lm("gpt2")
    base = config()
    others = [dataclasses.replace(base, samples=dataclasses.replace(base.samples, **change)) for change in (
        {"seed": 1}, {"temperature": 0.7}, {"longest": 10}, {"batch_size": 4})]  # fmt: skip
    chosen = [
        (base, model),
        *((other, model) for other in others),
        (base, tiny_lm("gpt2", seed=1)),
        (config(400), model),
    ]
    files = [sample_documents(c, m, tiny_tokenizer(), progress=False) for c, m in chosen]
    assert len({file.read_bytes() for file in files}) == len(set(files)) == 7


def test_a_model_that_never_ends_is_said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_lm("gpt2")
    forward = model.forward

    def endless(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits[..., 0] = -1e9
        return output

    monkeypatch.setattr(model, "forward", endless)
    rows = sampled(config(), model)
    assert {row["tokens"] for row in rows} == {11}
    assert "no document that the dense model sampled ended by itself" in caplog.text
    assert "cut at 12 tokens" in caplog.text
    no_end = tiny_tokenizer().__class__(tokenizer_object=tiny_tokenizer().backend_tokenizer)
    with pytest.raises(ValueError, match="the tokenizer of somewhere has no end-of-text token"):
        sample_documents(config(), model, no_end, progress=False)


def test_wrong_options_are_named(tmp_path: Path) -> None:
    model = tiny_lm("gpt2")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "long.txt").write_text("x = 1 " * 50)
    for samples, message in (
        ({"prompts": str(tmp_path / "gone")}, "is no file: give a text file"),
        ({"prompts": str(tmp_path / "empty.txt")}, "holds no prompt"),
        ({"prompts": str(tmp_path / "long.txt")}, "tokens, and documents at most 12: shorten it"),
        ({"longest": 65}, "samples.longest=65: the dense model's context holds 64 tokens"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            sample_documents(config(**samples), model, tiny_tokenizer(), progress=False)  # type: ignore[arg-type]
    for name, value in (("temperature", 0.0), ("longest", 1), ("batch_size", 0)):
        with pytest.raises(ValueError, match=f"samples.{name}="):
            SampleConfig(**{name: value})  # type: ignore[arg-type]


SMALL: dict[str, Any] = {
    "corpus_tokens": 2000,
    "steps": 2,
    "batch_size": 2,
    "eval_tokens": 64,
    "sparse": SparseConfig(d_model=16, d_mlp=32, n_heads=2, d_head=8, n_ctx=16, d_vocab=TINY_VOCAB),
    "sparsity": SparsityConfig(nonzero_fraction=0.25),
}


def test_a_run_keeps_the_text_that_it_sampled(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_tiny_run(tmp_path / "first")
    folder = tmp_path / "run"
    chosen = RunConfig(**SMALL, corpus="self:0.5,generated:0.5", dense=str(tmp_path / "first" / "dense"))
    metrics = train_bridge(chosen, folder, progress=False)
    record = json.loads((folder / "metrics.json").read_text())["training"]["corpus"]
    assert record["sources"][0]["note"].startswith("sampled from the dense model: of ")
    assert record["splits"]["train"]["sources"]["self"]["share"] == pytest.approx(0.5, abs=0.05)
    assert "self was sampled from" in metrics["held_out_text"]
    # Neither cache nor the named model is needed again.
    shutil.rmtree(tmp_path / "cache")
    shutil.rmtree(tmp_path / "first")
    assert evaluate_run(open_run(folder), progress=False)["dense"] == metrics["dense"]
    shutil.rmtree(tmp_path / "cache")
    train_bridge(chosen, folder, resume=True, progress=False)
    assert not list((tmp_path / "cache").glob("self-*"))


def test_self_needs_a_dense_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"corpus 'self' is text sampled from a dense model.* with --dense"):
        train_bridge(RunConfig(**SMALL, corpus="self"), tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match=r"corpus 'self' is text sampled from a dense model.* with --dense"):
        pretrain(PretrainConfig(**SMALL, corpus="self"), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()

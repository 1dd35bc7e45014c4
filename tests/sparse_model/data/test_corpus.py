"""Corpora: specs, the division into train and val, mixing, packing, and the cache."""

import copy
import warnings
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets import IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from support.corpora import load, write_documents
from transformers import PreTrainedTokenizerFast

from sparse_model.data.corpus import (
    CorpusConfig,
    describe_sources,
    iter_documents,
)
from sparse_model.data.packing import Feed, mix, pack
from sparse_model.data.sources import parse_spec
from sparse_model.data.tokenizer import EOT, train_tokenizer

pytestmark = pytest.mark.usefixtures("caches_in_tmp")


# Specs


def test_weights_become_shares() -> None:
    assert [tuple(s) for s in parse_spec("generated:1, ./a.txt:3")] == [
        ("generated", 0.25),
        ("./a.txt", 0.75),
    ]
    assert [s.share for s in parse_spec("generated,stdlib")] == [0.5, 0.5]
    assert [tuple(s) for s in parse_spec("generated")] == [("generated", 1.0)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spec": ""}, r"spec='' has an empty entry"),
        ({"spec": "generated,"}, r"has an empty entry"),
        ({"spec": "stdlib,stdlib"}, r"names 'stdlib' twice"),
        ({"spec": "generated:much"}, r"weight 'much' of 'generated' is not a positive number"),
        ({"spec": "generated:0"}, r"weight '0' of 'generated'"),
        ({"spec": "generated:nan"}, r"weight 'nan' of 'generated'"),
        ({"spec": "generated:0.4,stdlib"}, r"gives no weight to 'stdlib'; give every source"),
        ({"max_tokens": 0}, r"max_tokens=0 must be at least 1"),
        ({"val_fraction": 0.0}, r"val_fraction=0.0 must lie above 0"),
        ({"val_fraction": 0.6}, r"val_fraction=0.6"),
        ({"text_field": ""}, r"text_field='' names no field"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CorpusConfig(**options)


# Sources


def test_generated_documents_are_seeded_and_disjoint() -> None:
    config = CorpusConfig(max_tokens=40_000, val_fraction=0.5)
    train, val = list(iter_documents(config, "train")), list(iter_documents(config, "val"))
    assert train == list(iter_documents(config, "train"))
    assert train != list(iter_documents(CorpusConfig(max_tokens=40_000, val_fraction=0.5, seed=1), "train"))
    assert not set(train) & set(val)
    assert sum(map(len, train)) == pytest.approx(160_000, abs=2_000)
    assert sum(map(len, val)) == pytest.approx(80_000, abs=2_000)


def test_special_tokens_are_text_and_said_or_ids(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    write_documents(tmp_path, 9)
    (tmp_path / "chat.txt").write_text(f"one{EOT}two{EOT}")
    base = {"spec": f"{tmp_path}", "val_fraction": 0.1}
    text = load(CorpusConfig(**base), tokenizer)
    ids = load(CorpusConfig(**base, special_tokens="ids"), tokenizer)
    said = f"spells special tokens of the tokenizer ({EOT} 2 times), which stays text: with --special-tokens ids"
    assert any(said in note for note in text.report["notes"])
    assert any("each of which is read as the one id" in note for note in ids.report["notes"])
    found = [int((blocks.train == tokenizer.eos_token_id).sum() + (blocks.val == 0).sum()) for blocks in (text, ids)]
    assert found == [10, 12]


@pytest.mark.parametrize("bos", [None, "<s>"])
def test_documents_kept_apart_are_one_a_block(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, bos: str | None
) -> None:
    """For a model that learned one at a time, behind its own beginning-of-text."""
    tokenizer = copy.deepcopy(tokenizer)
    if bos:
        tokenizer.add_special_tokens({"bos_token": bos})
    texts = write_documents(tmp_path, 40) + write_documents(tmp_path, 7, words=1, tag="s")
    config = CorpusConfig(spec=f"{tmp_path}", val_fraction=0.3, documents="apart")
    blocks = load(config, tokenizer)
    begin = tokenizer.bos_token_id if bos else tokenizer.eos_token_id
    heads = {(begin, *tokenizer(text)["input_ids"][:15]) for text in texts}
    both = torch.cat([blocks.train, blocks.val])
    assert len(both) == 40
    assert {tuple(row) for row in both.tolist()} <= heads
    left_out = sum(split["too_short"].get(str(tmp_path), 0) for split in blocks.report["splits"].values())
    assert left_out == 7
    said = [note for note in blocks.report["notes"] if "have fewer than 16 tokens and are left out" in note]
    assert sum(int(note.split()[0]) for note in said) == 7
    assert load(CorpusConfig(spec=f"{tmp_path}", val_fraction=0.3), tokenizer).fingerprint != blocks.fingerprint
    message = "n_ctx=400: each of the .* documents of corpus .* is shorter, and with documents=apart .* lower n_ctx"
    with pytest.raises(ValueError, match=message):
        load(config, tokenizer, 400)


def test_stdlib_is_python_that_people_wrote() -> None:
    (report,) = describe_sources(CorpusConfig(spec="stdlib"))
    assert report.train_documents is not None
    assert report.val_documents is not None
    assert report.train_documents > 300
    assert 0.02 < report.val_documents / report.train_documents < 0.1
    assert report.left_out["generated file"] > 10
    for document in islice(iter_documents(CorpusConfig(spec="stdlib"), "train"), 50):
        assert len(document) <= 200_000
        assert "import unittest\nfrom test" not in document


def test_hub_rows_are_streamed_and_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def stub(name: str, *, split: str, streaming: bool) -> IterableDataset:
        calls.append((name, split, streaming))
        return IterableDataset.from_generator(lambda: ({"code": f"row {i}", "size": i} for i in range(200)))

    monkeypatch.setattr(datasets, "load_dataset", stub)
    config = CorpusConfig(spec="someone/some-code", val_fraction=0.2)
    train, val = list(iter_documents(config, "train")), list(iter_documents(config, "val"))
    assert sorted(train + val) == sorted(f"row {i}" for i in range(200))
    assert 20 < len(val) < 60
    assert set(calls) == {("someone/some-code", "train", True)}
    assert describe_sources(config)[0].train_documents is None


def test_an_unreachable_hub_name_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def stub(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no network\ndetails")

    monkeypatch.setattr(datasets, "load_dataset", stub)
    message = r"'nobody/nothing' is neither built in nor a local path.*RuntimeError: no network\); check"
    with pytest.raises(ConnectionError, match=message):
        next(iter_documents(CorpusConfig(spec="nobody/nothing"), "train"))


# Mixing and packing

lengths = st.lists(st.integers(1, 40), min_size=1, max_size=30)


def feed(number: int, share: float, sizes: list[int]) -> Feed[list[int]]:
    return Feed(f"f{number}", share, lambda: iter([[number] * size for size in sizes]))


@settings(max_examples=150, deadline=None)
@given(a=lengths, b=lengths, share=st.floats(0.1, 0.9), budget=st.integers(1, 2000))
def test_every_prefix_of_a_mix_keeps_the_shares(a: list[int], b: list[int], share: float, budget: int) -> None:
    feeds = [feed(0, share, a), feed(1, 1 - share, b)]
    taken = np.zeros(2)
    for number, document in mix(feeds, budget, repeat=True):
        taken[number] += len(document)
        assert abs(taken[0] - share * taken.sum()) <= 40
    assert taken.sum() >= budget or all(f.passes for f in feeds)
    assert taken.sum() < budget + 40
    assert min(f.passes for f in feeds) <= 1  # nothing is repeated for its own sake


@settings(max_examples=100, deadline=None)
@given(a=lengths, b=lengths, budget=st.integers(1, 2000))
def test_without_repetition_every_document_comes_at_most_once(a: list[int], b: list[int], budget: int) -> None:
    taken: list[list[int]] = [[], []]
    for number, document in mix([feed(0, 0.5, a), feed(1, 0.5, b)], budget, repeat=False):
        taken[number].append(len(document))
    for sizes, got in zip((a, b), taken, strict=True):
        assert got == sizes[: len(got)]
        assert sum(got) < budget / 2 + 40


@settings(max_examples=100, deadline=None)
@given(sizes=lengths, n_ctx=st.integers(2, 20), budget=st.integers(1, 600))
def test_packing_is_joining_and_cutting(sizes: list[int], n_ctx: int, budget: int) -> None:
    documents = [list(range(i, i + size)) for i, size in enumerate(sizes)]
    packed = pack(((i % 2, ids) for i, ids in enumerate(documents)), n_ctx, budget, 2)
    stream = [(i, token) for i, ids in enumerate(documents) for token in ids][:budget]
    stream = stream[: len(stream) // n_ctx * n_ctx]
    assert packed.blocks.tolist() == [[t for _, t in stream[j : j + n_ctx]] for j in range(0, len(stream), n_ctx)]
    assert packed.tokens == [sum(i % 2 == side for i, _ in stream) for side in (0, 1)]
    assert packed.documents == [len({i for i, _ in stream if i % 2 == side}) for side in (0, 1)]


def test_an_empty_feed_is_named() -> None:
    with pytest.raises(ValueError, match=r"corpus 'f1' gave no document"):
        list(mix([feed(0, 0.5, [1]), feed(1, 0.5, [])], 10, repeat=True))


# Blocks


def test_blocks_are_the_documents_each_after_an_end_of_text(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    write_documents(tmp_path, 20)
    (tmp_path / "tricky.txt").write_text(f"before {EOT} after\n")  # must not divide the document
    config = CorpusConfig(spec=str(tmp_path), val_fraction=0.3)
    blocks = load(config, tokenizer)
    for split, array in (("train", blocks.train), ("val", blocks.val)):
        stream: list[int] = []
        for text in iter_documents(config, split):  # type: ignore[arg-type]
            stream += [tokenizer.eos_token_id, *tokenizer.encode(text, split_special_tokens=True)]
        keep = len(stream) // 16 * 16
        assert array.dtype == torch.int32
        assert array.flatten().tolist() == stream[:keep]
        entry = blocks.report["splits"][split]
        assert entry["tokens"] == keep == array.numel()
        assert entry["sources"][str(tmp_path)]["documents"] == stream[:keep].count(tokenizer.eos_token_id)
    assert "the corpus ended at" in blocks.report["notes"][0]
    torch.from_numpy(blocks.train.numpy())[0, 0] = 0  # writable, as torch wants it


def test_budgets_bound_train_and_val(tokenizer: PreTrainedTokenizerFast) -> None:
    blocks = load(CorpusConfig(max_tokens=5_000, val_fraction=0.1), tokenizer)
    assert blocks.train.shape == (5_000 // 16, 16)
    assert blocks.val.shape == (500 // 16, 16)
    assert blocks.train[0, 0] == blocks.val[0, 0] == tokenizer.eos_token_id
    assert blocks.report["notes"] == []


def test_a_mix_keeps_its_shares_and_repeats_the_smaller_source(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    write_documents(tmp_path / "small", 10, words=20, tag="zq")
    spec = f"generated:0.3,{tmp_path / 'small'}:0.7"
    blocks = load(CorpusConfig(spec=spec, max_tokens=60_000), tokenizer)
    generated, small = blocks.report["splits"]["train"]["sources"].values()
    assert generated["share"] == pytest.approx(0.3, abs=0.03)
    assert small["share"] == pytest.approx(0.7, abs=0.03)
    assert small["complete_passes"] > 5
    assert "is repeated to keep its share" in blocks.report["notes"][0]
    assert "has no more val documents" in blocks.report["notes"][1]
    assert blocks.report["splits"]["val"]["sources"][str(tmp_path / "small")]["documents"] == 1
    starts = (blocks.train == tokenizer.eos_token_id).flatten().nonzero().flatten().tolist()
    regions = np.array_split(
        np.array([tokenizer.decode(blocks.train.flatten()[a + 1 : b]) for a, b in pairwise(starts)]), 4
    )
    for region in regions:
        share = sum(len(t) for t in region if "zq" in t) / sum(map(len, region))
        assert 0.4 < share < 0.75  # in characters, of which a nonsense token holds fewer


def test_the_cache_gives_equal_blocks(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    config = CorpusConfig(max_tokens=4_000)
    first = load(config, tokenizer, cache_dir=tmp_path)
    (folder,) = tmp_path.iterdir()
    stamp = folder.stat().st_mtime_ns
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = load(config, tokenizer, cache_dir=tmp_path)
    assert folder.stat().st_mtime_ns == stamp
    assert list(tmp_path.iterdir()) == [folder]
    assert torch.equal(first.train, second.train)
    assert torch.equal(first.val, second.val)
    assert first.train.dtype == second.train.dtype
    assert (first.fingerprint, first.report) == (second.fingerprint, second.report)


def test_all_that_shapes_the_blocks_is_in_the_fingerprint(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    write_documents(tmp_path, 9)
    base: dict[str, Any] = {"spec": str(tmp_path), "max_tokens": 900}
    seen = {load(CorpusConfig(**base), tokenizer).fingerprint}
    for change in (
        {"max_tokens": 800},
        {"val_fraction": 0.1},
        {"seed": 1},
        {"spec": f"{tmp_path},generated"},
    ):
        seen.add(load(CorpusConfig(**{**base, **change}), tokenizer).fingerprint)
    seen.add(load(CorpusConfig(**base), tokenizer, n_ctx=8).fingerprint)
    seen.add(load(CorpusConfig(**base), train_tokenizer(["a"], 261)).fingerprint)
    (tmp_path / "d0.txt").write_text("changed\n")
    seen.add(load(CorpusConfig(**base), tokenizer).fingerprint)
    assert len(seen) == 8


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "no facts"])
def test_a_damaged_cache_is_rebuilt_with_a_warning(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, damage: str
) -> None:
    config = CorpusConfig(max_tokens=4_000)
    first = load(config, tokenizer, cache_dir=tmp_path)
    (arrow,) = tmp_path.glob("blocks-*/train/*.arrow")
    content = bytearray(arrow.read_bytes())
    if damage == "truncate":
        arrow.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        content[len(content) // 2] ^= 1
        arrow.write_bytes(content)
    elif damage == "remove":
        arrow.unlink()
    else:
        (arrow.parent.parent / "blocks.json").unlink()
    with pytest.warns(UserWarning, match=r"corpus cache .* is damaged .*; building it again"):
        second = load(config, tokenizer, cache_dir=tmp_path)
    assert torch.equal(first.train, second.train)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(config, tokenizer, cache_dir=tmp_path)


def test_what_cannot_become_blocks_is_an_error(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    texts = write_documents(tmp_path, 3)
    config = CorpusConfig(spec=str(tmp_path))
    with pytest.raises(ValueError, match=r"n_ctx=100000 is larger than the \d+ train tokens of corpus"):
        load(config, tokenizer, n_ctx=100_000)
    with pytest.raises(ValueError, match=r"n_ctx=64 is larger than the 5 val tokens of corpus 'generated'; lower"):
        load(CorpusConfig(max_tokens=100), tokenizer, n_ctx=64)
    with pytest.raises(ValueError, match=r"n_ctx=1 leaves nothing to predict"):
        load(config, tokenizer, n_ctx=1)
    no_eos = train_tokenizer(texts, 261)
    no_eos.eos_token = None
    with pytest.raises(ValueError, match=r"tokenizer has no eos_token"):
        load(config, no_eos)

"""Corpora: specs, the division into train and val, mixing, packing, and the cache."""

import json
import os
import warnings
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from sparse_model.data import encoding, pieces
from sparse_model.data import sources as corpus_sources
from sparse_model.data.corpus import (
    CorpusBlocks,
    CorpusConfig,
    describe_sources,
    iter_documents,
    left_out_line,
    load_blocks,
)
from sparse_model.data.packing import Feed, mix, pack
from sparse_model.data.sources import parse_spec
from sparse_model.data.tokenizer import EOT, train_tokenizer


@pytest.fixture(autouse=True)
def _caches_in_tmp(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSE_BRIDGES_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(iter_documents(CorpusConfig(max_tokens=10_000), "train"), 300)


def write_documents(folder: Path, count: int, words: int = 30, tag: str = "d") -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    texts = [" ".join(f"{tag}{i}w{j}" for j in range(words)) + "\n" for i in range(count)]
    for i, text in enumerate(texts):
        (folder / f"{tag}{i}.txt").write_text(text)
    return texts


def load(config: CorpusConfig, tokenizer: PreTrainedTokenizerFast, n_ctx: int = 16, **kwargs: Any) -> CorpusBlocks:
    return load_blocks(config, tokenizer, n_ctx, progress=False, **kwargs)


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


@pytest.mark.parametrize("name", ["./gone", "/gone/too", "~/gone-too", "gone.jsonl", "some/gone.py", "a/b/c"])
def test_a_missing_path_is_named(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=rf"corpus path '{name}' does not exist"):
        next(iter_documents(CorpusConfig(spec=name), "train"))


# Sources


def test_generated_documents_are_seeded_and_disjoint() -> None:
    config = CorpusConfig(max_tokens=40_000, val_fraction=0.5)
    train, val = list(iter_documents(config, "train")), list(iter_documents(config, "val"))
    assert train == list(iter_documents(config, "train"))
    assert train != list(iter_documents(CorpusConfig(max_tokens=40_000, val_fraction=0.5, seed=1), "train"))
    assert not set(train) & set(val)
    assert sum(map(len, train)) == pytest.approx(160_000, abs=2_000)
    assert sum(map(len, val)) == pytest.approx(80_000, abs=2_000)


def test_a_folder_is_divided_completely_and_independently_of_order_and_company(tmp_path: Path) -> None:
    texts = write_documents(tmp_path / "a", 60)
    config = CorpusConfig(spec=str(tmp_path / "a"), val_fraction=0.2)
    train, val = set(iter_documents(config, "train")), set(iter_documents(config, "val"))
    assert train | val == set(texts)
    assert not train & val
    assert 3 <= len(val) <= 24
    reseeded = CorpusConfig(spec=str(tmp_path / "a"), val_fraction=0.2, seed=5)
    assert set(iter_documents(reseeded, "val")) == val
    assert list(iter_documents(reseeded, "train")) != list(iter_documents(config, "train"))
    write_documents(tmp_path / "a", 20, tag="new")
    assert set(iter_documents(config, "val")) & set(texts) == val


def test_a_folder_takes_text_and_reports_the_rest(tmp_path: Path) -> None:
    write_documents(tmp_path / "sub", 3)
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "lines.jsonl").write_text('{"content": "one"}\n\n{"content": "two"}\n{"content": " "}\n')
    (tmp_path / "empty.md").write_text("\n")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "b.py").write_text("y = 1\n")
    (report,) = describe_sources(CorpusConfig(spec=str(tmp_path)))
    assert report.left_out == {"empty": 1, "not UTF-8": 1, "suffix .png": 1, "hidden folder": 1, "empty row": 1}
    assert report.files == 3 + 1 + 1
    assert report.train_documents is not None
    assert report.val_documents is not None
    assert report.train_documents + report.val_documents == 3 + 1 + 2
    config = CorpusConfig(spec=str(tmp_path))
    documents = [*iter_documents(config, "train"), *iter_documents(config, "val")]
    assert {"x = 1\n", "one", "two"} <= set(documents)
    assert len(documents) == 6


def test_jsonl_lines_are_documents_of_the_chosen_field(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"t{i}", "other": f"o{i}"}) + "\n" for i in range(50)))
    for field, letter in ((None, "t"), ("other", "o")):
        config = CorpusConfig(spec=str(path), text_field=field, val_fraction=0.2)
        train, val = list(iter_documents(config, "train")), list(iter_documents(config, "val"))
        assert sorted(train + val) == sorted(f"{letter}{i}" for i in range(50))
        assert 0 < len(val) < 25
        assert train == sorted(train, key=lambda text: int(text[1:]))  # lines keep their order


@pytest.mark.parametrize(
    ("line", "field", "message"),
    [
        ("{oops", None, r"a\.jsonl, line 2: not valid JSON"),
        (
            '{"body": "b"}',
            None,
            r"line 2: no text in field among text, content, code; set text_field to one of body",
        ),
        ('{"text": "b"}', "body", r"line 1: no text in 'body'; set text_field to one of text"),
        ('{"text": 3}', None, r"line 2: no text in 'text'"),
        ("[1]", None, r"line 2: a row must be an object"),
    ],
)
def test_a_wrong_jsonl_line_is_named(tmp_path: Path, line: str, field: str | None, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        list(iter_documents(CorpusConfig(spec=str(path), text_field=field), "train"))


def test_a_single_document_is_divided_at_a_line_boundary(tmp_path: Path) -> None:
    text = "".join(f"line {i}\n" for i in range(100))
    path = tmp_path / "only.txt"
    path.write_text(text)
    config = CorpusConfig(spec=str(path), val_fraction=0.1)
    (train,), (val,) = iter_documents(config, "train"), iter_documents(config, "val")
    assert train + val == text
    assert train.endswith("\n")
    assert len(val) / len(text) == pytest.approx(0.1, abs=0.02)
    assert "line boundary" in describe_sources(config)[0].note
    path.write_text("only one line\n")
    with pytest.raises(ValueError, match=r"one document of one line"):
        list(iter_documents(config, "train"))


def test_few_documents_still_give_both_sides(tmp_path: Path) -> None:
    texts = write_documents(tmp_path, 2)
    config = CorpusConfig(spec=str(tmp_path), val_fraction=0.001)
    assert sorted([*iter_documents(config, "train"), *iter_documents(config, "val")]) == sorted(texts)
    assert len(list(iter_documents(config, "val"))) == 1


def test_unusable_local_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no usable \.py, \.txt, \.md, \.jsonl file"):
        describe_sources(CorpusConfig(spec=str(tmp_path)))
    (tmp_path / "a.csv").write_text("a,b")
    with pytest.raises(ValueError, match=r"a\.csv' is none of \.py"):
        describe_sources(CorpusConfig(spec=str(tmp_path / "a.csv")))
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match=r"a\.txt' is not UTF-8"):
        describe_sources(CorpusConfig(spec=str(tmp_path / "a.txt")))
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"holds no document that is not empty"):
        describe_sources(CorpusConfig(spec=str(tmp_path / "a.jsonl")))
    os.mkfifo(tmp_path / "pipe.txt")
    for endless in (tmp_path / "pipe.txt", "/dev/zero"):
        with pytest.raises(ValueError, match=r"is a named pipe, socket or device, which may never end"):
            describe_sources(CorpusConfig(spec=str(endless)))


def test_every_file_is_read_or_counted(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    folder, elsewhere = tmp_path / "a", tmp_path / "elsewhere"
    write_documents(folder, 40)
    write_documents(elsewhere, 2, tag="far")
    (folder / "LOUD.TXT").write_text("loud and clear\n")
    (folder / "linked.txt").symlink_to(elsewhere / "far0.txt")
    before = load(CorpusConfig(spec=str(folder)), tokenizer).report["sources"][0]
    assert (before["left_out"], before["files"]) == ({}, 42)
    documents = [
        *iter_documents(CorpusConfig(spec=str(folder)), "train"),
        *iter_documents(CorpusConfig(spec=str(folder)), "val"),
    ]
    assert "loud and clear\n" in documents
    assert (elsewhere / "far0.txt").read_text() in documents
    for number in range(3):
        (folder / f"latin{number}.txt").write_text("déjà vu", encoding="latin-1")
    (folder / "marked.txt").write_text("plain", encoding="utf-16")
    (folder / "unmarked.txt").write_text("plain words\n" * 9, encoding="utf-16-le")  # also valid UTF-8
    (folder / "link").symlink_to(elsewhere)
    (folder / "gone.txt").symlink_to(tmp_path / "gone")
    (folder / "zero.txt").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.txt")
    (folder / "table.csv").write_text("1,2")
    # The blocks are those of before, from the same files; the record must not be.
    after = load(CorpusConfig(spec=str(folder)), tokenizer).report["sources"][0]
    assert after["left_out"] == {
        "not UTF-8": 5,
        "named pipe, socket or device": 2,
        "link to a folder": 1,
        "link to nothing": 1,
        "suffix .csv": 1,
    }
    assert after["files"] == 42


def test_what_cannot_be_read_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_documents(tmp_path, 3)
    (tmp_path / "locked.txt").write_text("secret")
    (tmp_path / "rows.jsonl").write_text('{"text": "secret"}')
    (tmp_path / "shut").mkdir()
    opened, walked, access = Path.open, os.scandir, os.access

    def refuse(path: Path, *args: Any, **kwargs: Any) -> Any:  # as for users who are not root
        if path.name == "locked.txt":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args, **kwargs)

    def shut(path: Any) -> Any:
        if str(path).endswith("shut"):
            raise PermissionError(13, "Permission denied", str(path))
        return walked(path)

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(os, "scandir", shut)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).suffix != ".jsonl" and access(path, mode))
    (report,) = describe_sources(CorpusConfig(spec=str(tmp_path)))
    assert report.left_out == {"not readable": 2, "folder that is not readable": 1}


def test_one_line_says_what_is_left_out(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    write_documents(tmp_path, 9)
    config = CorpusConfig(spec=f"generated,{tmp_path}", max_tokens=2_000)
    assert left_out_line(load(config, tokenizer).report) == ""
    for number, suffix in enumerate(["a", "a", "b", "c", "d", "e", "f", "g", "h"]):
        (tmp_path / f"{number}.{suffix}").write_text("x")
    line = left_out_line(load(config, tokenizer).report)
    assert line.startswith(f"left out of the corpus: {tmp_path} (2 suffix .a, 1 suffix .b, ")
    assert line.endswith(", 2 for other reasons; 9 files read)")


def test_an_existing_path_is_not_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "a,b", "c:0.5", "d,e:3"):
        Path(name).mkdir()
    assert [tuple(s) for s in parse_spec("a,b")] == [("a,b", 1.0)]
    assert [tuple(s) for s in parse_spec("c:0.5")] == [("c:0.5", 1.0)]
    assert [tuple(s) for s in parse_spec("a:1,c:0.5:2,a,b:1")] == [("a", 0.25), ("c:0.5", 0.5), ("a,b", 0.25)]
    assert [tuple(s) for s in parse_spec("b,d,e:3,./a")] == [(name, 1 / 3) for name in ("b", "d,e:3", "./a")]
    Path("a,b").rmdir()
    assert [s.name for s in parse_spec("a,b")] == ["a", "b"]


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

    monkeypatch.setattr(corpus_sources, "load_dataset", stub)
    config = CorpusConfig(spec="someone/some-code", val_fraction=0.2)
    train, val = list(iter_documents(config, "train")), list(iter_documents(config, "val"))
    assert sorted(train + val) == sorted(f"row {i}" for i in range(200))
    assert 20 < len(val) < 60
    assert set(calls) == {("someone/some-code", "train", True)}
    assert describe_sources(config)[0].train_documents is None


def test_an_unreachable_hub_name_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def stub(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no network\ndetails")

    monkeypatch.setattr(corpus_sources, "load_dataset", stub)
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


def test_a_long_file_is_one_document_cut_at_the_budget(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "".join(f"value_{number} = load('cat {number}')\n" for number in range(3000))
    (tmp_path / "long.txt").write_text(lines)
    config = CorpusConfig(spec=str(tmp_path / "long.txt"), max_tokens=2_000)
    whole = load(config, tokenizer)
    monkeypatch.setattr(pieces, "PIECE", 500)
    read = []
    monkeypatch.setattr(encoding, "parts_of", lambda text, names: read.append(text) or [text])
    cut = load(config, tokenizer, cache_dir=tmp_path / "other")
    assert torch.equal(cut.train, whole.train)
    assert torch.equal(cut.val, whole.val)
    assert cut.train.flatten().tolist().count(tokenizer.eos_token_id) == 1
    assert max(map(len, read)) <= 500
    assert sum(map(len, read)) < len(lines) / 5  # the rest was not tokenized
    assert "".join(iter_documents(config, "train")) == lines[: 4 * 2_000]


def test_no_part_of_a_file_is_on_both_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE", 300)
    for number in range(12):
        (tmp_path / f"{number}.txt").write_text("".join(f"f{number} line {line}\n" for line in range(200)))
    config = CorpusConfig(spec=str(tmp_path), val_fraction=0.3, max_tokens=100_000)
    sides = [list(iter_documents(config, split)) for split in ("train", "val")]  # type: ignore[arg-type]
    assert sorted(sides[0] + sides[1]) == sorted(path.read_text() for path in tmp_path.iterdir())


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

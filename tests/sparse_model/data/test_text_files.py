"""Local files and folders as a corpus: what is read, what is left out and said, and which side it falls on."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from support.corpora import load, write_documents
from transformers import PreTrainedTokenizerFast

from sparse_model.data import encoding, pieces
from sparse_model.data.corpus import (
    CorpusConfig,
    describe_sources,
    iter_documents,
    left_out_line,
)
from sparse_model.data.sources import parse_spec

pytestmark = pytest.mark.usefixtures("caches_in_tmp")


@pytest.mark.parametrize("name", ["./gone", "/gone/too", "~/gone-too", "gone.jsonl", "some/gone.py", "a/b/c"])
def test_a_missing_path_is_named(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=rf"corpus path '{name}' does not exist"):
        next(iter_documents(CorpusConfig(spec=name), "train"))


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

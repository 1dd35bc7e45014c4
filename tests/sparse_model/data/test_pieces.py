"""Bounded pieces of text: nothing is lost at a cut, tokens stay the same, no word is too long for a tokenizer."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.helpers import tiny_tokenizer

from sparse_model.data import pieces
from sparse_model.data.encoding import encode_documents, encode_text
from sparse_model.data.pieces import LONGEST_WORD, head_of, parts_of, pieces_of, read_pieces
from sparse_model.data.tokenizer import EOT, train_tokenizer


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE", 40)


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet="ab_.\n é日", max_size=400))
def test_pieces_are_the_text(text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE", 40)
        cut = list(pieces_of(text))
    assert "".join(cut) == text
    assert all(0 < len(piece) <= 40 for piece in cut)


def test_a_cut_changes_no_token(small_pieces: None) -> None:
    text = "def load_cat(self):\n    for i in range(3):\n\n        print('cat', \"dog\")\n    return i\n" * 20
    cut = list(pieces_of(text))
    assert len(cut) > 20
    tokenizer = tiny_tokenizer()
    assert [i for piece in cut for i in encode_text(tokenizer, piece)] == encode_text(tokenizer, text)


@pytest.mark.parametrize(("encoding", "newline"), [("utf-8", "\n"), ("utf-8-sig", "\r\n")])
def test_a_file_reads_as_it_does_whole(tmp_path: Path, small_pieces: None, encoding: str, newline: str) -> None:
    text = "é日本 line\n" * 50
    (tmp_path / "a.txt").write_text(text, encoding=encoding, newline=newline)
    assert "".join(read_pieces(tmp_path / "a.txt")) == text
    assert head_of(read_pieces(tmp_path / "a.txt"), 55) == text[:55]


@pytest.mark.parametrize("word", ["\0", "a", " ", "é", "x1_", "日", "f(a,b);", EOT])
def test_a_huge_word_is_cut_without_loss(word: str) -> None:
    text = f"before {word * 20_000} after\nnext\n"
    parts = parts_of(text)
    assert "".join(parts) == text
    assert max(map(len, parts)) <= LONGEST_WORD + len("before ")
    tokenizer = tiny_tokenizer()
    assert tokenizer.decode(encode_text(tokenizer, text)) == text


def test_ordinary_text_and_long_lines_of_code_keep_their_tokens() -> None:
    tokenizer = tiny_tokenizer()
    minified = "f(a1,b)['cat'].load(\"dog\");" * 400
    for text in ("a b\n" * 5000, minified):
        assert encode_text(tokenizer, text) == tokenizer.encode(text, split_special_tokens=True)
    assert len(parts_of(minified)) > 1
    spelled = f"xy{EOT}" * 2000
    assert encode_text(tokenizer, spelled, special_tokens="ids").count(tokenizer.eos_token_id) == 2000


def test_a_tokenizer_learns_from_parts_of_a_huge_word() -> None:
    longest = []
    real = pieces.parts_of

    def note(text: str) -> list[str]:
        longest.extend(map(len, real(text)))
        return real(text)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparse_model.data.tokenizer.parts_of", note)
        train_tokenizer(["load(cat)\n" * 50, "\0" * 100_000], 265)
    assert max(longest) <= LONGEST_WORD


def test_a_long_document_is_one_and_is_read_no_further_than_needed(small_pieces: None) -> None:
    tokenizer, read = tiny_tokenizer(), []

    def long() -> object:
        for number in range(100):
            read.append(number)
            yield f"line {number}\n" * 4

    documents = [["short\n"], long(), ["last\n"]]
    found = list(encode_documents(documents, tokenizer, 50))  # type: ignore[arg-type]
    assert [ids[0] for ids in found] == [tokenizer.eos_token_id] * 3
    assert list(found[1]).count(tokenizer.eos_token_id) == 1
    assert len(found[1]) == 50
    assert len(read) < 10
    assert [tokenizer.decode(list(ids)[1:]) for ids in (found[0], found[2])] == ["short\n", "last\n"]

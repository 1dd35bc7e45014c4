"""The tokenizer: lossless, quote pairs always single, exact size, the same after saving and loading."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sparse_model.data.tokenizer import (
    EOT,
    QUOTE_TOKENS,
    check_quote_tokens,
    load_tokenizer,
    save_tokenizer,
    tokenizer_fingerprint,
    train_tokenizer,
)

DOCUMENTS = [
    f"def load_{noun}(self):\n    for i in range({n}):\n        print({quote}{noun}{quote})\n    return {n}\n"
    for n, noun in enumerate(["cat", "dog", "box", "map", "tree", "river", "ship"])
    for quote in ('"', "'")
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(DOCUMENTS, 320)


python_like = st.lists(
    st.sampled_from([*QUOTE_TOKENS, "(", ")", '"', "'", "\n", "\r\n", "    ", " ", "\t", "_", "x1", "é", "日", EOT])
).map("".join)


@settings(max_examples=300, deadline=None)
@given(text=st.text() | python_like)
def test_decoding_an_encoded_text_gives_it_back(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= index < len(tokenizer) for index in ids)


@settings(max_examples=200, deadline=None)
@given(before=python_like, after=python_like, pair=st.sampled_from(QUOTE_TOKENS))
def test_no_token_is_larger_than_a_quote_pair_it_contains(
    tokenizer: PreTrainedTokenizerFast, before: str, after: str, pair: str
) -> None:
    tokens = tokenizer.tokenize(before + pair + after)
    assert all(token == quote for token in tokens for quote in QUOTE_TOKENS if quote in token)


@pytest.mark.parametrize("text", ['print("a")', "print('a')", 'x = [("a")]\n', "f(g('b'), \"c\")", 'f("")'])
def test_quote_pairs_are_single_tokens_in_context(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    tokens = tokenizer.tokenize(text)
    for pair in QUOTE_TOKENS:
        assert tokens.count(pair) == text.count(pair)


def test_size_is_exact_and_ids_are_laid_out_as_documented(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == tokenizer.vocab_size == 320
    assert sorted(tokenizer.get_vocab().values()) == list(range(320))
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == tokenizer.pad_token_id == 0
    assert tokenizer.convert_tokens_to_ids(list(QUOTE_TOKENS)) == [257, 258, 259, 260]


def test_a_line_end_and_its_indentation_become_one_token(tokenizer: PreTrainedTokenizerFast) -> None:
    assert "ĊĠĠĠĠĠĠĠĠ" in tokenizer.tokenize("for i in range(3):\n        print(i)\n")
    assert tokenizer.tokenize("123") == ["1", "2", "3"]


def test_while_is_one_token_though_the_text_lacks_it(tokenizer: PreTrainedTokenizerFast) -> None:
    assert not any("while" in text for text in DOCUMENTS)
    assert "while" in tokenizer.tokenize("if x:\n    while True:\n")
    assert len(train_tokenizer(DOCUMENTS, 320)) == 320
    learned = train_tokenizer(["    while x:\n        while y:\n"] * 3, 270)
    assert [token for token in learned.get_vocab() if "while" in token] == ["while"]


def test_training_is_deterministic_and_depends_on_the_documents(tokenizer: PreTrainedTokenizerFast) -> None:
    again = train_tokenizer(iter(DOCUMENTS), 320)
    other = train_tokenizer([text.upper() for text in DOCUMENTS], 320)
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(tokenizer)
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(tokenizer)


def test_fingerprint_ignores_the_last_call(tokenizer: PreTrainedTokenizerFast) -> None:
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "b c d"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(tokenizer) == before


def test_smallest_size_is_bytes_pairs_and_end_of_text() -> None:
    smallest = train_tokenizer(["abc"], 261)
    assert len(smallest) == 261
    check_quote_tokens(smallest)
    with pytest.raises(ValueError, match=r"vocab_size=260 is too small.*need 261"):
        train_tokenizer(["abc"], 260)


def test_too_little_text_for_the_size_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"vocab_size=400.*only yield 263 tokens; lower vocab_size to 263"):
        train_tokenizer(["ab ab"], 400)


def test_check_quote_tokens_names_the_one_that_is_not_single(tokenizer: PreTrainedTokenizerFast) -> None:
    check_quote_tokens(tokenizer)
    plain = Tokenizer(models.BPE(vocab={"(": 0, '"': 1, "'": 2, ")": 3, '("': 4}, merges=[("(", '"')]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    with pytest.raises(ValueError, match=r"""encodes "\('" as \['\(', "'"\]"""):
        check_quote_tokens(PreTrainedTokenizerFast(tokenizer_object=plain))


def test_saving_and_loading_changes_nothing(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "tokenizer"
    save_tokenizer(tokenizer, folder)
    loaded = load_tokenizer(folder)
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(tokenizer)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert (loaded.eos_token, loaded.bos_token, loaded.pad_token) == (EOT, EOT, EOT)
    for text in [*DOCUMENTS, " \r\n é'('\")  ", f"a{EOT}b"]:
        assert loaded.encode(text) == tokenizer.encode(text)
        assert loaded.decode(loaded.encode(text)) == text
    assert [path.name for path in folder.parent.iterdir()] == ["tokenizer"]  # no temporary folder stays


def test_saving_again_replaces_the_tokenizer_and_keeps_other_files(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "model.txt").write_text("weights")
    save_tokenizer(train_tokenizer(DOCUMENTS, 300), tmp_path)
    save_tokenizer(tokenizer, tmp_path)
    assert len(load_tokenizer(str(tmp_path))) == 320
    assert (tmp_path / "model.txt").read_text() == "weights"


def test_loading_from_a_wrong_folder_names_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone: it is not a folder; give"):
        load_tokenizer(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=r"no tokenizer at no/such/run/tokenizer"):
        load_tokenizer("no/such/run/tokenizer")
    (tmp_path / "config.json").write_text(json.dumps({}))
    with pytest.raises(FileNotFoundError, match=r"it has no tokenizer\.json"):
        load_tokenizer(str(tmp_path))


def test_a_config_without_the_file_that_it_needs_names_the_file(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Its class reads tokenizer.json alone, though the vocabulary lies in other files."""
    save_tokenizer(tokenizer, tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    tokenizer.backend_tokenizer.model.save(str(tmp_path))
    with pytest.raises(ValueError, match=r"cannot be loaded: [^\n]*[^:]; copy its tokenizer\.json there, too$"):
        load_tokenizer(tmp_path)


def test_an_unreachable_name_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(name: str, **options: object) -> None:
        raise OSError("can't connect")

    monkeypatch.setattr("sparse_model.data.tokenizer.AutoTokenizer.from_pretrained", unreachable)
    with pytest.raises(OSError, match=r"cannot load tokenizer 'no-such-model'.*check the spelling"):
        load_tokenizer("no-such-model")

"""Text to token ids: what special tokens in a text are, and documents longer than memory should hold."""

import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Literal

from transformers import PreTrainedTokenizerFast

from sparse_model.data.pieces import parts_of

SpecialTokens = Literal["text", "ids"]
"""What a special token is that a text spells out: text like any other, or the id that it names."""

_BATCH_DOCUMENTS = 64
_BATCH_CHARACTERS = 2**20


def encode_texts(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], *, special_tokens: SpecialTokens = "text"
) -> list[list[int]]:
    """The ids of texts, without any that a tokenizer would add."""
    if not texts:
        return []
    names = special_names(tokenizer) if special_tokens == "ids" else ()
    parts = [parts_of(text, names) for text in texts]
    encoded = tokenizer(
        list(chain.from_iterable(parts)),
        add_special_tokens=False,
        split_special_tokens=special_tokens == "text",
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    ids = iter(encoded["input_ids"])
    return [list(chain.from_iterable(islice(ids, len(of_text)))) for of_text in parts]


def encode_text(tokenizer: PreTrainedTokenizerFast, text: str, *, special_tokens: SpecialTokens = "text") -> list[int]:
    """The ids of one text."""
    return encode_texts(tokenizer, [text], special_tokens=special_tokens)[0]


def special_names(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The special tokens of a tokenizer as text, longer ones first."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return sorted({*tokenizer.all_special_tokens, *added} - {""}, key=lambda name: (-len(name), name))


class Spelled:
    """Counts the special tokens of a tokenizer that texts spell out."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        names = special_names(tokenizer)
        self._pattern = re.compile("|".join(map(re.escape, names))) if names else None
        self.times: Counter[str] = Counter()

    def count(self, text: str) -> None:
        """Add those of a text."""
        if self._pattern is not None:
            self.times.update(self._pattern.findall(text))


def encode_documents(
    documents: Iterable[Iterable[str]],
    tokenizer: PreTrainedTokenizerFast,
    most: int,
    *,
    special_tokens: SpecialTokens = "text",
    spelled: Spelled | None = None,
    begin: int | None = None,
) -> Iterator["array[int]"]:
    """The ids of each document behind `begin` (unset: end-of-text), at most `most`: more of it is not read.

    Short documents are encoded in batches, which tokenizers do in parallel.
    """

    def encode(texts: list[str]) -> list[list[int]]:
        if spelled is not None:
            for text in texts:
                spelled.count(text)
        return encode_texts(tokenizer, texts, special_tokens=special_tokens)

    begin = tokenizer.eos_token_id if begin is None else begin

    def flush() -> Iterator["array[int]"]:
        for ids in encode(waiting):
            yield array("i", [begin, *ids[: most - 1]])
        waiting.clear()

    waiting: list[str] = []
    for document in documents:
        pieces = iter(document)
        first, second = next(pieces, ""), next(pieces, None)
        if second is None:
            waiting.append(first)
            if len(waiting) == _BATCH_DOCUMENTS or sum(map(len, waiting)) >= _BATCH_CHARACTERS:
                yield from flush()
            continue
        yield from flush()
        long = array("i", [begin])
        for piece in chain([first, second], pieces):
            long.extend(encode([piece])[0])
            if len(long) >= most:
                break
        yield long[:most]
    yield from flush()

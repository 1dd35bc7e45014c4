"""Texts that the report shows, and how tokens are written down.

Prompts, documents and tokens are untrusted: nothing here escapes anything, the template and the page's script do.
"""

import random
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from bridges.run_folder import Run
from interventions.tasks.base import TaskBatch
from sparse_model.data.corpus import check_read_here, iter_documents
from sparse_model.data.encoding import encode_text
from sparse_model.data.generated_python import generate_document
from sparse_model.data.prepare import corpus_config

_MOST_TOKENS = 96  # of a document; a few hundred coloured tokens are a page
# Characters that cannot be seen, or that turn round what follows (bidirectional controls), by their number.
_HIDDEN = (*range(0x7F, 0xA0), 0xAD, *range(0x200B, 0x2010), *range(0x2028, 0x202F), *range(0x2060, 0x2070), 0xFEFF)
_VISIBLE = (
    {c: f"‹{c:X}›" for c in _HIDDEN}
    | {c: chr(0x2400 + c) for c in range(32) if chr(c) not in "\n\t"}
    | {ord("\n"): "↵\n"}
)


MEMBERS = ("first prompt", "second prompt")
"""What the page calls the two prompts of a pair."""


class Text(NamedTuple):
    """A piece of text to colour."""

    title: str
    tokens: Int[Tensor, " pos"]


class HeldOut(NamedTuple):
    """Documents that training has not seen."""

    kind: str
    """held-out; or generated, where the corpus cannot be read, or was not read here."""
    documents: list[list[int]]
    """Token ids, each beginning with end-of-text."""


def held_out(run: Run, most_tokens: int) -> HeldOut:
    """The first held-out documents, as many as give so many tokens.

    Generated ones where the corpus is gone, or names files that were not tokenized on this machine.
    """
    try:
        corpus = corpus_config(run.config, run.samples)
        check_read_here(corpus, run.tokenizer, run.config.sparse.n_ctx)
        documents = list(_until(run, iter_documents(corpus, "val"), most_tokens))
        if documents:
            return HeldOut("held-out", documents)
    except (OSError, ValueError):
        pass
    rng = random.Random(run.config.seed)
    return HeldOut("generated", list(_until(run, iter(lambda: generate_document(rng), None), most_tokens)))


def _until(run: Run, documents: Iterator[str], most_tokens: int) -> Iterator[list[int]]:
    seen = 0
    for document in documents:
        # No token is longer than this many characters on average.
        head = document[: 64 * most_tokens]
        ids = encode_text(run.tokenizer, head, special_tokens=run.config.special_tokens)
        yield [run.tokenizer.eos_token_id, *ids]
        seen += 1 + len(ids)
        if seen >= most_tokens:
            return


def blocks(documents: HeldOut, n_ctx: int) -> Int[Tensor, "row pos"]:
    """The documents one after another, cut into rows as the models were trained on them; the last one is dropped."""
    stream = torch.tensor([token for document in documents.documents for token in document])
    n_ctx = min(n_ctx, len(stream))
    return stream[: len(stream) // n_ctx * n_ctx].view(-1, n_ctx)


def heads(run: Run, documents: HeldOut, count: int) -> list[Text]:
    """The beginnings of the first documents."""
    longest = min(_MOST_TOKENS, run.config.sparse.n_ctx)
    first = islice(documents.documents, count)
    kind = documents.kind.capitalize()
    return [Text(f"{kind} document {n}", torch.tensor(ids[:longest])) for n, ids in enumerate(first, 1)]


def prompts(run: Run, batch: TaskBatch, pairs: int) -> list[Text]:
    """The first pairs of a batch, both members of each."""
    texts = []
    for pair in range(pairs):
        for member in (0, 1):
            answer = visible(run.tokenizer, int(batch.answers[pair, member]))
            title = f"Evaluation pair {pair + 1}, {MEMBERS[member]}; right answer: {answer}"
            texts.append(Text(title, batch.tokens[pair, member, : int(batch.last[pair]) + 1]))
    return texts


def visible(tokenizer: PreTrainedTokenizerFast, tokens: int | Sequence[int]) -> str:
    """Tokens as text in which line ends and control characters can be seen."""
    ids = [tokens] if isinstance(tokens, int) else list(tokens)
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text.translate(_VISIBLE)


def inline(tokenizer: PreTrainedTokenizerFast, token: int) -> str:
    """A token as text within a line."""
    return visible(tokenizer, token).replace("\n", "")

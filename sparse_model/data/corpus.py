"""A corpus as blocks of token ids, from a short spec such as `"generated:0.4,stdlib:0.6"`.

1. Open the sources that the spec names; each divides its documents into train and val (`corpus_sources`).
2. Tokenize every document and put the end-of-text id in front of it.
3. Mix: take next the document that keeps the sources' token counts closest to their shares, so that every
   region of the stream holds the mix. A train source that ends early is repeated as long as another one still
   has fresh documents; val is never repeated.
4. Cut the stream into blocks of `n_ctx`, drop the incomplete last one, and keep the result on disk under a
   name derived from everything that shaped it.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import IterableDataset
from jaxtyping import Int, Int32
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from sparse_model.data.cache import Blocks, cache_folder, lock_file, one_builder, read_cache, write_cache
from sparse_model.data.packing import Feed, Packed, mix, pack
from sparse_model.data.sources import Source, open_source, parse_spec
from sparse_model.data.text_files import SPLITS, SourceReport, Split
from sparse_model.data.tokenizer import tokenizer_fingerprint
from sparse_model.io.progress import Bar, progress_bar

FORMAT_VERSION = 2
"""Part of the cache's name: raise it when the same configuration should give other blocks or another report."""

_CHARACTERS_PER_TOKEN = 4
_TOKENIZER_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """What to read and how much of it."""

    spec: str = "generated"
    """Sources, separated by commas, with optional weights (shares of the tokens) after a colon: `generated`,
    `stdlib`, `packages` (all that is installed) or `packages=numpy+scipy`, a local .py/.txt/.md/.jsonl file or
    folder, or the name of a data set on the hub."""
    max_tokens: int = 1_000_000
    """Most train tokens to keep; a finite corpus may give fewer."""
    val_fraction: float = 0.05
    """Share of the documents held out, and of `max_tokens` that val may have."""
    seed: int = 0
    """Seeds the generator and the order of files; what is train and what is val does not depend on it."""
    text_field: str | None = None
    """Field that holds the text in .jsonl and hub rows; by default the first of text, content, code."""

    def __post_init__(self) -> None:
        parse_spec(self.spec)
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens} must be at least 1; e.g. 1_000_000")
        if not 0 < self.val_fraction <= 0.5:
            raise ValueError(f"val_fraction={self.val_fraction} must lie above 0 and at most 0.5; e.g. 0.05")
        if self.text_field == "":
            raise ValueError("text_field='' names no field; leave it out to have it guessed")

    def budget(self, split: Split) -> int:
        """Most tokens of `split`."""
        return self.max_tokens if split == "train" else int(self.max_tokens * self.val_fraction)


class CorpusBlocks(NamedTuple):
    """A tokenized corpus."""

    train: Int[Tensor, "train_block n_ctx"]
    """Token ids, int32 on the CPU; every document in the stream follows an end-of-text id."""
    val: Int[Tensor, "val_block n_ctx"]
    """Likewise, from documents that train never sees."""
    fingerprint: str
    """Hex digest of everything that shaped the blocks."""
    report: dict[str, Any]
    """JSON-able: `splits` (tokens, blocks, and per source its tokens, share, documents begun and epochs), `notes`
    (sentences on repeated or exhausted sources) and `sources` (what `describe_sources` says)."""


def describe_sources(config: CorpusConfig) -> tuple[SourceReport, ...]:
    """For each source of `config`, how many documents are used and how many are left out and why.

    Raises: as `load_blocks` for paths and files.
    """
    return tuple(source.report() for source in open_sources(config))


def iter_documents(config: CorpusConfig, split: Split) -> Iterator[str]:
    """The mixed documents of one side as text, always in the same order; e.g. to train a tokenizer.

    No tokenizer is needed, so shares and the budget are counted in characters, four to a token.

    Raises: as `load_blocks` for paths and files.
    """
    feeds = [
        Feed(entry.name, entry.share, partial(source.documents, split))
        for entry, source in zip(parse_spec(config.spec), open_sources(config), strict=True)
    ]
    budget = config.budget(split) * _CHARACTERS_PER_TOKEN
    yield from (document for _, document in mix(feeds, budget, repeat=split == "train"))


def load_blocks(
    config: CorpusConfig,
    tokenizer: PreTrainedTokenizerFast,
    n_ctx: int,
    *,
    cache_dir: str | Path | None = None,
    progress: bool = True,
) -> CorpusBlocks:
    """Tokenize the corpus into blocks of `n_ctx` ids, or read them back from an earlier call.

    The cache folder is `cache_dir`, else `$SPARSE_BRIDGES_CACHE`, else `~/.cache/sparse-bridges`. A cached
    result that does not read back as it was written is rebuilt with a warning.

    Raises:
        FileNotFoundError: a source that looks like a path and does not exist.
        ConnectionError: any other unknown source that cannot be streamed from the hub.
        ValueError: a tokenizer without an end-of-text token, an empty source, or too few tokens for one block
            of train or of val.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos_token to separate documents with; set tokenizer.eos_token")
    if n_ctx < 2:
        raise ValueError(f"n_ctx={n_ctx} leaves nothing to predict; use at least 2")
    sources = open_sources(config, cache_dir)
    fingerprint = _fingerprint(config, sources, tokenizer, n_ctx)
    folder = cache_folder(cache_dir) / f"blocks-{fingerprint[:24]}"
    cached = read_cache(folder) if folder.exists() else None
    if cached is None or lock_file(folder).exists():
        with one_builder(folder):
            cached = cached or (read_cache(folder) if folder.exists() else None)
            if cached is None:
                cached = _build_all(config, sources, tokenizer, n_ctx, progress)
                write_cache(folder, *cached)
    blocks, report = cached
    return CorpusBlocks(_tensor(blocks["train"]), _tensor(blocks["val"]), fingerprint, report)


def _build_all(
    config: CorpusConfig, sources: Sequence[Source], tokenizer: PreTrainedTokenizerFast, n_ctx: int, progress: bool
) -> tuple[Blocks, dict[str, Any]]:
    """The blocks of both splits, and the report."""
    blocks: Blocks = {}
    splits, notes = {}, []
    with progress_bar(total=0, unit=" tokens", unit_scale=True, desc="corpus", disable=not progress) as bar:
        for split in SPLITS:
            blocks[split], splits[split] = _build(config, split, sources, tokenizer, n_ctx, bar)
            notes += _notes(config, split, splits[split])
    report = {"splits": splits, "notes": notes, "sources": [source.report().as_json() for source in sources]}
    return blocks, report


def open_sources(config: CorpusConfig, cache_dir: str | Path | None = None) -> list[Source]:
    """The sources of `config`, none of them read so far."""
    return [
        open_source(
            source.name,
            val_fraction=config.val_fraction,
            seed=config.seed,
            text_field=config.text_field,
            cache_dir=cache_dir,
        )
        for source in parse_spec(config.spec)
    ]


def _fingerprint(
    config: CorpusConfig, sources: Sequence[Source], tokenizer: PreTrainedTokenizerFast, n_ctx: int
) -> str:
    parts = [
        FORMAT_VERSION,
        asdict(config),
        [source.identity() for source in sources],
        tokenizer_fingerprint(tokenizer),
        n_ctx,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _rows(source: Source, split: Split) -> Iterator[dict[str, str]]:
    return ({"text": document} for document in source.documents(split))


def _token_lists(source: Source, split: Split, tokenizer: PreTrainedTokenizerFast) -> Iterator[list[int]]:
    """The ids of each document, the end-of-text id first."""
    eos = tokenizer.eos_token_id

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        # A document that spells out the end-of-text token must not end there, hence split_special_tokens.
        encoded = tokenizer(
            batch["text"],
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return {"ids": [[eos, *ids] for ids in encoded["input_ids"]]}

    stream = IterableDataset.from_generator(_rows, gen_kwargs={"source": source, "split": split})
    stream = stream.map(encode, batched=True, batch_size=_TOKENIZER_BATCH, remove_columns=["text"])
    return (row["ids"] for row in stream)


def _build(
    config: CorpusConfig,
    split: Split,
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerFast,
    n_ctx: int,
    bar: Bar,
) -> tuple[Int32[np.ndarray, "block n_ctx"], dict[str, Any]]:
    """The blocks of one side, and their entry in the report."""
    entries = parse_spec(config.spec)
    feeds = [
        Feed(entry.name, entry.share, partial(_token_lists, source, split, tokenizer))
        for entry, source in zip(entries, sources, strict=True)
    ]
    budget = config.budget(split)
    bar.total += budget

    def counted() -> Iterator[tuple[int, list[int]]]:
        for number, ids in mix(feeds, budget, repeat=split == "train"):
            bar.update(len(ids))
            yield number, ids

    packed = pack(counted(), n_ctx, budget, len(feeds))
    if not len(packed.blocks):
        available = min(budget, sum(feed.taken for feed in feeds))
        raise ValueError(
            f"n_ctx={n_ctx} is larger than the {available} {split} tokens of corpus {config.spec!r};"
            " lower n_ctx, raise max_tokens or val_fraction, or give more text"
        )
    return packed.blocks, _split_report(feeds, packed)


def _split_report(feeds: Sequence[Feed[list[int]]], packed: Packed) -> dict[str, Any]:
    total = packed.blocks.size
    per_source = {
        feed.name: {
            "wanted_share": feed.share,
            "share": tokens / total,
            "tokens": tokens,
            "documents": documents,
            "complete_passes": feed.passes,
        }
        for feed, tokens, documents in zip(feeds, packed.tokens, packed.documents, strict=True)
    }
    return {"tokens": total, "blocks": len(packed.blocks), "sources": per_source}


def _notes(config: CorpusConfig, split: Split, report: dict[str, Any]) -> list[str]:
    ended = {name: source for name, source in report["sources"].items() if source["complete_passes"]}
    if split == "val":
        return [f"{name} has no more val documents; its {of['tokens']} tokens are all" for name, of in ended.items()]
    notes = []
    if len(ended) == len(report["sources"]):
        notes.append(f"the corpus ended at {report['tokens']} of max_tokens={config.max_tokens} train tokens")
    elif ended:
        notes += [
            f"{name} is repeated to keep its share ({of['complete_passes']} complete passes)"
            for name, of in ended.items()
        ]
    return notes


def _tensor(blocks: Int32[np.ndarray, "block n_ctx"]) -> Int[Tensor, "block n_ctx"]:
    return torch.from_numpy(blocks)

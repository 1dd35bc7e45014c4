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
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Int, Int32
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from sparse_model.data.cache import Blocks, cache_folder, lock_file, one_builder, read_cache, write_cache
from sparse_model.data.encoding import SpecialTokens, Spelled, encode_documents
from sparse_model.data.packing import Feed, Packed, mix, pack
from sparse_model.data.pieces import head_of
from sparse_model.data.sources import Source, open_source, parse_spec
from sparse_model.data.text_files import SPLITS, FileSource, SourceReport, Split
from sparse_model.data.tokenizer import tokenizer_fingerprint
from sparse_model.io.progress import Bar, progress_bar

Documents = Literal["joined", "apart"]
"""How documents become blocks: joined in a stream that is cut, or the head of one in each, shorter ones left out."""

FORMAT_VERSION = 3
"""Part of the cache's name: raise it when the same configuration should give other blocks or another report."""

CHARACTERS_PER_TOKEN = 4
"""As budgets are counted where there is no tokenizer."""


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
    special_tokens: SpecialTokens = "text"
    """What a special token of the tokenizer is where a text spells it out: text, or the id that it names."""
    documents: Documents = "joined"
    """How documents become blocks: one behind the other, or the head of one in each."""
    samples: str | None = None
    """File of documents that `self`, the dense model's own text, stands for (`bridges.self_text`)."""

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
    """Token ids, int32 on the CPU; every document in the stream follows an end-of-text id. Of documents kept apart each
    is a block's, behind beginning-of-text where the tokenizer has that."""
    val: Int[Tensor, "val_block n_ctx"]
    """Likewise, from documents that train never sees."""
    fingerprint: str
    """Hex digest of everything that shaped the blocks."""
    report: dict[str, Any]
    """JSON-able: `splits` (tokens, blocks, per source its tokens, share, documents begun and epochs, and how often the
    text read spells each special token), `notes` (sentences on sources that ended and on special tokens) and `sources`
    (what `describe_sources` says)."""


def describe_sources(config: CorpusConfig) -> tuple[SourceReport, ...]:
    """For each source of `config`, how many documents are used and how many are left out and why.

    Raises: as `load_blocks` for paths and files.
    """
    return tuple(source.report() for source in open_sources(config))


def iter_documents(config: CorpusConfig, split: Split) -> Iterator[str]:
    """The mixed documents of one side as text, always in the same order; e.g. to train a tokenizer.

    No tokenizer is needed, so shares and the budget are counted in characters, four to a token; of a document that is
    longer than the budget only the head is given.

    Raises: as `load_blocks` for paths and files.
    """
    budget = config.budget(split) * CHARACTERS_PER_TOKEN

    def heads(source: Source) -> Iterator[str]:
        return (head_of(document, budget) for document in source.documents(split))

    feeds = [
        Feed(entry.name, entry.share, partial(heads, source))
        for entry, source in zip(parse_spec(config.spec), open_sources(config), strict=True)
    ]
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
    folder = _cached(fingerprint, cache_dir)
    cached = read_cache(folder) if folder.exists() else None
    if cached is None or lock_file(folder).exists():
        with one_builder(folder):
            cached = cached or (read_cache(folder) if folder.exists() else None)
            if cached is None:
                cached = _build_all(config, sources, tokenizer, n_ctx, progress)
                write_cache(folder, *cached)
    blocks, report = cached
    return CorpusBlocks(_tensor(blocks["train"]), _tensor(blocks["val"]), fingerprint, report)


def check_read_here(
    config: CorpusConfig, tokenizer: PreTrainedTokenizerFast, n_ctx: int, *, cache_dir: str | Path | None = None
) -> None:
    """Refuse a configuration's local files where this machine never tokenized them so: nobody here asked for them.

    Who passes a run on writes its configuration, and could name any folder of whoever opens it.

    Raises ValueError for files without cached blocks, and what opening the sources raises.
    """
    sources = open_sources(config, cache_dir)
    local = [source.name for source in sources if type(source) is FileSource and not source.stdlib]
    if local and not _cached(_fingerprint(config, sources, tokenizer, n_ctx), cache_dir).exists():
        raise ValueError(
            f"the corpus {', '.join(local)} has not been tokenized on this machine: if it is yours, sparse-bridges "
            "evaluate on the run does that"
        )


def _cached(fingerprint: str, cache_dir: str | Path | None) -> Path:
    return cache_folder(cache_dir) / f"blocks-{fingerprint[:24]}"


def _build_all(
    config: CorpusConfig, sources: Sequence[Source], tokenizer: PreTrainedTokenizerFast, n_ctx: int, progress: bool
) -> tuple[Blocks, dict[str, Any]]:
    """The blocks of both splits, and the report."""
    blocks: Blocks = {}
    splits, notes = {}, []
    with progress_bar(total=0, unit=" tokens", unit_scale=True, desc="corpus", disable=not progress) as bar:
        for split in SPLITS:
            blocks[split], splits[split] = _build(config, split, sources, tokenizer, n_ctx, bar)
            notes += _notes(config, split, splits[split], n_ctx)
    notes += _note_on_special_tokens(config, splits)
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
            samples=config.samples,
            cache_dir=cache_dir,
        )
        for source in parse_spec(config.spec)
    ]


def _fingerprint(
    config: CorpusConfig, sources: Sequence[Source], tokenizer: PreTrainedTokenizerFast, n_ctx: int
) -> str:
    parts = [
        FORMAT_VERSION,
        {
            name: value
            for name, value in asdict(config).items()
            # A run's copy of its samples is the same text, and joined documents keep their older name.
            if name != "samples" and (name, value) != ("documents", "joined")
        },
        [source.identity() for source in sources],
        tokenizer_fingerprint(tokenizer),
        n_ctx,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _build(
    config: CorpusConfig,
    split: Split,
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerFast,
    n_ctx: int,
    bar: Bar,
) -> tuple[Int32[np.ndarray, "block n_ctx"], dict[str, Any]]:
    """The blocks of one side, and their entry in the report."""
    budget, spelled = config.budget(split), [Spelled(tokenizer) for _ in sources]
    apart, short = config.documents == "apart", Counter[str]()
    bar.total += budget

    def ids(source: Source, name: str, spelled: Spelled) -> Iterator["array[int]"]:
        again = bool(spelled.times)  # a source is read again to keep its share: what it spells is counted once
        documents = encode_documents(
            source.documents(split),
            tokenizer,
            min(budget, n_ctx) if apart else budget,
            special_tokens=config.special_tokens,
            spelled=None if again else spelled,
            begin=tokenizer.bos_token_id if apart else None,
        )
        return _long_enough(documents, n_ctx, name, short) if apart else documents

    feeds = [
        Feed(entry.name, entry.share, partial(ids, source, entry.name, of_source))
        for entry, source, of_source in zip(parse_spec(config.spec), sources, spelled, strict=True)
    ]

    def counted() -> Iterator[tuple[int, "array[int]"]]:
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
    times = sum((of_source.times for of_source in spelled), Counter[str]())
    report = _split_report(feeds, packed) | {"special_tokens": dict(times.most_common())}
    return packed.blocks, report | ({"too_short": dict(short)} if apart else {})


def _long_enough(
    documents: Iterator["array[int]"], n_ctx: int, name: str, short: Counter[str]
) -> Iterator["array[int]"]:
    """The documents that fill a block, the others counted under the source's name."""
    used, left_out = 0, 0
    for ids in documents:
        if len(ids) == n_ctx:
            used += 1
            yield ids
        else:
            left_out += 1
            short[name] = max(short[name], left_out)  # not again where the source is repeated
    if not used and left_out:
        raise ValueError(
            f"n_ctx={n_ctx}: each of the {left_out} documents of corpus {name!r} is shorter, and with documents=apart "
            "each must fill a block: lower n_ctx, or leave documents out"
        )


def _split_report(feeds: Sequence[Feed["array[int]"]], packed: Packed) -> dict[str, Any]:
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


def _notes(config: CorpusConfig, split: Split, report: dict[str, Any], n_ctx: int) -> list[str]:
    notes = []
    if short := sum(report.get("too_short", {}).values()):
        notes.append(f"{short} {split} documents have fewer than {n_ctx} tokens and are left out (--documents apart)")
    ended = {name: source for name, source in report["sources"].items() if source["complete_passes"]}
    if split == "val":
        return notes + [
            f"{name} has no more val documents; its {of['tokens']} tokens are all" for name, of in ended.items()
        ]
    if len(ended) == len(report["sources"]):
        notes.append(f"the corpus ended at {report['tokens']} of max_tokens={config.max_tokens} train tokens")
    elif ended:
        notes += [
            f"{name} is repeated to keep its share ({of['complete_passes']} complete passes)"
            for name, of in ended.items()
        ]
    return notes


def _note_on_special_tokens(config: CorpusConfig, splits: Mapping[Split, dict[str, Any]]) -> list[str]:
    times = sum((Counter(split["special_tokens"]) for split in splits.values()), Counter[str]())
    if not times:
        return []
    spelled = ", ".join(f"{name} {count} times" for name, count in times.most_common(3))
    more = f" and {len(times) - 3} others" if len(times) > 3 else ""
    read = {
        "text": "which stays text: with --special-tokens ids each is read as the one id that it names",
        "ids": "each of which is read as the one id that it names (--special-tokens ids)",
    }[config.special_tokens]
    return [f"the text spells special tokens of the tokenizer ({spelled}{more}), {read}"]


def left_out_line(report: Mapping[str, Any]) -> str:
    """One line on what the sources of a corpus leave out, from its report; empty where that is nothing."""
    parts = []
    for source in report["sources"]:
        reasons = list(source["left_out"].items())
        said = ", ".join(f"{count} {reason}" for reason, count in reasons[:6])
        said += f", {sum(count for _, count in reasons[6:])} for other reasons" if len(reasons) > 6 else ""
        if reasons:
            parts.append(f"{source['name']} ({said}; {source['files']} files read)")
    return f"left out of the corpus: {'; '.join(parts)}" if parts else ""


def _tensor(blocks: Int32[np.ndarray, "block n_ctx"]) -> Int[Tensor, "block n_ctx"]:
    return torch.from_numpy(blocks)

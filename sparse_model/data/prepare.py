"""From a training configuration to its corpus and the text its tokenizer is trained on."""

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from sparse_model.config import SparseConfig, TrainConfig
from sparse_model.data.corpus import (
    CHARACTERS_PER_TOKEN,
    CorpusBlocks,
    CorpusConfig,
    iter_documents,
    left_out_line,
    load_blocks,
    open_sources,
)

logger = logging.getLogger(__name__)


def corpus_config(config: TrainConfig, samples: Path | None = None) -> CorpusConfig:
    """The corpus of a training configuration. samples: the file that `self` stands for."""
    return CorpusConfig(
        spec=config.corpus,
        max_tokens=config.corpus_tokens,
        seed=config.seed,
        text_field=config.text_field,
        special_tokens=config.special_tokens,
        documents=config.documents,
        samples=None if samples is None else str(samples),
    )


def check_corpus(config: TrainConfig, samples: Path | None = None) -> None:
    """Refuse a corpus whose spec, paths or distributions are wrong; reads no text and writes nothing.

    Raises: as `load_blocks` for names and paths.
    """
    open_sources(corpus_config(config, samples))


def tokenizer_documents(config: TrainConfig, characters: int = 4_000_000) -> Iterator[str]:
    """Documents to train a tokenizer on: the head of the training split, at most so many characters."""
    corpus = corpus_config(config)
    most = min(corpus.max_tokens, characters // CHARACTERS_PER_TOKEN)
    return iter_documents(dataclasses.replace(corpus, max_tokens=most), "train")


def check_vocabulary(tokenizer: PreTrainedTokenizerFast, shape: SparseConfig) -> None:
    """Raise ValueError for a tokenizer with more tokens than the model has."""
    if len(tokenizer) > shape.d_vocab:
        raise ValueError(
            f"sparse.d_vocab={shape.d_vocab}: the tokenizer has {len(tokenizer)} tokens, use at least that"
        )


def prepare_corpus(
    config: TrainConfig, tokenizer: PreTrainedTokenizerFast, *, samples: Path | None = None, progress: bool = True
) -> CorpusBlocks:
    """The token blocks of a training configuration. samples: what `self` stands for, such as `run.samples`."""
    return load_blocks(corpus_config(config, samples), tokenizer, config.sparse.n_ctx, progress=progress)


def say_what_is_left_out(blocks: CorpusBlocks) -> None:
    """Log one line on what the corpus leaves out, and the notes on what was read otherwise than one may think."""
    for line in (left_out_line(blocks.report), *blocks.report["notes"]):
        if line:
            logger.info("%s", line)

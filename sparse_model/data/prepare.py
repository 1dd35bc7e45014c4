"""From a training configuration to its corpus and the text its tokenizer is trained on."""

from collections.abc import Iterator

from transformers import PreTrainedTokenizerFast

from sparse_model.config import TrainConfig
from sparse_model.data.corpus import CorpusBlocks, CorpusConfig, iter_documents, load_blocks, open_sources


def corpus_config(config: TrainConfig) -> CorpusConfig:
    """The corpus of a training configuration."""
    return CorpusConfig(
        spec=config.corpus, max_tokens=config.corpus_tokens, seed=config.seed, text_field=config.text_field
    )


def check_corpus(config: TrainConfig) -> None:
    """Refuse a corpus whose spec, paths or distributions are wrong; reads no text and writes nothing.

    Raises: as `load_blocks` for names and paths.
    """
    open_sources(corpus_config(config))


def tokenizer_documents(config: TrainConfig, characters: int = 4_000_000) -> Iterator[str]:
    """Documents to train a tokenizer on: the head of the training split, at most so many characters."""
    seen = 0
    for document in iter_documents(corpus_config(config), "train"):
        yield document
        seen += len(document)
        if seen >= characters:
            return


def prepare_corpus(config: TrainConfig, tokenizer: PreTrainedTokenizerFast, *, progress: bool = True) -> CorpusBlocks:
    """The token blocks of a training configuration."""
    return load_blocks(corpus_config(config), tokenizer, config.sparse.n_ctx, progress=progress)

"""Small corpora on disk, and their blocks."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from sparse_model.data.corpus import CorpusBlocks, CorpusConfig, load_blocks


def write_documents(folder: Path, count: int, words: int = 30, tag: str = "d") -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    texts = [" ".join(f"{tag}{i}w{j}" for j in range(words)) + "\n" for i in range(count)]
    for i, text in enumerate(texts):
        (folder / f"{tag}{i}.txt").write_text(text)
    return texts


def load(config: CorpusConfig, tokenizer: PreTrainedTokenizerFast, n_ctx: int = 16, **kwargs: Any) -> CorpusBlocks:
    return load_blocks(config, tokenizer, n_ctx, progress=False, **kwargs)

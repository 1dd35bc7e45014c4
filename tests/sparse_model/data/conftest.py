import pytest
from transformers import PreTrainedTokenizerFast

from sparse_model.data.corpus import CorpusConfig, iter_documents
from sparse_model.data.tokenizer import train_tokenizer


@pytest.fixture
def caches_in_tmp(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSE_BRIDGES_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(iter_documents(CorpusConfig(max_tokens=10_000), "train"), 300)

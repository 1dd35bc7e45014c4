"""Weight-sparse transformers: the model, its data, and its training."""

from typing import TYPE_CHECKING

from sparse_model.exports import lazy_names

if TYPE_CHECKING:
    from sparse_model.config import OptimConfig, SparseConfig, SparsityConfig, TrainConfig
    from sparse_model.data.corpus import CorpusConfig, describe_sources, load_blocks
    from sparse_model.data.generated_python import generate_document
    from sparse_model.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
    from sparse_model.model.checkpoint import load_sparse, save_sparse
    from sparse_model.model.openai_format import from_openai, to_openai
    from sparse_model.model.transformer import SparseTransformer
    from sparse_model.sparsity.abs_topk import abs_topk
    from sparse_model.sparsity.projection import annealed_fraction, count_nonzeros, project_
    from sparse_model.training.pretrain import PretrainConfig, pretrain
    from sparse_model.version import __version__

__all__ = [
    "CorpusConfig",
    "OptimConfig",
    "PretrainConfig",
    "SparseConfig",
    "SparseTransformer",
    "SparsityConfig",
    "TrainConfig",
    "__version__",
    "abs_topk",
    "annealed_fraction",
    "count_nonzeros",
    "describe_sources",
    "from_openai",
    "generate_document",
    "load_blocks",
    "load_sparse",
    "load_tokenizer",
    "pretrain",
    "project_",
    "save_sparse",
    "save_tokenizer",
    "to_openai",
    "train_tokenizer",
]

__getattr__ = lazy_names(
    __name__,
    {
        "sparse_model.config": "OptimConfig SparseConfig SparsityConfig TrainConfig",
        "sparse_model.data.corpus": "CorpusConfig describe_sources load_blocks",
        "sparse_model.data.generated_python": "generate_document",
        "sparse_model.data.tokenizer": "load_tokenizer save_tokenizer train_tokenizer",
        "sparse_model.model.checkpoint": "load_sparse save_sparse",
        "sparse_model.model.openai_format": "from_openai to_openai",
        "sparse_model.model.transformer": "SparseTransformer",
        "sparse_model.sparsity.abs_topk": "abs_topk",
        "sparse_model.sparsity.projection": "annealed_fraction count_nonzeros project_",
        "sparse_model.training.pretrain": "PretrainConfig pretrain",
    },
)


def __dir__() -> list[str]:
    return __all__

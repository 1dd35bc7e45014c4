"""The sparse model's shape, from the dense model that it is to be bridged to."""

import dataclasses

from transformers import PretrainedConfig

from bridges.config import RunConfig
from bridges.families import FAMILIES

_LONGEST = 1024  # a longer context is taken where it is asked for: a step's memory grows with it
_LARGEST_BIGRAM = 4096
_PER_ROW = 8


def fit_to(config: RunConfig, dense: PretrainedConfig) -> RunConfig:
    """The configuration with a sparse model that fits a dense one; the same where it fits already.

    Depth and vocabulary are the dense model's, the context too, up to 1,024 tokens. The sparse model is twice as wide,
    with heads of its configured width and four neurons per channel, and keeps a share of its weights, a power of 1/2,
    that leaves a row of a square matrix at least eight. The dense bigram table goes where it would be large. Learned
    positions come where the dense model has them: its stream holds them from the first site on, and a decoder has
    nothing else to make them of.
    """
    old, width = config.sparse, 2 * dense.hidden_size
    same = (old.n_layers, old.d_vocab, old.d_model) == (dense.num_hidden_layers, dense.vocab_size, width)
    if same and old.n_ctx <= dense.max_position_embeddings:
        return config
    small = dense.vocab_size <= _LARGEST_BIGRAM
    shape = dataclasses.replace(
        old,
        n_layers=dense.num_hidden_layers,
        d_vocab=dense.vocab_size,
        n_ctx=min(dense.max_position_embeddings, _LONGEST),
        d_model=width,
        d_mlp=4 * width,
        n_heads=max(1, width // old.d_head),
        bigram=old.bigram if small else "none",
        positions="learned" if old.positions == "none" and FAMILIES[dense.model_type].positions else old.positions,
    )
    halvings = max(0, (width // _PER_ROW).bit_length() - 1)
    return dataclasses.replace(
        config, sparse=shape, sparsity=dataclasses.replace(config.sparsity, nonzero_fraction=0.5**halvings)
    )


def describe_shape(config: RunConfig, dense: PretrainedConfig) -> str:
    """The sparse model's shape as options, with the size of the dense model that they come from."""
    shape = config.sparse
    return (
        f"{config.dense} is a {dense.model_type} model of {dense.num_hidden_layers} layers, width {dense.hidden_size}, "
        f"context {dense.max_position_embeddings} and vocabulary {dense.vocab_size}; what is not given of the sparse "
        f"model's shape follows from that: --sparse.n-layers {shape.n_layers} --sparse.d-vocab {shape.d_vocab} "
        f"--sparse.n-ctx {shape.n_ctx} --sparse.d-model {shape.d_model} --sparse.d-mlp {shape.d_mlp} "
        f"--sparse.n-heads {shape.n_heads} --sparse.bigram {shape.bigram} --sparse.positions {shape.positions} "
        f"--sparsity.nonzero-fraction {config.sparsity.nonzero_fraction:g}"
    )

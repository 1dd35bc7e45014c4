"""The sparse model's shape, from the dense model that it is to be bridged to."""

import dataclasses

from transformers import PretrainedConfig

from bridges.config import RunConfig
from bridges.dense_start import ACTIVATIONS, DENSE
from bridges.families import FAMILIES
from sparse_model.config import SparseConfig

_LONGEST = 1024  # a longer context is taken where it is asked for: a step's memory grows with it
_LARGEST_BIGRAM = 4096
_PER_ROW = 8


def fit_to(config: RunConfig, dense: PretrainedConfig) -> RunConfig:
    """The configuration with a sparse model that fits a dense one; the same where it fits already.

    Depth and vocabulary are the dense model's, the context too, up to 1,024 tokens. The dense bigram table goes where
    it would be large. Learned positions come where the dense model has them: its stream holds them from the first site
    on, and a decoder has nothing else to make them of.

    A new sparse model is twice as wide, with heads of its configured width and four neurons per channel, and keeps a
    share of its weights, a power of 1/2, that leaves a row of a square matrix at least eight. One that begins as the
    dense model (`bridges.dense_start`) has its width, heads and neurons, and no bigram table, as it has none.
    """
    if config.start_from == DENSE:
        return _dense_itself(config, dense)
    old, width = config.sparse, 2 * dense.hidden_size
    same = (old.n_layers, old.d_vocab, old.d_model) == (dense.num_hidden_layers, dense.vocab_size, width)
    if same and old.n_ctx <= dense.max_position_embeddings:
        return config
    shape = dataclasses.replace(
        _lengths(old, dense),
        d_model=width,
        d_mlp=4 * width,
        n_heads=max(1, width // old.d_head),
        positions="learned" if old.positions == "none" and FAMILIES[dense.model_type].positions else old.positions,
    )
    halvings = max(0, (width // _PER_ROW).bit_length() - 1)
    return dataclasses.replace(
        config, sparse=shape, sparsity=dataclasses.replace(config.sparsity, nonzero_fraction=0.5**halvings)
    )


def _lengths(old: SparseConfig, dense: PretrainedConfig) -> SparseConfig:
    return dataclasses.replace(
        old,
        n_layers=dense.num_hidden_layers,
        d_vocab=dense.vocab_size,
        n_ctx=min(dense.max_position_embeddings, _LONGEST),
        bigram=old.bigram if dense.vocab_size <= _LARGEST_BIGRAM else "none",
    )


def _dense_itself(config: RunConfig, dense: PretrainedConfig) -> RunConfig:
    """With the shape that a sparse model needs to begin as a dense one, and rates that do not destroy what it knows."""
    if dense.model_type != "gpt2" or dense.activation_function not in ACTIVATIONS:
        return config  # refused, with the reason, when the run begins
    old, heads = config.sparse, dense.num_attention_heads
    shape = dataclasses.replace(
        old if old.n_layers == dense.num_hidden_layers and old.d_vocab == dense.vocab_size else _lengths(old, dense),
        d_model=dense.hidden_size,
        d_mlp=dense.n_inner or 4 * dense.hidden_size,
        n_heads=heads,
        d_head=dense.hidden_size // heads,
        bigram="none",
        positions="learned",
        d_pos=0,
        act_fn=ACTIVATIONS[dense.activation_function],
        topk_fraction=0.5,
    )
    if config.sparsity.topk_anneal_stop:  # of a preset that begins so
        return dataclasses.replace(config, sparse=shape)
    return dataclasses.replace(
        config,
        sparse=shape,
        sparsity=dataclasses.replace(
            config.sparsity, nonzero_fraction=1 / 4, bias_fraction=1.0, anneal_stop=0.5, topk_anneal_stop=0.3
        ),
        optim=dataclasses.replace(config.optim, lr=1e-3),
        bridge=dataclasses.replace(config.bridge, lr=5e-4, encoder_topk=0.5),
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

"""The sparse model's shape follows from the dense model's."""

import pytest
from support.families import SETTINGS
from transformers import AutoConfig

from bridges.config import PRESETS, RunConfig
from bridges.families import FAMILIES
from bridges.shape import describe_shape, fit_to
from sparse_model.config import SparseConfig


def test_what_the_dense_model_says() -> None:
    dense = AutoConfig.for_model("llama", num_hidden_layers=30, hidden_size=576, vocab_size=49152)
    dense.max_position_embeddings = 8192
    config = fit_to(RunConfig(dense="./smol"), dense)
    shape = config.sparse
    assert (shape.n_layers, shape.d_vocab, shape.n_ctx) == (30, 49152, 1024)
    assert (shape.d_model, shape.d_mlp, shape.n_heads, shape.d_head) == (1152, 4608, 72, 16)
    assert shape.bigram == "none"
    assert config.sparsity.nonzero_fraction == 1 / 128  # nine of a row's 1,152
    text = describe_shape(config, dense)
    for option in ("n-layers 30", "d-vocab 49152", "n-ctx 1024", "d-model 1152", "d-mlp 4608", "n-heads 72"):
        assert f"--sparse.{option} " in text
    assert text.startswith("./smol is a llama model of 30 layers, width 576, context 8192 and vocabulary 49152; ")
    assert text.endswith("--sparse.bigram none --sparse.positions none --sparsity.nonzero-fraction 0.0078125")


@pytest.mark.parametrize(("width", "fraction"), [(2, 1), (8, 1 / 2), (64, 1 / 16), (256, 1 / 64), (1024, 1 / 256)])
def test_the_share_leaves_a_row_eight_entries(width: int, fraction: float) -> None:
    dense = AutoConfig.for_model("gpt2", n_layer=3, n_embd=width, vocab_size=300, n_positions=32)
    config = fit_to(RunConfig(), dense)
    assert config.sparsity.nonzero_fraction == fraction
    assert config.sparse.bigram == "learned"
    assert config.sparse.n_ctx == 32


@pytest.mark.parametrize("preset", ["demo", "tiny", "stdlib", "code", "gpt2"])
def test_a_preset_that_fits_stays_as_it_is(preset: str) -> None:
    """Above all with the preset's own dense model, trained once for several runs."""
    config = PRESETS[preset][1]
    width = 768 if config.dense else config.dense_train.d_model
    dense = AutoConfig.for_model(
        "gpt2",
        n_layer=config.sparse.n_layers,
        n_embd=width,
        n_head=12 if config.dense else config.dense_train.n_heads,
        vocab_size=config.sparse.d_vocab,
        n_positions=max(config.sparse.n_ctx, 1024 * (preset == "gpt2")),
    )
    assert fit_to(config, dense) == config


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_names_its_sizes_alike(kind: str) -> None:
    config = fit_to(RunConfig(), AutoConfig.for_model(kind, vocab_size=384, **SETTINGS[kind]))
    assert (config.sparse.n_layers, config.sparse.n_ctx, config.sparse.d_model) == (2, 64, 32)


@pytest.mark.parametrize("kind", FAMILIES)
def test_learned_positions_where_the_dense_model_has_them(kind: str) -> None:
    dense = AutoConfig.for_model(kind, vocab_size=384, **SETTINGS[kind])
    wanted = "learned" if kind in ("gpt2", "gpt_neo", "opt") else "none"
    config = fit_to(RunConfig(), dense)
    assert config.sparse.positions == wanted
    assert f" --sparse.positions {wanted} " in describe_shape(config, dense)
    asked = SparseConfig(positions="concat_learned", d_pos=4)
    assert fit_to(RunConfig(sparse=asked), dense).sparse.positions == "concat_learned"


def test_the_preset_for_gpt2_has_them_too() -> None:
    assert PRESETS["gpt2"][1].sparse.positions == "learned"

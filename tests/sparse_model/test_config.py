"""Configurations: validation that names option and value, and strict files."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_model.config import (
    TOPK_LOCATIONS,
    OptimConfig,
    SparseConfig,
    SparsityConfig,
    from_json,
    to_json,
)
from sparse_model.io.reading import typed


@pytest.mark.parametrize(
    ("cls", "options", "named"),
    [
        (SparseConfig, {"n_layers": 0}, "n_layers=0"),
        (SparseConfig, {"d_model": -1}, "d_model=-1"),
        (SparseConfig, {"n_ctx": 0}, "n_ctx=0"),
        (SparseConfig, {"d_vocab": 0}, "d_vocab=0"),
        (SparseConfig, {"topk_fraction": 0.0}, "topk_fraction=0.0"),
        (SparseConfig, {"topk_fraction": 1.5}, "topk_fraction=1.5"),
        (SparseConfig, {"topk_fraction": 1e-3}, "topk_fraction=0.001"),
        (SparseConfig, {"topk_locations": ("attn_in", "attn_z")}, "topk_locations='attn_z'"),
        (SparseConfig, {"d_pos": 4}, "d_pos=4"),
        (SparseConfig, {"d_pos": -4}, "d_pos=-4"),
        (SparseConfig, {"positions": "concat_learned"}, "d_pos=0"),
        (SparsityConfig, {"nonzero_fraction": 0.0}, "nonzero_fraction=0.0"),
        (SparsityConfig, {"embed_fraction": 2.0}, "embed_fraction=2.0"),
        (SparsityConfig, {"bias_fraction": -0.5}, "bias_fraction=-0.5"),
        (SparsityConfig, {"min_per_neuron": -1}, "min_per_neuron=-1"),
        (SparsityConfig, {"anneal_start": 0.5, "anneal_stop": 0.4}, r"anneal_start, anneal_stop=\(0.5, 0.4\)"),
        (SparsityConfig, {"anneal_stop": 1.2}, r"anneal_start, anneal_stop=\(0.0, 1.2\)"),
        (OptimConfig, {"lr": 0.0}, "lr=0.0"),
        (OptimConfig, {"warmup": 1.0}, "warmup=1.0"),
        (OptimConfig, {"eps": 0.0}, "eps=0.0"),
    ],
)
def test_an_invalid_option_is_an_error_that_names_option_and_value(cls: type, options: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        cls(**options)


# Run apart from this process, whose type checks would answer before the config's own.
WRONG_CHOICES = """
from pathlib import Path
from sparse_model.config import OptimConfig, SparseConfig, SparsityConfig, from_json

path = Path("config.json")
path.write_text('{"positions": "rotary"}')
for call in (
    lambda: SparseConfig(positions="rotary"),
    lambda: SparseConfig(act_fn="swish"),
    lambda: SparseConfig(bigram="dense"),
    lambda: SparsityConfig(anneal="cosine"),
    lambda: OptimConfig(grad_rms="never"),
    lambda: from_json(SparseConfig, path),
):
    try:
        print(call())
    except ValueError as error:
        print(f"ValueError: {error}")
"""


def test_a_choice_that_does_not_exist_is_an_error_that_names_option_and_value(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", WRONG_CHOICES],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=True,
    )
    found = run.stdout.splitlines()
    wanted = ["positions='rotary'", "act_fn='swish'", "bigram='dense'", "anneal='cosine'", "grad_rms='never'"]
    for line, name in zip(found, [*wanted, "positions='rotary'"], strict=True):
        assert line.startswith("ValueError: "), line
        assert name in line
    assert "config.json" in found[-1]


@settings(max_examples=50, deadline=None)
@given(
    options=st.fixed_dictionaries(
        {
            "n_layers": st.integers(1, 9),
            "d_model": st.integers(16, 512),
            "topk_locations": st.lists(st.sampled_from(TOPK_LOCATIONS), unique=True).map(tuple),
            "topk_fraction": st.floats(0.1, 1),
            "positions": st.sampled_from(["none", "learned"]),
            "sink": st.booleans(),
        }
    )
)
def test_json_round_trip(options: dict, tmp_path_factory: pytest.TempPathFactory) -> None:
    cfg, path = SparseConfig(**options), tmp_path_factory.getbasetemp() / "round_trip.json"
    to_json(cfg, path)
    assert from_json(SparseConfig, path) == cfg


def test_json_round_trip_of_unset_and_set_fractions(tmp_path: Path) -> None:
    for config in (SparsityConfig(), SparsityConfig(embed_fraction=1 / 3, min_per_neuron=4, anneal="linear")):
        to_json(config, tmp_path / "c.json")
        assert from_json(SparsityConfig, tmp_path / "c.json") == config


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"n_layers": 2, "n_layer": 3, "width": 1}', "unknown key n_layer, width"),
        ('{"n_layers": 2', "is damaged"),
        ("", "is damaged"),
        ("[1, 2]", "not a valid SparseConfig"),
        ('{"n_layers": 0}', "n_layers=0"),
        ('{"n_layers": "two"}', "not a valid SparseConfig"),
        ('{"topk_locations": null}', "not a valid SparseConfig"),
        ('{"n_layers": true}', "n_layers=True"),
        ('{"n_layers": 1000000000}', "n_layers=1000000000"),
        ('{"n_layers": 2, "n_layers": 3}', "'n_layers' twice"),
        ('{"embed_std": NaN}', "NaN is not finite"),
        ('{"embed_std": 1e999}', "1e999 is not finite"),
        ("[" * 100_000, "nested too deeply"),
        ("[" * 60 + "]" * 60, "nested deeper"),
    ],
)
def test_a_bad_config_file_is_an_error_that_names_the_file(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"config\.json") as error:
        from_json(SparseConfig, path)
    assert named in str(error.value)


def test_a_config_file_that_is_not_text_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"config\.json"):
        from_json(SparseConfig, path)


def test_a_missing_config_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere/config\.json"):
        from_json(SparseConfig, tmp_path / "nowhere" / "config.json")


def test_missing_keys_take_their_defaults() -> None:
    assert typed(SparseConfig, {"n_layers": 3}, "config", "") == SparseConfig(n_layers=3)

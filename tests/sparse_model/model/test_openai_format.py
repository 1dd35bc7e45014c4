"""OpenAI's checkpoint format: golden models, round trips, and every kind of broken folder."""

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparse_model.config import TOPK_LOCATIONS, SparseConfig
from sparse_model.model.openai_format import CONFIG, SAFE_WEIGHTS, WEIGHTS, from_openai, our_name, their_name, to_openai
from sparse_model.model.transformer import SparseTransformer

GOLDEN = Path(__file__).parents[2] / "data" / "openai_golden"
SMALL = SparseConfig(d_model=24, d_mlp=40, n_heads=3, d_head=8, n_ctx=12, d_vocab=30, positions="learned")


@pytest.mark.parametrize("name", ["cat_pos_emb", "sink_bigram"])
def test_golden_logits(name: str) -> None:
    expected = load_file(GOLDEN / name / "expected.safetensors")
    logits = from_openai(GOLDEN / name)(expected["tokens"].long())
    assert (logits - expected["logits"]).abs().max() < 1e-4


@pytest.mark.parametrize(
    "cfg",
    [
        SMALL,
        replace(SMALL, tied=True, bias=False, bigram="none"),
        replace(SMALL, positions="concat_learned", d_pos=4, sink=True, bigram="fixed"),
        replace(SMALL, positions="concat_sinusoidal", d_pos=6, act_fn="relu"),
        replace(SMALL, topk_locations=(*TOPK_LOCATIONS, "resid_post_attn", "resid_post_mlp")),
    ],
)
def test_round_trip_is_bit_identical(tmp_path: Path, cfg: SparseConfig) -> None:
    model = SparseTransformer(cfg)
    torch.nn.init.normal_(model.logits_bias)
    to_openai(model, tmp_path / "theirs")
    back = from_openai(tmp_path / "theirs")
    assert replace(back.cfg, embed_std=cfg.embed_std) == cfg
    for name, t in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], t), name
    tokens = torch.randint(30, (2, 9))
    assert torch.equal(back(tokens), model(tokens))
    keys = torch.load(tmp_path / "theirs" / WEIGHTS, weights_only=True).keys()
    assert {our_name(k) for k in keys} <= {*model.state_dict(), "pos_embed.weight"}
    assert all(their_name(our_name(k)) == k for k in keys)
    assert all(k.split(".")[0] in ("transformer", "lm_head", "bigram_table", "final_logits_bias") for k in keys)


def test_the_same_keys_in_safetensors_load_too(tmp_path: Path) -> None:
    folder = tmp_path / "safe"
    folder.mkdir()
    shutil.copy(GOLDEN / "sink_bigram" / CONFIG, folder)
    save_file(torch.load(GOLDEN / "sink_bigram" / WEIGHTS, weights_only=True), folder / SAFE_WEIGHTS)
    tokens = torch.randint(64, (2, 9))
    assert torch.equal(from_openai(folder)(tokens), from_openai(GOLDEN / "sink_bigram")(tokens))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / "sink_bigram", tmp_path / "model"))


def change_config(folder: Path, **fields: object) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_unknown_or_unsupported_fields_are_named(folder: Path) -> None:
    change_config(folder, rotary_dim=8)
    with pytest.raises(ValueError, match=r"beeg_config\.json: unknown field rotary_dim"):
        from_openai(folder)
    shutil.copy(GOLDEN / "sink_bigram" / CONFIG, folder)
    change_config(folder, rms_norm=False)
    with pytest.raises(ValueError, match="rms_norm=False"):
        from_openai(folder)
    (folder / CONFIG).write_text('{"n_layer": 2')
    with pytest.raises(ValueError, match=r"beeg_config\.json is damaged"):
        from_openai(folder)


def test_missing_misshaped_and_truncated_weights_are_named(folder: Path) -> None:
    path = folder / WEIGHTS
    state = torch.load(path, weights_only=True)
    torch.save({k: t for k, t in state.items() if "ln_f" not in k}, path)
    with pytest.raises(ValueError, match=r"final_model\.pt does not fit its config: missing ln_final\.weight"):
        from_openai(folder)
    torch.save(state | {"transformer.ln_f.weight": torch.ones(5)}, path)
    with pytest.raises(ValueError, match=r"d_model=32 in the config, 5 in these weights"):
        from_openai(folder)
    torch.save(state, path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"final_model\.pt is damaged, truncated"):
        from_openai(folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"final_model\.pt does not exist"):
        from_openai(folder)
    with pytest.raises(FileNotFoundError, match=r"beeg_config\.json does not exist"):
        from_openai(folder / "nowhere")


def test_a_pickle_with_code_is_refused_unrun(folder: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    (folder / WEIGHTS).write_bytes(pickle.dumps({"transformer.wte.weight": Bomb()}))
    with pytest.raises(ValueError, match="no plain state dict"):
        from_openai(folder)
    assert not (tmp_path / "exploded").exists()


def test_no_positions_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="use 'learned' with zeros"):
        to_openai(SparseTransformer(replace(SMALL, positions="none")), tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()

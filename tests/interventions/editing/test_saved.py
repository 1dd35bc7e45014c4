"""Handles on disk: they do the same when loaded, and only on the models they were saved for."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.helpers import make_tiny_run

from bridges.run_folder import save_trained
from interventions import Intervention, intervene, intervene_vector, load_dense, load_hf


def handles(dense, tokens: torch.Tensor) -> list[Intervention]:
    mask = torch.rand(2, 12) < 0.5
    return [
        intervene(dense, "pair", delta=3, positions=slice(2, -1), steps="prompt"),
        intervene(dense, {"pair": 1.0, "mlp.0.read.3": -2}, delta=torch.tensor([1.0, -3.0]), positions=[1, -2]),
        intervene(dense, "unembed.read.4", set_to=2.0, strength=0.5, where="stream", positions=mask),
        intervene(dense, "pair", toward=tokens.flip(1), strength=0.7, positions=-1),
        intervene_vector(dense, 1, torch.randn(2, 12, 16), where="stream"),
        intervene(dense, "pair", delta=1) + intervene_vector(dense, 3, torch.randn(16), strength=-2),
    ]


def test_a_saved_handle_does_the_same_in_another_process_s_model(
    dense, folder: Path, tokens: torch.Tensor, tmp_path: Path
) -> None:
    other, hf = load_dense(folder), load_hf(folder)
    plain = dense(tokens)
    for i, handle in enumerate(handles(dense, tokens)):
        path = tmp_path / f"handle{i}"
        handle.save(path)
        assert sorted(p.name for p in path.iterdir()) == ["intervention.json", "intervention.safetensors"]
        with handle:
            expected = dense(tokens)
        with Intervention.load(path, other):
            assert torch.equal(other(tokens), expected)
        with Intervention.load(path, hf):
            assert torch.allclose(hf(tokens).logits, expected, atol=1e-5)
        assert not torch.equal(expected, plain)
    handles(dense, tokens)[0].save(path)  # over an older one
    assert len(Intervention.load(path, other).edits) == 1
    settings = json.loads((path / "intervention.json").read_text())["edits"][0]
    assert (settings["reads"], settings["channel"]["indices"], settings["delta"]) == ("attn.1", [3, 11], 3)
    assert settings["units"] == "exact"
    assert not [p for p in tmp_path.iterdir() if p.suffix in (".tmp", ".old")]


def copy_run(folder: Path, target: Path, change) -> Path:
    """The run with one part of it changed."""
    make_tiny_run(target)
    run = load_dense(folder).bundle.run
    with torch.no_grad():
        change(run)
    run.dense.hf.save_pretrained(target / "dense")
    save_trained(target, run.sparse, run.bridges)
    return target


def test_another_model_is_refused_with_what_differs(dense, folder: Path, tmp_path: Path) -> None:
    intervene(dense, "pair", delta=3).save(tmp_path / "handle")

    def refused(model, reasons: str) -> None:
        with pytest.raises(ValueError, match=re.escape(f"was saved for other models: {reasons}. Load it onto")):
            Intervention.load(tmp_path / "handle", model)

    changes = {
        "the dense model's weights differ": lambda run: run.dense.hf.transformer.h[0].mlp.c_fc.weight[0, 0].add_(1),
        "the sparse model's weights differ": lambda run: run.sparse.blocks[0].attn.out.weight[0].add_(1),
        "the bridges differ": lambda run: run.bridges.decoders[4].weight[0, 0].add_(1),
    }
    for i, (reason, change) in enumerate(changes.items()):
        target = copy_run(folder, tmp_path / f"run{i}", change)
        refused(load_dense(target), reason)
        refused(load_hf(target), reason)
    same = copy_run(folder, tmp_path / "same", lambda run: None)
    assert Intervention.load(tmp_path / "handle", load_hf(same)).edits
    refused(load_hf(folder, dtype=torch.bfloat16), "the dense model is in float32 there, bfloat16 here")
    make_tiny_run(tmp_path / "deep", n_layers=3)
    refused(load_dense(tmp_path / "deep"), "; ".join(("2 layers there, 3 here", *changes)))


def test_saving_refuses_what_it_cannot_keep(dense, tmp_path: Path, tokens: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="positions is a callable, which cannot be saved"):
        intervene(dense, "pair", delta=3, positions=lambda t: t > 3).save(tmp_path / "handle")
    assert not list(tmp_path.iterdir())
    (tmp_path / "runs").mkdir()
    with pytest.raises(FileExistsError, match="is no saved intervention"):
        intervene(dense, "pair", delta=3).save(tmp_path / "runs")
    with pytest.raises(FileNotFoundError, match=r"intervention\.json does not exist"):
        Intervention.load(tmp_path / "nothing", dense)
    path = tmp_path / "handle"
    intervene(dense, "pair", toward=tokens).save(path)
    save_file(
        {k: v for k, v in load_file(path / "intervention.safetensors").items() if "toward" not in k}
        or {"x": torch.ones(1)},
        path / "intervention.safetensors",
    )
    with pytest.raises(ValueError, match="does not belong to the intervention"):
        Intervention.load(path, dense)
    (path / "intervention.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        Intervention.load(path, dense)

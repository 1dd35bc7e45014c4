"""A halved run: half the bytes, weights next to the old ones, every figure measured on what is stored."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.helpers import make_tiny_run

from bridges import evaluate, halve_run, open_run
from bridges.bridge import SCALES
from bridges.halving import round_weights
from bridges.pipeline import held_out_blocks
from interventions.cli.main import main
from interventions.sharing.packaging import save_pretrained
from sparse_model.data.prepare import prepare_corpus


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run and, by the command, the halved one."""
    folder = tmp_path_factory.mktemp("runs")
    make_tiny_run(folder / "run")
    main(["halve", "--run", str(folder / "run"), "--out", str(folder / "half")])
    return folder / "run", folder / "half"


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def test_it_takes_half_the_bytes_and_is_nearly_the_same(runs: tuple[Path, Path]) -> None:
    whole, half = (open_run(folder) for folder in runs)
    assert size(half.folder) < 0.52 * size(whole.folder)
    for part in ("dense", "sparse", "bridges"):
        old, new = getattr(whole, part).state_dict(), getattr(half, part).state_dict()
        for name, t in old.items():
            if name in SCALES:
                continue  # measured anew
            if name == "bigram":
                assert bool(((new[name] - t).abs() <= t.abs().amax(1, keepdim=True) / 127).all())
            else:
                torch.testing.assert_close(new[name], t, rtol=1e-3, atol=1e-6)
    stored = load_file(half.folder / "sparse" / "model.safetensors")
    assert {t.dtype for t in stored.values() if t.is_floating_point() and t.dim() == 1} == {torch.float16}


def test_its_figures_are_those_of_what_is_stored(runs: tuple[Path, Path]) -> None:
    half = open_run(runs[1])
    blocks = held_out_blocks(half.config, prepare_corpus(half.config, half.tokenizer, progress=False).val)
    again = evaluate(half.dense, half.sparse, half.bridges, blocks, progress=False)
    kept = json.loads((half.folder / "metrics.json").read_text())
    for part in ("dense", "sparse", "sites"):
        assert kept[part] == json.loads(json.dumps(again[part])), part


def test_it_is_shared_bit_for_bit(runs: tuple[Path, Path], tmp_path: Path) -> None:
    shared = open_run(save_pretrained(runs[1], tmp_path / "shared"))
    half = open_run(runs[1])
    for part in ("dense", "sparse", "bridges"):
        state = getattr(half, part).state_dict()
        for name, t in getattr(shared, part).state_dict().items():
            assert torch.equal(t.view(torch.int32), state[name].view(torch.int32)), name


def test_a_folder_that_holds_something_is_refused(runs: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty: name another folder for the halved run"):
        halve_run(runs[0], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_weights_beyond_half_precision_are_named() -> None:
    model = torch.nn.Linear(2, 2)
    with torch.no_grad():
        model.weight[0, 1] = 1e5
    with pytest.raises(ValueError, match=r"run/dense: weight cannot be halved: 1e\+05 is larger"):
        round_weights(model, "run/dense")

"""Bundles in the package: found by name, whole, small, and what they are said to be."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.helpers import HANG_SECONDS

from bridges.packaged import FOLDER, find_run, packaged_bundles
from bridges.run_folder import fingerprint
from interventions import intervene, load_dense, load_hf
from interventions.bundle.bundle import get_bundle
from interventions.circuits.circuit import load_circuit
from interventions.sharing.packaging import LARGEST_BUNDLE, package_run
from interventions.tasks.base import pair_accuracy
from interventions.tasks.catalogue import get_task


@pytest.fixture(scope="module")
def demo():
    return load_dense("demo")


def test_every_packaged_bundle_is_small_and_names_no_folder_of_the_machine_that_made_it() -> None:
    assert "demo" in packaged_bundles()
    for name in packaged_bundles():
        assert sum(path.stat().st_size for path in (FOLDER / name).rglob("*")) <= LARGEST_BUNDLE
        config = json.loads((FOLDER / name / "config.json").read_text())
        assert config["dense"] is None
        assert config["tokenizer"] is None


def test_load_dense_finds_the_bundle_from_any_folder(tmp_path: Path) -> None:
    code = "from interventions import load_dense; print(load_dense('demo').bundle.channels['quote_type'])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=HANG_SECONDS
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("quote_type: ")


def test_a_bare_name_is_the_bundle_and_a_path_is_a_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_run("demo") == FOLDER / "demo"
    assert not caplog.records
    shutil.copytree(folder, tmp_path / "demo")
    assert find_run("demo") == FOLDER / "demo"
    assert caplog.messages == [
        "demo is the bundle that comes with the package, not the folder here: write ./demo for that"
    ]
    for path in ("./demo", "demo/", Path("demo"), tmp_path / "demo"):
        assert find_run(path).resolve() == tmp_path / "demo"
    assert len(caplog.records) == 1
    shutil.copytree(folder, tmp_path / "mine")
    assert find_run("mine") == Path("mine")


def test_an_unknown_name_lists_the_bundles() -> None:
    with pytest.raises(FileNotFoundError, match=r"no run at nothing/here: .*packaged bundle \(.*demo"):
        load_dense("nothing/here")
    with pytest.raises(FileNotFoundError, match="packaged bundle"):
        load_hf("nothing/here")


def test_its_dense_model_solves_the_task_and_its_channel_flips_the_answer(demo) -> None:
    batch = get_task("single_double_quote", get_bundle(demo).run.tokenizer).sample(16, split="evaluation", seed=0)
    before = demo(batch.tokens.flatten(0, 1)).unflatten(0, (16, 2))
    assert pair_accuracy(before, batch) > 0.95
    tokens, other, last = batch.tokens[:, 1], batch.tokens[:, 0], batch.last
    rows = torch.arange(16)

    def wrong_answer() -> float:
        p = demo(tokens)[rows, last].softmax(-1)
        return p[rows, batch.answers[:, 0]].mean().item()

    assert wrong_answer() < 0.01
    with intervene(demo, channel="quote_type", toward=other):
        assert wrong_answer() > 0.5
    assert wrong_answer() < 0.01


def test_its_circuit_belongs_to_it(demo) -> None:
    run = get_bundle(demo).run
    assert load_circuit(run, "single_double_quote").fingerprint == fingerprint(run)


def test_load_hf_takes_it_too(demo) -> None:
    hf = load_hf("demo")
    tokens = demo.to_tokens('print("red cup')
    with intervene(hf, channel="quote_type", delta=-2), intervene(demo, channel="quote_type", delta=-2):
        assert (hf(tokens).logits - demo(tokens)).abs().max() < 1e-4


def test_packaging_a_run_copies_what_interventions_need(folder: Path, tmp_path: Path) -> None:
    (folder / "circuits" / "sizes").mkdir(parents=True)
    for name in ("a.json", "a.safetensors", "search.db", "sizes/b.json"):
        (folder / "circuits" / name).write_text(name)
    out = package_run(folder, tmp_path / "bundle")
    assert sorted(path.name for path in (out / "circuits").iterdir()) == ["a.json", "a.safetensors"]
    shutil.rmtree(folder / "circuits")
    tokens = torch.arange(8)[None]
    assert torch.equal(load_dense(out)(tokens), load_dense(folder)(tokens))
    assert get_bundle(load_dense(out)).identity() == get_bundle(load_dense(folder)).identity()


def test_packaging_refuses_what_would_not_work(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nameless = tmp_path / "nameless"
    shutil.copytree(folder, nameless)
    (nameless / "channels.json").unlink()
    with pytest.raises(ValueError, match="names no channel: run sparse-bridges find-channel"):
        package_run(nameless, tmp_path / "out")
    monkeypatch.setattr("interventions.sharing.packaging.LARGEST_BUNDLE", 1000)
    with pytest.raises(ValueError, match="a bundle at most"):
        package_run(folder, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_bundle_s_name_cannot_lead_out_of_the_package(folder: Path) -> None:
    from interventions.cli import package_bundle

    before = sorted(FOLDER.parent.iterdir())
    with pytest.raises(ValueError, match=r"name='\.\./demo': use letters, digits and _"):
        package_bundle.main(package_bundle.Options(run=str(folder), name="../demo"))
    assert sorted(FOLDER.parent.iterdir()) == before

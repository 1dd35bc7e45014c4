"""A bundle for others: through a folder and through a stand-in for the hub, whole or refused in one sentence."""

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save
from support.helpers import HANG_SECONDS, digests
from support.hub import Hub, local_hub

from bridges.bundle_format import FORMAT, check_format
from bridges.config import RunConfig
from bridges.packaged import FOLDER
from bridges.run_folder import fingerprint, open_run
from interventions import intervene, load_dense, load_hf, push_to_hub, save_pretrained
from interventions.bundle.bundle import get_bundle
from interventions.circuits.circuit import Circuit, load_circuit
from interventions.cli import push
from sparse_model.config import from_json, to_json

TOKENS = torch.arange(20, 32)[None]
OTHER = torch.arange(21, 33)[None]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.chdir(tmp_path)
    with local_hub(tmp_path / "cache", monkeypatch) as hub:
        yield hub


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """As on another machine."""
    caches = iter(range(9))
    return lambda: monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / f"cache{next(caches)}"))


def steered(dense, channel: str) -> torch.Tensor:
    with torch.no_grad(), intervene(dense, channel, toward=OTHER) + intervene(dense, channel, delta=0.5):
        return dense(TOKENS)


def refusal(kind: type[Exception], call: Callable[[], object]) -> str:
    """What an error says; one sentence."""
    with pytest.raises(kind) as error:
        call()
    said = str(error.value)
    assert "\n" not in said
    assert "Traceback" not in said
    return said


def test_a_folder_comes_back_with_logits_steering_and_circuits(tmp_path: Path) -> None:
    out = save_pretrained("demo", tmp_path / "bundle")
    assert json.loads((out / "bundle.json").read_text())["format"] == FORMAT
    before, after = load_dense("demo"), load_dense(out)
    assert torch.equal(before(TOKENS), after(TOKENS))
    assert torch.equal(steered(before, "quote_type"), steered(after, "quote_type"))
    assert get_bundle(before).channels == get_bundle(after).channels
    assert get_bundle(before).identity() == get_bundle(after).identity()
    run = get_bundle(after).run
    assert load_circuit(run, "single_double_quote").fingerprint == fingerprint(run)
    rewritten = dict.fromkeys(("bundle.json", "config.json", "digests.json", "README.md"), "")
    wanted = digests(FOLDER / "demo") | rewritten
    assert digests(out).keys() == wanted.keys()
    assert {name: d for name, d in digests(out).items() if wanted[name]} == {n: d for n, d in wanted.items() if d}
    save_pretrained("demo", out)  # over itself


def test_another_folder_is_not_replaced(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    said = refusal(FileExistsError, lambda: save_pretrained(folder, tmp_path))
    assert "holds something else than a bundle" in said
    assert refusal(FileExistsError, lambda: save_pretrained(folder, folder))  # a run is none
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_the_hub_gives_back_what_was_pushed(hub: Hub) -> None:
    url = push_to_hub("demo", "me/quotes", private=True)
    assert url.startswith(f"{hub.url}/me/quotes/commit/")
    assert hub.private == {"me/quotes"}
    before, after = load_dense("demo"), load_dense("me/quotes")
    assert torch.equal(before(TOKENS), after(TOKENS))
    assert torch.equal(steered(before, "quote_type"), steered(after, "quote_type"))
    plain = load_hf("me/quotes")
    with torch.no_grad(), intervene(plain, "quote_type", delta=-2), intervene(before, "quote_type", delta=-2):
        assert torch.allclose(plain(TOKENS).logits, before(TOKENS), atol=1e-4)


def test_a_second_push_leaves_nothing_of_the_first_and_a_revision_is_a_branch(
    folder: Path, hub: Hub, capsys: pytest.CaptureFixture
) -> None:
    push_to_hub("demo", "me/quotes")
    files = hub.files("me/quotes")
    assert files is not None
    first = hub.commit("me/quotes", "main", files | {"notes.txt": b"mine"})
    push.command(["--run", str(folder), "--to", "me/quotes", "--revision", "tiny"])
    assert "load_dense('me/quotes', revision='tiny')" in capsys.readouterr().out
    assert hub.refs["me/quotes"]["main"] == first
    found = hub.files("me/quotes", "tiny")
    assert found is not None
    assert found["notes.txt"] == b"mine"
    assert [name for name in found if name.startswith("circuits/")] == []
    tiny = load_dense("me/quotes", revision="tiny")
    assert torch.equal(tiny(TOKENS), load_dense(folder)(TOKENS))
    assert torch.equal(load_dense("me/quotes", revision=first)(TOKENS), load_dense("demo")(TOKENS))


def test_refused_pushes_change_nothing_on_the_hub(folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    said = refusal(OSError, lambda: push_to_hub(folder, "me/bundle", token="hf_wrong"))
    assert "cannot push" in said
    assert "hf auth login" in said
    assert hub.refs == {}
    assert "use owner/name" in refusal(OSError, lambda: push_to_hub(folder, "me/a/b"))
    push_to_hub("demo", "me/bundle")
    before = hub.files("me/bundle")
    hub.failing = "POST */commit/*"
    assert "give the same call again" in refusal(OSError, lambda: push_to_hub(folder, "me/bundle"))
    assert hub.files("me/bundle") == before
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "unset HF_HUB_OFFLINE" in refusal(OSError, lambda: push_to_hub(folder, "me/bundle"))


def test_what_the_hub_does_not_have_or_show_is_said(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for load in (load_dense, load_hf):
        said = refusal(FileNotFoundError, lambda load=load: load("me/nothing"))
        assert "no run at me/nothing" in said
        assert hub.url in said
    push_to_hub("demo", "me/quotes", private=True)
    said = refusal(FileNotFoundError, lambda: load_dense("me/quotes", revision="v9"))
    assert "no such revision" in said
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "hf auth login" in refusal(FileNotFoundError, lambda: load_dense("me/quotes"))


def test_a_download_that_breaks_off_is_not_used_and_goes_on_later(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, fresh_cache: Callable[[], None]
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    push_to_hub("demo", "me/quotes")
    hub.broken = "sparse/model.safetensors"
    said = refusal(OSError, lambda: load_dense("me/quotes"))
    assert "broke off" in said
    assert "give the same call again" in said
    with monkeypatch.context() as offline:
        offline.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        refusal(OSError, lambda: load_dense("me/quotes"))  # half of it is in the cache
    hub.broken = None
    assert torch.equal(load_dense("me/quotes")(TOKENS), load_dense("demo")(TOKENS))


def test_a_file_of_another_length_than_the_hub_says_is_refused(hub: Hub, tmp_path: Path) -> None:
    out = save_pretrained("demo", tmp_path / "bundle")
    weights = out / "bridges" / "bridges.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])  # cut before it was pushed
    hub.add_folder("me/cut", out)
    assert "bridges.safetensors" in refusal(ValueError, lambda: load_dense("me/cut"))


def test_nothing_but_weights_and_json_is_fetched_and_nothing_is_run(hub: Hub, tmp_path: Path) -> None:
    out = save_pretrained("demo", tmp_path / "bundle")
    trap = f"open({str(tmp_path / 'sprung')!r}, 'w')\nclass Trap: pass\n"
    for part in ("dense", "tokenizer", "sparse", "."):
        for name in ("modeling_trap.py", "pytorch_model.bin", "model.pkl", "conftest.py"):
            (out / part / name).write_text(trap)
    config = json.loads((out / "dense" / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "modeling_trap.Trap", "AutoModelForCausalLM": "modeling_trap.Trap"}
    (out / "dense" / "config.json").write_text(json.dumps(config))
    (out / "digests.json").unlink()  # otherwise the change is refused
    hub.add_folder("me/trap", out)
    for name in ("me/trap", out):
        assert torch.equal(load_dense(name)(TOKENS), load_dense("demo")(TOKENS))
        load_hf(name)
    assert not (tmp_path / "sprung").exists()
    fetched = [asked for asked in hub.asked if asked.startswith("GET") and "/resolve/" in asked]
    assert fetched
    assert not [asked for asked in fetched if asked.endswith((".py", ".bin", ".pkl"))]


def test_a_bundle_of_another_format_or_without_all_its_files_is_refused(folder: Path, tmp_path: Path) -> None:
    out = save_pretrained(folder, tmp_path / "bundle")
    stated = json.loads((out / "bundle.json").read_text())
    for version in (FORMAT + 1, 0, "1"):
        (out / "bundle.json").write_text(json.dumps(stated | {"format": version, "sparse-bridges": "9.9"}))
        for load in (load_dense, load_hf, open_run):
            said = refusal(ValueError, lambda load=load: load(out))
            assert f"of format {version!r}, written by sparse-bridges 9.9" in said
            assert "reads format 1" in said
    for damaged in ("{", "[]", '{"format": 1}', '{"format": 1, "files": [1]}'):
        (out / "bundle.json").write_text(damaged)
        said = refusal(ValueError, lambda: load_dense(out))
        assert "bundle.json is" in said
        assert said.endswith("download or copy the bundle again")
    (out / "bundle.json").write_text(json.dumps(stated))
    (out / "channels.json").unlink()
    for load in (load_dense, load_hf):
        assert "lacks channels.json" in refusal(FileNotFoundError, lambda load=load: load(out))


def test_the_packaged_bundles_state_their_format() -> None:
    for path in FOLDER.glob("*/config.json"):
        assert (path.parent / "bundle.json").is_file()
        check_format(path.parent)


@pytest.fixture
def run_of_hub_model(folder: Path, hub: Hub, tmp_path: Path) -> Path:
    """A run whose dense model came from the hub."""
    run = tmp_path / "run"
    shutil.copytree(folder, run)
    config = from_json(RunConfig, run / "config.json")
    (run / "config.json").unlink()
    to_json(dataclasses.replace(config, dense="someone/tiny"), run / "config.json")
    hub.add_folder("someone/tiny", run / "dense")
    return run


def moved(weights: bytes, tmp_path: Path) -> bytes:
    (tmp_path / "w").write_bytes(weights)
    tensors = load_file(tmp_path / "w")
    next(iter(tensors.values())).view(-1)[0] += 1e-3
    return save(tensors, {"format": "pt"})


def test_a_dense_model_by_reference_is_the_same_and_another_is_refused(
    run_of_hub_model: Path, hub: Hub, fresh_cache: Callable[[], None], tmp_path: Path
) -> None:
    push_to_hub(run_of_hub_model, "me/bundle", dense="reference")
    files = hub.files("me/bundle")
    assert files is not None
    reference = json.loads(files["dense/reference.json"])
    commit = hub.refs["someone/tiny"]["main"]
    assert (reference["name"], reference["revision"]) == ("someone/tiny", commit)
    assert [name for name in files if name.startswith("dense/")] == ["dense/reference.json"]
    assert b"base_model: someone/tiny" in files["README.md"]

    fresh_cache()
    hub.commit("someone/tiny", "main", {})  # what the name means moves on, the commit does not
    before, after = load_dense(run_of_hub_model), load_dense("me/bundle")
    assert torch.equal(before(TOKENS), after(TOKENS))
    assert torch.equal(steered(before, "pair"), steered(after, "pair"))
    half = load_hf("me/bundle", dtype=torch.bfloat16)
    assert torch.equal(half(TOKENS).logits, load_hf(run_of_hub_model, dtype=torch.bfloat16)(TOKENS).logits)
    save_pretrained("me/bundle", "whole")  # and the weights can come inside again
    assert torch.equal(load_dense("whole")(TOKENS), before(TOKENS))
    again = save_pretrained("me/bundle", "again", dense="reference")
    assert json.loads((again / "dense" / "reference.json").read_text()) == reference

    fresh_cache()
    source = hub.commits[commit]
    source["model.safetensors"] = moved(source["model.safetensors"], tmp_path)
    for load in (load_dense, load_hf):
        said = refusal(ValueError, lambda load=load: load("me/bundle"))
        assert f"someone/tiny at commit {commit} has weights of digest " in said
        assert reference["digest"] in said


def test_a_reference_to_what_others_would_not_find_is_refused(
    folder: Path, run_of_hub_model: Path, hub: Hub, tmp_path: Path
) -> None:
    said = refusal(ValueError, lambda: save_pretrained(folder, "out", dense="reference"))
    assert "was trained here" in said
    files = dict(hub.commits[hub.refs["someone/tiny"]["main"]])
    files["model.safetensors"] = moved(files["model.safetensors"], tmp_path)
    hub.commit("someone/tiny", "main", files)
    said = refusal(ValueError, lambda: save_pretrained(run_of_hub_model, "out", dense="reference"))
    assert "dense='inside'" in said
    assert not Path("out").exists()


def test_the_command_says_a_refusal_in_a_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "interventions.cli", "push", "--run", "demo", "--to", "me/quotes"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS)  # tests run offline
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot push demo to 'me/quotes'")
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_the_card_shows_the_run_s_figures_with_controls_and_names_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(FOLDER / "demo", run)
    path = run / "circuits" / "single_double_quote.json"
    circuit = json.loads(path.read_text())
    card = (save_pretrained(run, tmp_path / "bundle") / "README.md").read_text()
    metrics = json.loads((run / "metrics.json").read_text())
    for task, found in metrics["steering"].items():
        for n in (*found["channels"], "difference_of_means"):
            strength = found["chosen"][n]
            at = found["strength"].index(strength)
            title = "difference of means" if n == "difference_of_means" else f"{n} channel{'s' * (n != '1')}"
            curve = found["channels"].get(n, found["difference_of_means"])
            wanted = (
                f"| {title} | {strength:g} | {curve[0]:.3f} | {curve[at]:.3f} | {found['random_own_p95'][n][at]:.3f} |"
            )
            assert wanted in card.partition(f"### {task}")[2].partition("###")[0]
    assert f"| dense loss | {metrics['dense']['ce']:.3f} |" in card
    row = next(line for line in card.splitlines() if line.startswith("| single_double_quote | sparse |"))
    assert f"| {circuit['n_nodes']} | {circuit['n_edges']} | {circuit['loss']:.3f} |" in row
    assert "FAILED" not in row
    assert "UNCONTROLLED" not in row
    with monkeypatch.context() as failing:
        failing.setattr(Circuit, "failed", True)
        card = (save_pretrained(run, tmp_path / "bundle") / "README.md").read_text()
    assert "FAILED: misses its target loss" in card.partition("## Circuits")[2]
    path.write_text(json.dumps(circuit | {"controls": None}))
    card = (save_pretrained(run, tmp_path / "bundle") / "README.md").read_text()
    assert "UNCONTROLLED" in card.partition("## Circuits")[2]
    path.write_text("{")
    said = refusal(ValueError, lambda: save_pretrained(run, tmp_path / "other"))
    assert "single_double_quote.json" in said
    assert not (tmp_path / "other").exists()

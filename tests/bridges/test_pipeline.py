"""The commands that a user types, on the tiny preset, as processes of their own: one launched, the others forked."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.forks import Done, forking
from support.helpers import HANG_SECONDS, digests

ROOT = Path(__file__).parents[2]
TINY = ("train-bridge", "tiny")

Call = Callable[..., Done]
"""Runs sparse-bridges with arguments, or the `code` of a program."""


def signalled(name: str, *, after: str, calls: int) -> str:
    """The command, whose process gets a signal right after the n-th call of one of the trainer's methods."""
    return f"""
import os, runpy, signal, sys
from sparse_model.training.trainer import SparseTrainer
whole, calls = SparseTrainer.{after}, []
def method(self):
    found = whole(self)
    calls.append(1)
    if len(calls) == {calls}:
        os.kill(os.getpid(), signal.{name})
    return found
SparseTrainer.{after} = method
runpy.run_module("interventions.cli", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def call(cache: Path) -> Iterator[Call]:
    with forking() as forks:
        yield partial(forks.call, environment={"SPARSE_BRIDGES_CACHE": str(cache)})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A finished run of the tiny preset, made through accelerate launch."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    launch = [str(Path(sys.executable).parent / "accelerate"), "launch", "--num_processes", "1"]
    command = [*launch, "scripts/train_bridge.py", "tiny", "--run", str(folder)]
    environment = os.environ | {"SPARSE_BRIDGES_CACHE": str(cache), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.returncode == 0, done.stderr
    assert "d>s: from the dense model" in done.stdout
    return folder


def test_the_main_job_leaves_a_complete_run(tiny: Path, call: Call) -> None:
    refused = call("steer", "--run", str(tiny), "--channel", "no.such")
    assert refused.stderr.startswith("error: unknown channel 'no.such'"), refused.stderr
    files = digests(tiny)
    for name, *few in (
        ("find-channel", "--pairs", "8"),
        ("steer", "--pairs", "8", "--maps", "4", "--searches", "4", "--anyway"),
        ("report",),
    ):
        done = call(name, "--run", str(tiny), *few)
        assert done.returncode == 0, done.stderr
    parts = {"config.json", "identity.json", "digests.json", "dense", "sparse", "bridges", "tokenizer", "channels.json",
             "metrics.jsonl", "metrics.json", "report.html", "steering.png"}  # fmt: skip
    assert {p.name for p in tiny.iterdir()} == parts
    written = {name for name, found in digests(tiny).items() if found != files.get(name)}
    assert written == {"channels.json", "metrics.json", "report.html", "steering.png"}
    metrics = json.loads((tiny / "metrics.json").read_text())
    assert metrics["sparse"]["nonzero_fraction"] == pytest.approx(1 / 16, rel=0.01)
    assert metrics["sparse"]["ce"] < 5.5
    assert [s["site"] for s in metrics["sites"]] == [0, 1, 2, 3, 4]
    steering = metrics["steering"]["single_double_quote"]
    assert set(steering["channels"]) == {"1", "2", "4", "8"}
    lengths = [len(c) for c in steering["channels"].values()]
    lengths += [len(steering[n]) for n in ("strength", "random_mean", "random_p95", "difference_of_means")]
    # Tenths up to 1, and the strengths that the search chose.
    assert {i / 10 for i in range(11)} <= {round(strength, 9) for strength in steering["strength"]}
    assert set(lengths) == {len(steering["strength"])}
    assert steering["random_draws"] >= 50
    code = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    done = call(code=code.replace('"demo"', repr(str(tiny))))
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 3


def test_evaluate_repeats_the_runs_own_figures(tiny: Path, call: Call) -> None:
    before, files = json.loads((tiny / "metrics.json").read_text()), digests(tiny)
    done = call("evaluate", "--run", str(tiny))
    assert done.returncode == 0, done.stderr
    after = json.loads((tiny / "metrics.json").read_text())
    assert after["sites"] == before["sites"]
    assert after["dense"] == before["dense"]
    done = call("evaluate", "--run", str(tiny), "--tokens", "500")
    assert done.returncode == 0, done.stderr
    assert json.loads((tiny / "metrics.json").read_text())["sites"] != before["sites"]
    assert {name for name, found in digests(tiny).items() if found != files.get(name)} == {"metrics.json"}


def test_killed_and_resumed_run_ends_with_the_same_weights(tiny: Path, call: Call, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    killing = signalled("SIGKILL", after="save_checkpoint", calls=1)
    killed = call(*TINY, "--run", str(folder), code=killing)
    assert killed.returncode == -signal.SIGKILL
    assert (folder / "checkpoint").exists()
    refused = call(*TINY, "--run", str(folder))
    assert refused.returncode == 2
    assert "already holds a run: add --resume" in refused.stderr
    done = call(*TINY, "--run", str(folder), "--resume")
    assert done.returncode == 0, done.stderr
    assert "resuming at step" in done.stdout
    for part in ("sparse/model.safetensors", "bridges/bridges.safetensors", "dense/model.safetensors"):
        a, b = load_file(tiny / part), load_file(folder / part)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[n], b[n]) for n in a), part
    assert not (folder / "checkpoint").exists()


def test_sigterm_writes_a_checkpoint_and_the_sparse_trainer_resumes_bit_for_bit(call: Call, tmp_path: Path) -> None:
    settings = ["train-sparse", "tiny", "--steps", "300", "--checkpoint-every", "150"]
    stopping = signalled("SIGTERM", after="train_step", calls=7)
    stopped = call(*settings, "--run", str(tmp_path / "stopped"), code=stopping)
    assert stopped.returncode == 130
    assert "stopped at step 7; go on with --resume" in stopped.stderr
    log = tmp_path / "stopped" / "metrics.jsonl"
    resumed = call(*settings, "--run", str(tmp_path / "stopped"), "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming at step" in resumed.stdout
    assert call(*settings, "--run", str(tmp_path / "whole")).returncode == 0
    a, b = (load_file(tmp_path / name / "sparse" / "model.safetensors") for name in ("stopped", "whole"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[n], b[n]) for n in a)
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert [r["step"] for r in records if "val_ce" in r] == [150, 300]
    assert records[-1]["val_ce"] < records[0]["ce"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-preset"], "preset 'no-such-preset' is unknown: use one of demo, tiny"),
        (["tiny", "--dense", "./nowhere", "--tokenizer", "./nowhere"], "nowhere"),
        (["tiny", "--corpus", "./no-such-folder"], "no-such-folder"),
        (["tiny", "--sparsity.min-per-neuron", "40"], "--sparsity.min-per-neuron 40 needs"),
        (["tiny", "--sparse.topk-fraction", "3"], "--sparse.topk-fraction 3.0: must lie"),
        (["tiny", "--no-such-option", "3"], "no-such-option"),
    ],
)
def test_a_users_mistake_is_one_sentence(call: Call, tmp_path: Path, arguments: list[str], message: str) -> None:
    done = call(TINY[0], *arguments, "--run", str(tmp_path / "run"))
    assert done.returncode == 2
    assert message in " ".join(done.stderr.replace("│", " ").split())
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_mismatched_tokenizer_and_depth_are_refused(tiny: Path, call: Call, tmp_path: Path) -> None:
    dense = str(tiny / "dense")
    done = call(*TINY, "--dense", dense, "--sparse.n-layers", "3", "--run", str(tmp_path / "a"))
    assert done.returncode == 2
    assert "--sparse.n-layers 3: the dense model has 2 layers" in done.stderr
    other = tmp_path / "tokenizer"
    code = (
        "import random; from sparse_model.data.tokenizer import *\n"
        "from sparse_model.data.generated_python import generate_document\n"
        "r = random.Random(9); save_tokenizer(train_tokenizer([generate_document(r) for _ in range(300)], 300), "
        f"{str(other)!r})"
    )
    assert call(code=code).returncode == 0
    done = call(*TINY, "--dense", dense, "--tokenizer", str(other), "--run", str(tmp_path / "b"))
    assert done.returncode == 2
    assert "token ids would mean different text" in done.stderr


def test_importing_goes_one_way() -> None:
    """sparse_model <- bridges <- interventions <- scripts."""
    import ast

    order = ["sparse_model", "bridges", "interventions"]
    for level, package in enumerate(order):
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                above = {n.split(".")[0] for n in names} & {*order[level + 1 :], "scripts"}
                assert not above, f"{file} imports {above}"

"""A command that a command or a message names does, typed as it stands, what it says."""

import dataclasses
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest

from bridges.config import KEPT, PRESETS, RunConfig
from bridges.run_folder import open_run
from interventions.circuits.circuit import finding_command
from interventions.cli import find_circuit, solved_tasks
from interventions.cli.main import main
from interventions.cli.options import parse_run, say_next
from interventions.steering.result import Steering
from sparse_model.config import TrainConfig, to_json

SMALL = [
    "tiny",
    "--steps",
    "2",
    "--corpus-tokens",
    "4000",
    "--eval-tokens",
    "64",
    "--sparse.n-layers",
    "1",
    "--sparse.d-model",
    "16",
    "--sparse.d-mlp",
    "32",
    "--sparse.n-ctx",
    "24",
    "--sparsity.min-per-neuron",
    "0",
    "--dense-train.steps",
    "2",
    "--dense-train.d-model",
    "16",
]


def read(folder: Path, *arguments: str) -> RunConfig:
    return parse_run("train-bridge", None, ["--run", str(folder), *arguments], PRESETS).config


def next_command(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What was printed last, as a shell takes it apart."""
    said = re.findall(r"^next: sparse-bridges (.*)$", capsys.readouterr().out, re.M)
    assert len(said) == 1
    return shlex.split(said[0])


def test_resume_without_a_preset_takes_what_the_run_was_begun_with(tmp_path: Path) -> None:
    begun = dataclasses.replace(PRESETS["tiny"][1], steps=7, dense="./my-model", bigram_init="counts")
    demo = PRESETS["demo"][1]
    assert read(tmp_path, "--resume") == demo  # nothing is there: it begins
    to_json(begun, tmp_path / KEPT[1])
    assert read(tmp_path, "--resume") == begun
    assert read(tmp_path) == demo
    assert read(tmp_path, "--preset", "stdlib", "--resume") == PRESETS["stdlib"][1]
    to_json(dataclasses.replace(begun, steps=8), tmp_path / KEPT[0])
    assert read(tmp_path, "--resume") == dataclasses.replace(begun, steps=8)
    assert read(tmp_path, "--resume", "--steps", "9").steps == 9  # which the folder's check refuses


def test_a_training_of_another_kind_is_not_gone_on_with(tmp_path: Path) -> None:
    alone = {"tiny": ("", TrainConfig(steps=3))}
    to_json(TrainConfig(steps=3), tmp_path / "config.json")
    with pytest.raises(
        ValueError, match=rf"config\.json is not of train-bridge: .*train-sparse --run {tmp_path} --res"
    ):
        read(tmp_path, "--resume")
    arguments = ["--run", str(tmp_path), "--resume"]
    assert parse_run("train-sparse", None, arguments, alone).config == TrainConfig(steps=3)
    to_json(PRESETS["tiny"][1], tmp_path / "config.json")
    with pytest.raises(ValueError, match=r"config\.json is not of train-sparse: sparse-bridges train-bridge --run"):
        parse_run("train-sparse", None, arguments, alone)


def test_train_dense_names_what_goes_on_with_its_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "my run's"
    main(["train-dense", *SMALL, "--run", str(folder)])
    main(next_command(capsys))
    run = open_run(folder)
    assert (run.config.steps, run.sparse.n_layers, run.config) == (2, 1, read(folder, "--resume"))
    assert next_command(capsys) == ["find-channel", "--run", str(folder)]


def test_a_second_dense_training_keeps_the_settings_of_the_first(tmp_path: Path) -> None:
    main(["train-dense", *SMALL, "--run", str(tmp_path / "run")])
    first = (tmp_path / "run" / KEPT[1]).read_bytes()
    main(["train-dense", *SMALL, "--dense-train.steps", "3", "--run", str(tmp_path / "run")])
    assert (tmp_path / "run" / KEPT[1]).read_bytes() == first


def test_find_circuit_repeats_its_options(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(find_circuit, "main", lambda _: None)
    typed = ["--run", str(folder), "--task", "for_while", "--prompts", "natural", "--target-loss", "0.3"]
    find_circuit.command(typed)
    assert next_command(capsys) == ["find-circuit", *typed, "--controls"]
    find_circuit.command([*typed, "--controls"])
    assert next_command(capsys) == ["report", "--run", str(folder)]


@pytest.mark.parametrize("name", ["for_while", "for_while-natural", "./tasks/my_task.jsonl"])
def test_solved_tasks_names_a_task_that_find_channel_takes(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = solved_tasks.Options(runs=(str(folder),), tasks=("with_as", name))
    scores = {
        "with_as": {"dense": SimpleNamespace(solved=False)},
        Path(name).stem: {"dense": SimpleNamespace(solved=True)},
    }
    solved_tasks.say_next_steps(options, scores)
    assert next_command(capsys) == ["find-channel", "--run", str(folder), "--task", name]


def test_what_is_found_again_is_found_for_the_same_pairs() -> None:
    file = {"prompts": "file", "file": "my tasks/x.jsonl", "sha256": ""}
    words = ["sparse-bridges", "find-circuit", "--run", "a b", "--task", "my tasks/x.jsonl", "--model", "dense"]
    assert shlex.split(finding_command(Path("a b"), "x", "dense", file)) == words
    assert finding_command(Path("run"), "x", "sparse", {}) == "sparse-bridges find-circuit --run run --task x"
    metrics = {"steering": {"x": "damaged"}, "task_prompts": {"x": file}}
    with pytest.raises(ValueError, match=r"sparse-bridges steer --run 'a b' --task 'my tasks/x\.jsonl'$"):
        Steering.from_metrics(metrics, "x", Path("a b"))


def test_messages_name_folders_that_a_shell_would_take_apart(tmp_path: Path) -> None:
    folder = tmp_path / "my run's"
    for missing in (folder, tmp_path / "none here"):
        with pytest.raises(FileNotFoundError) as refused:
            open_run(missing)
        command = re.search(r"sparse-bridges (.*?)(?:, or name|$)", str(refused.value))
        assert command
        assert shlex.split(command[1])[:3] == ["train-bridge", "--run", str(missing)]
        folder.mkdir(exist_ok=True)


def test_the_next_command_runs_where_this_one_did(capsys: pytest.CaptureFixture[str]) -> None:
    say_next("steer", "--run", "runs/a b", device="cuda:1")
    say_next("steer", "--run", "runs/a", device="cpu")
    assert capsys.readouterr().out == (
        "next: sparse-bridges steer --run 'runs/a b' --device cuda:1\nnext: sparse-bridges steer --run runs/a\n"
    )

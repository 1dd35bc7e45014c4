"""The command line: every command explains itself at once, and a mistake is one sentence that names what was typed."""

import dataclasses
import fcntl
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from support.helpers import digests

from bridges.config import RunConfig
from bridges.packaged import FOLDER
from interventions.cli import options
from interventions.cli.main import COMMANDS, main, module_of, summary
from interventions.cli.options import as_typed
from interventions.tasks.names import TASK_NAMES

HEAVY = ("torch", "transformers", "transformer_lens", "gradio")
SOME = {
    "train-bridge": ("--device", "--dense", "--bridge.sites", "--sparse.d-model", "--resume", "stdlib"),
    "train-sparse": ("--device", "--sparsity.nonzero-fraction", "--text-field", "--trackers", "gpt2"),
    "train-dense": ("--device", "--dense-train.steps", "--run"),
    "evaluate": ("--device", "--run", "--tokens"),
    "push": ("--to", "--private", "--revision"),
    "find-channel": ("--device", "--from", "--name", "--prompts", "--site", *TASK_NAMES),
    "find-circuit": ("--device", "--controls", "--prompts", "--target-loss", "--start-from", *TASK_NAMES),
    "steer": ("--device", "--anyway", "--channel", "--prompts", "--sets", "--where", *TASK_NAMES),
    "compare-bases": ("--device", "--anyway", "--channel", "--kept", "--prompts", "--sizes", *TASK_NAMES),
    "check-task": ("--device", "--task", "--prompts", *TASK_NAMES),
    "solved-tasks": ("--device", "RUN", "--pairs", "--task", "--prompts"),
    "report": (
        "--device",
        "--run",
    ),
    "serve": ("--device", "--host", "--port"),
    "halve": ("--device", "--out"),
    "package-bundle": ("--name",),
}


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, output and errors of a command line."""
    code: object = 0
    try:
        main(arguments)
    except SystemExit as end:
        code = end.code
    assert isinstance(code, int)
    return code, *capsys.readouterr()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(capsys, command, "--help")
    assert code == 0
    assert f"usage: sparse-bridges {command}" in out
    words = re.findall(r"[\w.-]*\w", out)
    assert [option for option in SOME[command] if option not in words] == []


def test_the_list_of_commands_is_complete(capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(options.__file__).parent
    modules = {path.stem for path in folder.glob("*.py")} - {"__init__", "__main__", "main", "options", "dense_shape"}
    assert modules == set(map(module_of, COMMANDS)) == set(map(module_of, SOME))
    for arguments in ((), ("--help",), ("-h",)):
        code, out, _ = said(capsys, *arguments)
        assert code == 0
        for command in COMMANDS:
            assert f"  {command:15} {summary(command)}\n" in out
    assert said(capsys, "--version")[1].startswith("sparse-bridges 0.")


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_loads_no_model_library(command: str) -> None:
    code = (
        "import sys\nfrom interventions.cli.main import main\n"
        f"try:\n    main({[*command.split(), '--help']})\nexcept SystemExit:\n    pass\n"
        f"print(sorted(set({HEAVY}) & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_the_module_and_the_wrappers_are_the_command() -> None:
    root = Path(__file__).parents[3]
    for program in (["-m", "interventions.cli", "train-bridge"], ["scripts/train_bridge.py"]):
        done = subprocess.run([sys.executable, *program, "x"], cwd=root, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == "error: preset 'x' is unknown: use one of demo, tiny, stdlib, code, gpt2\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("evalu", "unknown command 'evalu': use one of train-bridge"),
        ("train-bridge tiny --corpus-tokens 0", "--corpus-tokens 0: must be at least 1"),
        ("train-bridge tiny --sparse.d-model 0", "--sparse.d-model 0: must be at least 1"),
        ("train-bridge tiny --bridge.weights.ce -1", "--bridge.weights.ce -1.0: must not be negative"),
        ("train-bridge tiny --sparsity.nonzero-fraction 2", "--sparsity.nonzero-fraction 2.0: must lie in (0, 1]"),
        ("train-sparse tiny --batch-size 0", "--batch-size 0: must be at least 1"),
        ("find-circuit --target-loss 0", "--target-loss 0.0: must be positive"),
        ("find-circuit --evaluation-pairs 0", "--evaluation-pairs 0: must be at least 1"),
        ("steer --task-pairs 0", "--task-pairs 0: must be at least 1"),
        ("steer --sets 3 3", "--sets ((3, 3),): a set needs channels, none of them twice"),
        ("solved-tasks runs/x --pairs 0", "--pairs 0: must be at least 1"),
        ("serve --port 70000", "--port 70000: use 0 to 65535"),
        ("evaluate --run no/such", "no run at no/such: train one with sparse-bridges train-bridge --run no/such"),
        ("check-task --run no/such --task for_while", "no run at no/such: train one"),
        (
            "check-task --run demo --task ./none.jsonl",
            "no task file at none.jsonl: give one of the twenty",
        ),
        (
            "check-task --run demo --task lambda_func --prompts natural",
            "task 'lambda_func' has no natural prompts",
        ),
        ("solved-tasks no/such", "no/such has neither dense/ nor sparse/"),
        ("solved-tasks no/such --task for_whil", "unknown task 'for_whil'; did you mean for_while"),
        ("find-channel --run no/such --task for_whil", "unknown task 'for_whil'; did you mean for_while"),
        ("find-circuit --run no/such --task for_whil", "unknown task 'for_whil'; did you mean for_while"),
        ("steer --run demo --out x --task for_whil", "unknown task 'for_whil'; did you mean for_while"),
        ("steer --run demo --out x --channel quote_typ", "unknown channel 'quote_typ': did you mean quote_type"),
        ("find-circuit --graphml /proc/none/x.graphml", "/proc/none/x.graphml cannot be written"),
        ("steer --run demo --out /proc/none", "/proc/none cannot be written"),
    ],
)
def test_a_mistake_is_one_sentence(arguments: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, errors = said(capsys, *arguments.split())
    assert (code, out) == (2, "")
    assert errors.startswith(f"error: {sentence}")
    assert len(errors.splitlines()) == 1


def test_options_are_named_as_they_are_typed(capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, "train-bridge", "--help")
    for message, typed in (
        ("row 3: no text; set text_field to a or b", "row 3: no text; set --text-field to a or b"),
        ("sparse.d_vocab=8: too few", "--sparse.d-vocab 8: too few"),
        ("d_vocab=8: too few", "--sparse.d-vocab 8: too few"),
        ("dense_train.d_model=8: no", "--dense-train.d-model 8: no"),
        ("spec='a:b' lacks", "--corpus 'a:b' lacks"),
        ("lr=0: must", "--optim.lr 0: must"),
        ("steps are steps, lr is lr", "steps are steps, lr is lr"),
        ("runs/text_field/x: no", "runs/text_field/x: no"),
        ("config.json is not a valid RunConfig: d_model=0: x", "config.json is not a valid RunConfig: d_model=0: x"),
    ):
        assert as_typed(message).startswith(typed)
    names = [field.name for field in dataclasses.fields(RunConfig)]
    assert as_typed(f"{names[1]}=1") == "--corpus 1"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """The packaged bundle as a run of one's own."""
    shutil.copytree(FOLDER / "demo", tmp_path / "run")
    return tmp_path / "run"


def test_what_cannot_be_steered_is_said_first(bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("the experiment was begun")

    monkeypatch.setattr("interventions.steering.steer.steer", never)
    monkeypatch.setattr("interventions.finding.channel_search.channel_by_steering", never)
    run = ("--run", str(bundle))
    assert "unknown channel 'no.such'" in said(capsys, "steer", *run, "--channel", "no.such")[2]
    with pytest.raises(AssertionError, match="was begun"):
        main(["steer", *run])
    monkeypatch.setattr("interventions.circuits.task_scores.SOLVED", 1.01)  # the bundle solves them all
    code, _, errors = said(capsys, "steer", *run)
    assert code == 2
    assert "of the task's pairs right, a task counts as solved from 101%" in errors
    assert errors.rstrip().endswith("or add --anyway")
    with pytest.raises(AssertionError, match="was begun"):
        main(["steer", *run, "--anyway"])
    assert "part of the package" in said(capsys, "steer", "--run", "demo")[2]
    assert "part of the package" in said(capsys, "compare-bases", "--run", "demo")[2]
    assert "a task counts as solved" in said(capsys, "compare-bases", *run)[2]
    assert "unknown channel 'no.such'" in said(capsys, "compare-bases", *run, "--channel", "no.such")[2]
    assert "--kept (8, 2): give whole numbers from 1 on" in said(capsys, "compare-bases", *run, "--kept", "8", "2")[2]
    assert "--kept (): give at least one" in said(capsys, "compare-bases", *run, "--kept")[2]
    assert "at most 16" in said(capsys, "compare-bases", *run, "--sizes", "1", "17")[2]
    (bundle / "bundle.json").unlink()  # the list of a bundle's files; a run of one's own has none
    shutil.rmtree(bundle / "bridges")
    for command in ("steer", "find-channel", "find-circuit", "evaluate", "report"):
        assert f"error: {bundle} has no bridges" in said(capsys, command, *run)[2], command


@pytest.mark.parametrize("command", ["evaluate", "find-channel", "find-circuit", "steer", "report", "solved-tasks"])
def test_a_device_that_is_not_there_is_said(command: str, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = [str(bundle)] if command == "solved-tasks" else ["--run", str(bundle)]
    before = digests(bundle)
    code, _, errors = said(capsys, command, *run, "--device", "gpu")
    assert (code, digests(bundle)) == (2, before)
    assert errors.startswith("error: --device gpu: torch knows no such device, use cpu")


@pytest.mark.parametrize("command", ["train-bridge", "train-sparse", "train-dense"])
def test_a_training_says_so_too(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, errors = said(capsys, command, "tiny", "--run", str(tmp_path / "run"), "--device", "meta")
    assert (code, list(tmp_path.iterdir())) == (2, [])
    assert errors.startswith("error: --device meta: nothing here was tried on it, use cpu")


def test_a_folder_without_bridges_says_what_makes_them(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part in ("bridges", "dense"):
        shutil.rmtree(bundle / part)
    assert said(capsys, "evaluate", "--run", str(bundle))[2].startswith(
        f"error: {bundle} has a sparse model that was trained alone, without bridges: train one with a dense model by"
    )
    (bundle / "sparse").rename(bundle / "dense")
    (bundle / "config.json").unlink()
    remedy = f"sparse-bridges train-bridge --run {bundle} --resume goes on with it"
    sentence = f"error: {bundle} has a dense model and no bridges: {remedy}\n"
    assert said(capsys, "evaluate", "--run", str(bundle))[2] == sentence


def test_what_the_library_logs_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with options.report_errors():
        logging.getLogger("bridges.pipeline").info("resuming at step %d", 3)
        logging.getLogger("interventions.anything").warning("little")
        logging.getLogger("torch").info("not ours")
    assert capsys.readouterr() == ("resuming at step 3\n", "warning: little\n")


def test_library_code_does_not_print() -> None:
    root = Path(options.__file__).parents[2]
    found = [
        str(file)
        for package in ("sparse_model", "bridges", "interventions")
        for file in (root / package).rglob("*.py")
        if "print(" in file.read_text().replace("fingerprint(", "") and file.parent != Path(options.__file__).parent
    ]
    assert found == []


def test_solved_tasks_prints_and_keeps_what_the_call_gives(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from interventions import solved_tasks

    assert said(capsys, "solved-tasks", str(bundle), "--pairs", "4", "--no-floors")[0] == 0
    kept = json.loads((bundle / "metrics.json").read_text())["tasks"]
    called = solved_tasks(bundle, pairs=4)
    assert list(kept) == list(called) == list(TASK_NAMES)
    for name, scores in called.items():
        plain = {"unsupported": scores} if isinstance(scores, str) else {k: s._asdict() for k, s in scores.items()}
        assert {label: kept[name][label] for label in plain} == plain


def test_each_module_holds_one_command() -> None:
    for command in COMMANDS:
        assert callable(import_module(f"interventions.cli.{module_of(command)}").command)


@pytest.mark.parametrize(
    "command",
    [
        ("evaluate", "--run", "RUN"),
        ("find-channel", "--run", "RUN"),
        ("find-circuit", "--run", "RUN"),
        ("steer", "--run", "RUN"),
        ("steer", "--run", "demo", "--out", "RUN"),
        ("solved-tasks", "RUN"),
        ("report", "--run", "RUN"),
        ("train-bridge", "tiny", "--run", "RUN"),
        ("train-sparse", "tiny", "--run", "RUN"),
        ("train-dense", "tiny", "--run", "RUN"),
    ],
)
def test_whoever_comes_second_is_told_who_is_first(
    command: tuple[str, ...], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "empty" if command[0].startswith("train") else folder
    run.mkdir(exist_ok=True)
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("process 7 on elsewhere (train-bridge)")
        lock.flush()
        before = digests(run)
        code, _, err = said(capsys, *(str(run) if word == "RUN" else word for word in command))
    assert (code, digests(run)) == (2, before)
    assert err.splitlines()[-1] == (
        f"error: {run} is in use by process 7 on elsewhere (train-bridge): wait for it, or stop it"
    )
    (run / ".lock").unlink()


def test_a_signal_is_one_sentence_and_another_exit_code(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = digests(folder)
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name)
        monkeypatch.setattr("bridges.pipeline.evaluate", lambda *_, number=number, **__: os.kill(os.getpid(), number))
        code, _, err = said(capsys, "evaluate", "--run", str(folder))
        assert code == 130
        assert err.splitlines()[-1].startswith(f"error: stopped by {name}: what this command had not yet saved is lost")
        assert digests(folder) == before

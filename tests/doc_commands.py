"""Every command line of the pages, and of the programs' own help, run as it is written but cut down by options.

    python tests/doc_commands.py                          # all: a quarter of an hour of one core
    python tests/doc_commands.py --only docs/circuits.md  # places that begin so
    python tests/doc_commands.py --every 12               # a spread of those that take seconds
    python tests/doc_commands.py --list                   # what each is cut down to, or why it is not run

RULES (`support.doc_rules`) says what each kind of command is cut down to, NOT_RUN what is left out and why. The
commands of a page run in order in a folder of its own, with `./my-model`, `./my-code` and what else pages name, all
small and real. A run that a command reads is a copy of the packaged bundle; one that a command trains must be new,
and is removed again, since there is nothing to look at after three steps. Before a --resume the same command is
started without it and killed. Names on the hub are those of the stand-in. A command is right when it ends with 0 and
prints no traceback.
"""

import argparse
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "agg"}
ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import pytest  # noqa: E402
from support.doc_rules import NOT_RUN, RULES, TRAINS  # noqa: E402
from support.hub import local_hub  # noqa: E402
from support.pages import Line, command_lines  # noqa: E402
from support.scratch import alone, furnish, furnish_hub, has_run, make_sparse_run, provide  # noqa: E402

BIN = Path(sys.executable).parent
HEAVY = "bridges.pipeline interventions.bases.compare interventions.steering.steer interventions.report.page"
"""What is imported before the commands are forked; most of what they need comes with it."""

OWN_PROCESS = r"accelerate |torchrun |python (?:scripts/bench/gpu|tests/)"
"""What starts processes itself is one; everything else runs in a fork of this one, which has imported all there is."""


def reason(line: Line) -> str:
    """Why a line is not run; empty where it is."""
    command = shlex.join(line.words)
    found = next((why for kind, why in NOT_RUN.items() if re.match(kind, command)), "")
    return found or ("a loop's repetition of a line that is run" if line.again else "")


def cut(line: Line) -> list[list[str]] | None:
    """The commands that are run for a line; None where no rule says how it is run."""
    command = shlex.join(line.words)
    if command == "make demo":
        return [words for recipe in recipes("demo") for words in cut(recipe) or []]
    kept = r"sparse-bridges (?:--help|push|report)|python scripts/studies/(?:summary|compare_channels|steering_study)"
    matching = [rule for rule in RULES if re.match(rule.kind, command)]
    if not matching and not re.match(f"{kept}|.* --help", command):
        return None
    for rule in RULES:
        if re.match(rule.kind, command):
            command = f"{command} {rule.change}" if isinstance(rule.change, str) else rule.change(command)
    return [shlex.split(command)]


def recipes(target: str) -> list[Line]:
    """The commands of a make target."""
    command = ["make", "--dry-run", "--old-file", "setup", target]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = [line.replace(".venv/bin/", "") for line in done.stdout.splitlines() if not line.startswith("echo")]
    return [Line("Makefile", {}, shlex.split(line), False) for line in lines]


class Outcome(NamedTuple):
    """What a command did."""

    right: bool
    seconds: float
    """Of the processor, all its processes together."""
    said: str


class Folder:
    """The folder of a page, where its commands run."""

    def __init__(self, base: Path, hub: str) -> None:
        self.place = Path(tempfile.mkdtemp(dir=base))
        self.environment = {
            "SPARSE_BRIDGES_CACHE": str(base / "cache"),
            "PYTHONPATH": str(ROOT),
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "HF_ENDPOINT": hub,
            "ACCELERATE_USE_CPU": "true",
        }
        furnish(self.place)

    def run(self, words: list[str]) -> Outcome:
        """Run a command, with what it takes for granted made ready."""
        before = os.times()
        trained = trained_folder(words)
        if trained is not None:
            shutil.rmtree(self.place / trained, ignore_errors=True)
            if "--resume" in words and not re.match(OWN_PROCESS, shlex.join(words)):
                self.begin([word for word in words if word != "--resume"], self.place / trained)
        for run, fraction in alone(words):
            if not (self.place / run).exists():
                make_sparse_run(self.place / run, fraction)
        provide(self.place, words, trained)
        code, said = self.wait(self.start(words), serves=words[:2] == ["sparse-bridges", "serve"])
        after = os.times()
        if trained is not None and code == 0 and "--help" not in words and not has_run(self.place / trained):
            code, said = 1, f"{said}\n{trained} was not made"
        shutil.rmtree(self.place / (trained or "no-run"), ignore_errors=True)
        seconds = after.children_user - before.children_user + after.children_system - before.children_system
        return Outcome(code == 0 and "Traceback" not in said, seconds, said)

    def begin(self, words: list[str], folder: Path) -> None:
        """Start a training and kill it once it has a checkpoint."""
        child = self.start(words)
        while not list(folder.glob("checkpoint/*")) and not ended(child):
            time.sleep(0.01)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)

    def start(self, words: list[str]) -> int:
        """The command in a forked process; returns its id."""
        sys.stdout.flush()
        child = os.fork()
        if child:
            return child
        code: Any = 1
        try:
            said = os.open(self.place / ".said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(said, 1)
            os.dup2(said, 2)
            os.chdir(self.place)
            os.environ |= self.environment
            run_words(words)
            code = 0
        except SystemExit as end:
            code = 0 if end.code is None else end.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code if isinstance(code, int) else 1)

    def wait(self, child: int, *, serves: bool) -> tuple[int, str]:
        """The exit code and the output; what serves is ended by Ctrl-C once it says where."""
        said = self.place / ".said"
        if serves:
            while not (said.exists() and " is served at " in said.read_text()) and not ended(child):
                time.sleep(0.05)
            time.sleep(0.5)  # the server takes the signals over
            os.kill(child, signal.SIGINT)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return code, said.read_text(errors="replace")


def ended(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def run_words(words: list[str]) -> None:
    """What a shell would do with a command, in this process where it can be."""
    if re.match(OWN_PROCESS, shlex.join(words)):
        os.environ["HF_HUB_OFFLINE"] = "0"
        program = [sys.executable, *words[1:]] if words[0] == "python" else words
        os.execvp(program[0], program)
    if words[0] == "sparse-bridges":
        from interventions.cli.main import main

        main(words[1:])
    else:
        script = ROOT / words[1]
        sys.argv, sys.path[0] = words[1:], str(script.parent)
        runpy.run_path(str(script), run_name="__main__")


def trained_folder(words: list[str]) -> str | None:
    """The run that a command trains."""
    command = shlex.join(words)
    if not re.match(TRAINS, command):
        return None
    found = re.search(r"--run (\S+)", command)
    preset = re.search(r"train[-_]\w+(?:\.py)? (\w+)", command)
    return found[1] if found else f"runs/{'sparse-' * ('train-sparse' in command)}{preset[1] if preset else 'demo'}"


def chosen(options: argparse.Namespace) -> list[Line]:
    """The lines that are asked for."""
    lines = [line for line in command_lines() if line.place.startswith(options.only)]
    if not options.every:
        return lines
    heavy = f"{OWN_PROCESS}|make|.* (?:--controls|natural)"
    light = [line for line in lines if not reason(line) and not re.match(heavy, shlex.join(line.words))]
    return light[options.first :: options.every]


def try_all(lines: list[Line]) -> dict[str, int]:
    """Run the lines, say of each whether it is right; returns how many were, were not, and were not run by reason."""
    for name in HEAVY.split():
        import_module(name)
    counts: dict[str, int] = {"right": 0, "WRONG": 0}
    page, folder = "", None
    with (
        tempfile.TemporaryDirectory() as base,
        pytest.MonkeyPatch.context() as patch,
        local_hub(Path(base) / "hub", patch) as hub,
    ):
        furnish_hub(hub)
        for line in lines:
            if why := reason(line):
                counts[f"not run: {why}"] = counts.get(f"not run: {why}", 0) + 1
                continue
            if line.page != page or folder is None:
                page, folder = line.page, Folder(Path(base), hub.url)
            commands = cut(line)
            if commands is None:
                raise ValueError(f"{line.place}: no rule says how {shlex.join(line.words)} is run")
            for words in commands:
                outcome = folder.run(words)
                verdict = "right" if outcome.right else "WRONG"
                counts[verdict] += 1
                print(f"{line.place}: {verdict}, {outcome.seconds:.1f} s: {shlex.join(words)}", flush=True)
                if not outcome.right:
                    print("    " + "\n    ".join(outcome.said.splitlines()[-25:]), flush=True)
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="places that begin so, such as docs/circuits.md:7")
    parser.add_argument("--every", type=int, default=0, help="each n-th of those that take seconds")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--list", action="store_true", help="run nothing")
    options = parser.parse_args()
    lines = chosen(options)
    if options.list:
        for line in lines:
            parts = [f"not run: {reason(line)}"] if reason(line) else map(shlex.join, cut(line) or [["no", "rule"]])
            print(f"{line.place}: {shlex.join(line.words)}\n    " + "\n    ".join(parts))
        return 0
    counts = try_all(lines)
    for what, count in counts.items():
        print(f"{count:4} {what}")
    return bool(counts["WRONG"])


if __name__ == "__main__":
    sys.exit(main())

"""Commands as processes of their own, forked from one that has imported what takes each of them seconds otherwise.

As a program it is that process: for every line of JSON on standard input it forks, and answers with the exit code.
"""

import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
_MODULES = (
    "bridges.pipeline",
    "interventions.cli.train_bridge",
    "interventions.finding.channel_search",
    "interventions.report.page",
    "interventions.steering.steer",
    "sparse_model.training.pretrain",
)


class Done(NamedTuple):
    """A command that has ended."""

    returncode: int
    """Negative: the signal that ended it."""
    stdout: str
    stderr: str


class Forks:
    """What starts commands in the clone's folder; they see no variable that is set later, except those given."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process: Any = subprocess.Popen([sys.executable, __file__], cwd=ROOT, env=environment, **pipes)

    def call(self, *arguments: str, code: str = "", environment: Mapping[str, str]) -> Done:
        """Run sparse-bridges with arguments, or the code of a program with them."""
        with tempfile.TemporaryDirectory() as folder:
            request = [folder, code, list(arguments), dict(environment)]
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
            assert answer, "the process that forks has died"
            return Done(int(answer), *((Path(folder) / name).read_text() for name in ("stdout", "stderr")))

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


@contextmanager
def forking() -> Iterator[Forks]:
    forks = Forks()
    try:
        yield forks
    finally:
        forks.close()


def serve() -> None:
    """Answer requests until there are no more."""
    for module in _MODULES:
        import_module(module)
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        child = os.fork()
        if not child:
            run(*json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)


def run(folder: str, code: str, arguments: list[str], environment: dict[str, str]) -> None:
    """The child: never returns."""
    status: Any = 1
    try:
        for number, name in ((0, os.devnull), (1, f"{folder}/stdout"), (2, f"{folder}/stderr")):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
        os.environ |= environment
        sys.argv = ["sparse-bridges", *arguments]
        if code:
            exec(code, {"__name__": "__main__"})
        else:
            runpy.run_module("interventions.cli", run_name="__main__")
        status = 0
    except SystemExit as end:
        status = 0 if end.code is None else end.code
        if isinstance(status, str):
            print(status, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)


if __name__ == "__main__":
    serve()

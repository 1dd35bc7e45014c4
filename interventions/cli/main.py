"""The command `sparse-bridges`: explain and steer a dense language model through a weight-sparse transformer.

Only the module of the command that is asked for is imported, and what it computes with once its options are parsed, so
that a list or a mistake comes at once.
"""

import ast
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from interventions.cli.options import report_errors
from sparse_model.version import __version__

COMMANDS = (
    "train-bridge",
    "train-sparse",
    "train-dense",
    "evaluate",
    "find-channel",
    "find-circuit",
    "steer",
    "compare-bases",
    "check-task",
    "solved-tasks",
    "report",
    "serve",
    "halve",
    "push",
    "package-bundle",
)


def module_of(command: str) -> str:
    """The name of the module in this package that holds a command."""
    return command.replace("-", "_")


def summary(command: str) -> str:
    """The first line of a command's docstring, read without importing it."""
    source = Path(__file__).with_name(f"{module_of(command)}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").splitlines()[0]


def overview() -> str:
    """What `sparse-bridges --help` prints."""
    lines = [f"  {command:15} {summary(command)}" for command in COMMANDS]
    return "\n".join(
        [
            "usage: sparse-bridges COMMAND [OPTIONS]",
            "",
            "Explain and steer a dense language model through a weight-sparse transformer.",
            "",
            "commands (each explains its options with --help):",
            *lines,
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command line; a mistake ends the process with one sentence and exit code 2."""
    command, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    with report_errors():
        if command in ("-h", "--help"):
            print(overview())
        elif command == "--version":
            print(f"sparse-bridges {__version__}")
        elif command not in COMMANDS:
            raise ValueError(f"unknown command {command!r}: use one of {', '.join(COMMANDS)}")
        else:
            import_module(f"interventions.cli.{module_of(command)}").command(rest)

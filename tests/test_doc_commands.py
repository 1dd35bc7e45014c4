"""A sample of `python tests/doc_commands.py`, and the commands that messages name."""

import ast
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import doc_commands
import pytest
from support.doc_rules import NOT_RUN
from support.pages import ROOT, Line, command_lines
from test_docs import parse

from interventions.cli import main
from sparse_model.io.commands import command_line

PACKAGES = ("sparse_model", "bridges", "interventions", "scripts")
VALUES = {"--prompts": "generated", "--model": "sparse", "--channel": "quote_type", "--task": "single_double_quote"}


@pytest.mark.slow
def test_a_sample_of_the_commands_of_the_pages_runs() -> None:
    command = [sys.executable, Path(doc_commands.__file__), "--every", "30", "--first", "13"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": right, ") >= 4, done.stdout


def test_every_command_of_the_pages_is_run_or_has_a_reason() -> None:
    lines = command_lines()
    assert [
        shlex.join(line.words) for line in lines if not doc_commands.reason(line) and not doc_commands.cut(line)
    ] == []
    assert len([line for line in lines if not line.again]) > 150
    for kind in NOT_RUN:
        assert any(re.match(kind, shlex.join(line.words)) for line in lines), f"no command is {kind}"
    assert doc_commands.cut(Line("README.md:1", {}, ["sparse-bridges", "new-command"], False)) is None


def test_torchrun_reads_no_option_of_ours() -> None:
    """On Python 3.11 and before it takes one that begins several of its own for an ambiguous one of its own."""
    for line in command_lines():
        if line.words[0] == "torchrun":
            assert "--" in line.words[: line.words.index("scripts/train_bridge.py")], line


class Named(ast.NodeVisitor):
    """The commands in a file's strings and calls, with something in place of what is filled in."""

    def __init__(self) -> None:
        self.found: list[list[str]] = []
        self.unquoted: list[str] = []
        """Into which something is filled that a shell may take apart."""

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Name) and node.func.id in ("say_next", "command_line"):
            words = [arg for arg in node.args if not isinstance(arg, ast.Starred)]
            if words and isinstance(words[0], ast.Constant):  # not of say_next itself
                self.found.append(filled([arg.value if isinstance(arg, ast.Constant) else "{}" for arg in words]))
        self.generic_visit(node)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        text = "".join(str(v.value) if isinstance(v, ast.Constant) else "{}" for v in node.values)
        self.text(text)
        self.unquoted += re.findall(r"sparse-bridges [a-z]+-?[a-z]+(?: --[a-z.-]+)* \{\}.*", text)
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str) and "\nExample" not in node.value:  # those are run
            self.text(node.value)

    def text(self, text: str) -> None:
        for match in re.finditer(r"sparse-bridges ([a-z]+-?[a-z]+)((?: (?:--[a-z.-]+|\{\}|[A-Z]+)(?![\w(]))*)", text):
            if match[1] in main.COMMANDS:
                self.found.append(filled([match[1], *match[2].replace(".", " ").split()]))


def filled(words: list[str]) -> list[str]:
    """The words with a value for each that is filled in when the command is printed."""
    before = ["", *words]
    values = [
        VALUES.get(last, "runs/demo" if last == "--run" else "demo") if word == "{}" or word.isupper() else word
        for last, word in zip(before, words, strict=False)
    ]
    needs = {"check-task": "--task", "push": "--to", "package-bundle": "--run"}.get(values[0])
    return values + ([needs, "name"] if needs and needs not in values else [])


@cache
def named() -> dict[str, Named]:
    """By file."""
    found = {}
    for file in sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        found[file.relative_to(ROOT).as_posix()] = visitor = Named()
        visitor.visit(ast.parse(file.read_text()))
    return found


def test_the_commands_that_messages_name_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    commands = [tuple(words) for file in named().values() for words in file.found]
    assert len(commands) > 35
    for words in set(commands):
        command, *options = words
        if command == "solved-tasks" and not options:
            options = ["runs/demo"]
        with monkeypatch.context() as patch:
            parse(f"sparse-bridges {command}", options, patch)


def test_messages_quote_what_they_fill_into_a_command() -> None:
    assert {file: visitor.unquoted for file, visitor in named().items() if visitor.unquoted} == {}
    templates = (ROOT / "interventions" / "report" / "templates").glob("*.jinja")
    assert [path.name for path in templates if re.search(r"sparse-bridges [a-z-]+ [^<]*\{\{", path.read_text())] == []
    assert command_line("steer", "--run", Path("my runs/it's")) == "sparse-bridges steer --run 'my runs/it'\"'\"'s'"

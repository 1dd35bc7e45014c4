"""The fenced blocks of the pages, and the command lines in them as a shell reads them."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from interventions.cli import main

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
PROGRAMS = [
    *sorted((ROOT / "scripts").rglob("*.py")),
    *(ROOT / "interventions" / "cli" / f"{main.module_of(command)}.py" for command in main.COMMANDS),
]
"""Programs whose docstrings have examples."""

FENCE = re.compile(r"^```(.*)$")
NOT_RUN = re.compile(r"<!--\s*not run:\s*(.+?)\s*-->")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


class Block(NamedTuple):
    """A fenced block."""

    page: Path
    line: int
    """Of its first line of code, counted from 0."""
    language: str
    code: str
    not_run: str
    """The reason, where an HTML comment `<!-- not run: reason -->` stands before the fence."""


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page."""
    lines, start, language, before = page.read_text().splitlines(), None, "", ""
    for number, line in enumerate(lines):
        fence = FENCE.match(line)
        if fence and start is None:
            start, language = number + 1, fence[1].strip()
        elif fence:
            assert start is not None
            reason = NOT_RUN.fullmatch(before.strip())
            yield Block(page, start, language, "\n".join(lines[start:number]), reason[1] if reason else "")
            start, before = None, ""
        elif start is None and line.strip():
            before = line
    assert start is None, f"{name_of(page)}: a block is not closed"


class Line(NamedTuple):
    """A command line, as the shell would start it."""

    place: str
    """Page and line."""
    env: dict[str, str]
    """Variables that stand before it."""
    words: list[str]
    again: bool
    """Whether a loop repeats it, with other values."""

    @property
    def page(self) -> str:
        return self.place.partition(":")[0]


FIRST = r"(?:[A-Z_]+=\S+ +)?(?:sparse-bridges|accelerate|torchrun|python|make|pip|pipx|git)(?= |$)"
"""How a command line begins."""
IS_COMMANDS = re.compile(rf"\s*(?:{FIRST}|for \w+ in )")
INLINE = re.compile(rf"`({FIRST}[^`]* --[^`]*)`")
"""Commands in a sentence, where they have options; others are names."""


def command_lines() -> list[Line]:
    """Every command line: of blocks, of sentences, and of the examples in the programs' docstrings, in order."""
    found = []
    for page in PAGES:
        texts = [
            (block.line, block.code)
            for block in blocks(page)
            if block.language in ("", "sh", "bash", "console") and IS_COMMANDS.match(block.code)
        ]
        bare = re.sub(r"^```.*?^```", lambda m: "\n" * m[0].count("\n"), page.read_text(), flags=re.M | re.S)
        texts += [(bare.count("\n", 0, m.start()), m[1].replace("\n", " ")) for m in INLINE.finditer(bare)]
        for line, code in sorted(texts):
            found += started(code, name_of(page), line)
    for program in PROGRAMS:
        docstring = ast.get_docstring(ast.parse(program.read_text())) or ""
        examples = "\n".join(line[4:] for line in docstring.splitlines() if IS_COMMANDS.match(line) and line[0] == " ")
        found += started(examples, name_of(program), 0)
    return found


def started(code: str, page: str, line: int) -> list[Line]:
    """What bash would start: without a PATH every program is one that it does not find."""
    names = sorted(set(re.findall(r"^\s*([A-Z_]+)=", code, re.M)))
    handler = (
        "command_not_found_handle() { printf '%s\\0' \"${BASH_LINENO[0]}\"; "
        f'for v in {" ".join(names)}; do printf "%s\\0" "$v=${{!v-}}"; done; '
        "printf '%s\\0' -- \"$@\" $'\\x1e'; }\n"
    )
    command = ["/bin/bash", "-c", f"PATH=/nowhere\n{handler}{code}"]
    done = subprocess.run(command, capture_output=True, text=True, env={})
    assert not done.stderr, f"{page}:{line + 1}: {done.stderr}"
    found: list[Line] = []
    for record in done.stdout.split("\x1e\0")[:-1]:
        number, *rest = record.split("\0")[:-1]
        at = rest.index("--")
        env = dict(variable.split("=", 1) for variable in rest[:at])
        place = f"{page}:{line + int(number) - 2}"
        again = any(one.place == place and one.words[:2] == rest[at + 1 : at + 3] for one in found)
        found.append(Line(place, env, rest[at + 1 :], again))
    return found

"""The documentation: its Python runs, its commands parse, its links lead somewhere, its notebook runs."""

import argparse
import ast
import importlib
import io
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import nbclient
import nbformat
import pytest
import tyro
from support.helpers import HANG_SECONDS
from support.hub import Hub, local_hub
from support.pages import DOCS, PAGES, PROGRAMS, ROOT, Block, blocks, name_of
from transformers import GPT2Config

import bridges
import interventions
import sparse_model
from bridges.packaged import FOLDER
from interventions.cli import main

NOTEBOOK = DOCS / "tutorial.ipynb"


def python_blocks(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.language == "python"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with what the pages take for granted: a finished run, a sparse model, a released checkpoint."""
    from sparse_model.config import SparseConfig
    from sparse_model.model.openai_format import to_openai
    from sparse_model.model.transformer import SparseTransformer

    folder = tmp_path_factory.mktemp("docs")
    shutil.copytree(FOLDER / "demo", folder / "runs" / "demo")
    shutil.copytree(FOLDER / "demo" / "sparse", folder / "runs" / "sparse" / "sparse")
    shape = SparseConfig(n_layers=1, d_model=32, d_mlp=64, n_heads=2, n_ctx=16, d_vocab=64, positions="learned")
    to_openai(SparseTransformer(shape), folder / "csp_yolo2")
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with local_hub(tmp_path, monkeypatch) as hub:
        yield hub


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)], ids=name_of)
def test_the_python_of_a_page_runs_in_order(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("SPARSE_BRIDGES_CACHE", str(folder / "cache"))
    monkeypatch.setenv("MPLBACKEND", "agg")
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in python_blocks(page):
        if not block.not_run:
            # Empty lines before it, so that an error names the line of the page.
            exec(compile("\n" * block.line + block.code, str(page), "exec"), namespace)


def test_blocks_are_left_out_only_for_a_reason_and_seldom() -> None:
    every = [block for page in PAGES for block in python_blocks(page)]
    left_out = [f"{name_of(block.page)}:{block.line}: {block.not_run}" for block in every if block.not_run]
    assert len(left_out) <= 2, left_out
    assert len(every) >= 20


class Command(NamedTuple):
    """A command line that calls `sparse-bridges`, or a program of the repository."""

    place: str
    program: str
    """ "sparse-bridges evaluate", or the path of a file."""
    arguments: list[str]


def commands() -> Iterator[Command]:
    """Every command line in the pages' shell blocks and in the docstrings of the programs themselves."""
    for page in PAGES:
        for block in blocks(page):
            if block.language in ("", "sh", "bash", "console"):
                yield from commands_in(block.code, f"{name_of(page)}:{block.line}")
    for program in PROGRAMS:
        docstring = ast.get_docstring(ast.parse(program.read_text())) or ""
        examples = "\n".join(line for line in docstring.splitlines() if line.startswith("    "))
        yield from commands_in(examples, name_of(program))


def commands_in(text: str, place: str) -> Iterator[Command]:
    for line in filter(PROGRAM.search, text.replace("\\\n", " ").splitlines()):
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
        lexer.whitespace_split = True  # and comments are left out
        # `for` loops, pipes and the like: each simple command by itself.
        for parted, simple in groupby(lexer, lambda word: set(word) <= set(";&|")):
            words = [] if parted else [re.sub(r"\$\w+", "0", word) for word in simple]
            at = next((i for i, word in enumerate(words) if PROGRAM.fullmatch(word)), None)
            if at is None:
                continue
            if words[at].endswith(".py"):
                yield Command(place, words[at], words[at + 1 :])
            elif words[at + 1].startswith("-"):
                yield Command(place, "sparse-bridges", words[at + 1 :])
            else:
                yield Command(place, f"sparse-bridges {words[at + 1]}", words[at + 2 :])


PROGRAM = re.compile(r"scripts/(?:\w+/)?\w+\.py|sparse-bridges(?= |$)|interventions\.cli")
COMMANDS = list(commands())


class _Parsed(BaseException):
    """Raised where a script would begin its work."""


def parse(program: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a program up to where its arguments are parsed."""
    real = tyro.cli

    def cli(*args: Any, **options: Any) -> None:
        real(*args, **options)
        raise _Parsed

    def parse_args(self: argparse.ArgumentParser, *args: Any) -> None:
        self.parse_known_args(*args)
        raise _Parsed

    monkeypatch.setattr(tyro, "cli", cli)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr("bridges.loading.read_config", lambda name: GPT2Config())  # of the models that pages name
    name, *words = [*program.split(), *arguments]
    monkeypatch.setattr(sys, "argv", [name, *words])
    said = io.StringIO()
    try:
        with redirect_stdout(said), redirect_stderr(said):
            if name.endswith(".py"):
                runpy.run_path(str(ROOT / name), run_name="__main__")
            else:
                main.main()
    except _Parsed:
        return
    except SystemExit:
        pytest.fail(f"{shlex.join([name, *words])}\n{said.getvalue()}")
    pytest.fail(f"{program} parses no arguments")


@pytest.mark.parametrize("program", sorted({command.program for command in COMMANDS} - {"sparse-bridges"}))
def test_command_lines_parse(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    places = [command.place for command in COMMANDS if command.program == program]
    assert program.startswith("sparse-bridges") or (ROOT / program).is_file(), places
    seen = set()
    for command in COMMANDS:
        if command.program == program and "--help" not in command.arguments and str(command.arguments) not in seen:
            seen.add(str(command.arguments))
            with monkeypatch.context() as patch:
                parse(program, command.arguments, patch)


def test_the_commands_that_are_checked_are_those_of_the_pages() -> None:
    """An unknown option or command is noticed, and no command line is overlooked."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(pytest.fail.Exception, match="no-such-option"):
        parse("sparse-bridges evaluate", ["--no-such-option"], patch)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(pytest.fail.Exception, match="unknown command 'evalu'"):
        parse("sparse-bridges evalu", [], patch)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(pytest.fail.Exception, match="no-such-preset"):
        parse("scripts/train_bridge.py", ["no-such-preset"], patch)
    fenced = [block.code for page in PAGES for block in blocks(page) if block.language != "python"]
    written = PROGRAM.findall(re.sub(r"#.*|'[^'\n]*'", "", "\n".join(fenced)))
    from_pages = [command for command in COMMANDS if command.place.partition(":")[0].endswith(".md")]
    assert len(from_pages) == len(written) > 60


LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """The ids of a page's headings, and of what the API pages describe."""
    text = without_blocks(page.read_text())
    slugs = (re.sub(r"[^\w\s-]", "", heading.lower()).strip() for heading in re.findall(r"^#+ (.+)$", text, re.M))
    return {re.sub(r"[\s-]+", "-", slug) for slug in slugs} | set(described(text))


def described(text: str) -> list[str]:
    return re.findall(r"^::: (\S+)$", text, re.M)


def without_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def check_links(page: Path, text: str) -> None:
    for target in LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            assert target.startswith("https://"), target  # not followed: the tests have no network
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{target} does not exist"
        if page.is_relative_to(DOCS):
            assert found.is_relative_to(DOCS), f"{target} is not part of the site"
        assert not anchor or anchor in anchors(found), f"{name_of(found)} has no heading {anchor}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_images_lead_somewhere(page: Path) -> None:
    check_links(page, without_blocks(page.read_text()))


def test_every_command_is_in_the_table_in_its_own_words() -> None:
    first_lines = {command: main.summary(command) for command in main.COMMANDS}
    for program in (ROOT / "scripts").glob("*/*.py"):
        docstring = ast.get_docstring(ast.parse(program.read_text()))
        assert docstring, program
        first_lines[f"{program.parent.name}/{program.name}"] = docstring.splitlines()[0]
    rows = re.findall(r"^\| `([\w/-]+(?:\.py)?)` \| (.+) \|$", (DOCS / "commands.md").read_text(), re.M)
    assert dict(rows) == first_lines, "docs/commands.md is not what the programs' docstrings say"
    assert len(rows) == len(first_lines)


def test_the_errors_that_are_explained_exist() -> None:
    packages = ("sparse_model", "bridges", "interventions")
    source = "".join(file.read_text() for package in packages for file in (ROOT / package).rglob("*.py"))
    table = (DOCS / "your_own.md").read_text().partition("| part of the message |")[2]
    parts = re.findall(r"^\| `([^`]+)`", table, re.M)
    assert len(parts) >= 10
    assert [part for part in parts if part not in source] == []


def test_the_api_pages_describe_what_exists_once_and_all_that_is_exported() -> None:
    names = [name for page in sorted((DOCS / "api").glob("*.md")) for name in described(page.read_text())]
    assert len(names) == len(set(names))
    found = [resolve_name(name) for name in names]
    assert [name for name, one in zip(names, found, strict=True) if not one.__doc__] == []
    for package in (sparse_model, bridges, interventions):
        exported = [name for name in package.__all__ if name != "__version__"]
        assert [name for name in exported if getattr(package, name) not in found] == []


def resolve_name(name: str) -> Any:
    """The module, or the member of a module, that a dotted path names."""
    module, _, member = name.rpartition(".")
    found = getattr(importlib.import_module(module), member, None)
    return importlib.import_module(name) if found is None else found


def notebook() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def test_the_notebook_is_kept_without_outputs() -> None:
    cells = notebook().cells
    assert [cell.id for cell in cells if cell.get("outputs") or cell.get("execution_count")] == []
    assert str(ROOT) not in NOTEBOOK.read_text()
    check_links(NOTEBOOK, "\n".join(cell.source for cell in cells if cell.cell_type == "markdown"))


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SPARSE_BRIDGES_CACHE", "IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")  # this environment's kernel, not one of the user's
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("MPLBACKEND", raising=False)
    tutorial = notebook()
    nbclient.NotebookClient(tutorial, timeout=HANG_SECONDS, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in tutorial.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    # A reader sees no warnings, and nothing of the machine.
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []
    assert str(ROOT) not in str(outputs)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built in strict mode; the notebook is not executed once more."""
    pytest.importorskip("mkdocs", reason="needs the documentation's tools: pip install -e '.[docs]'")
    site = tmp_path_factory.mktemp("site")
    environment = os.environ | {"DOCS_EXECUTE": "false", "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    return site


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 12
    loads = re.compile(r"<(?:script|img|iframe|link)\b[^>]*\b(?:src|href)=[\"']?(?:https?:)?//[^>]*>")
    for page in pages:
        outside = [tag for tag in loads.findall(page.read_text()) if 'rel="canonical"' not in tag]
        assert outside == [], page.name
        assert str(ROOT) not in page.read_text(), page.name
        assert 'class="mermaid"' not in page.read_text(), "mermaid is fetched from elsewhere"


def test_links_between_the_pages_of_the_site_lead_somewhere(site: Path) -> None:
    """mkdocs checks Markdown; here are the notebook's and the API's."""
    for page in site.rglob("*.html"):
        for target in re.findall(r'<a\b[^>]*\bhref="([^"#:]+)(?:#[^"]*)?"', page.read_text()):
            if not target.startswith("/"):  # those of 404.html
                assert (page.parent / target).exists(), f"{page.name}: {target}"

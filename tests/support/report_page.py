"""A report as the tests look at it, without a browser."""

import json
import re
from html import unescape
from html.parser import HTMLParser
from typing import Any, NamedTuple

import pytest

from bridges.run_folder import Run
from interventions.report.page import write_report


class Token(NamedTuple):
    """A coloured token of the report."""

    title: str
    text: str
    classes: str


class Page(HTMLParser):
    """The parts of a report that the tests look at."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        """By id or class; of several that share one, the last."""
        self.sections: dict[str, list[list[list[str]]]] = {}
        """All tables, by section of the page."""
        self.words: dict[str, str] = {}
        """All text, by section of the page."""
        self.examples: dict[str, list[list[Token]]] = {}
        """Coloured text, by section of the page."""
        self.text = ""
        self.raw: list[str] = []
        """Contents of script and style elements."""
        self._table = self._section = ""
        self._open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.tags.append((tag, named))
        self._open.append(tag)
        if tag == "table":
            self._table = named.get("id") or named.get("class") or f"table{len(self.tables)}"
            self.tables[self._table] = []
            self.sections.setdefault(self._section, []).append(self.tables[self._table])
        elif tag in ("section", "footer"):
            self._section = str(named["id"])
        elif tag == "tr":
            self.tables[self._table].append([])
        elif tag in ("td", "th"):
            self.tables[self._table][-1].append("")
        elif tag in ("script", "style"):
            self.raw.append("")
        elif tag == "pre" and named.get("class") == "tokens":
            self.examples.setdefault(self._section, []).append([])
        elif tag == "i" and "pre" in self._open:
            self.examples[self._section][-1].append(Token(named["title"] or "", "", named.get("class") or ""))

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._open[-1:] in (["script"], ["style"]):
            self.raw[-1] += data
            return
        self.text += data
        self.words[self._section] = self.words.get(self._section, "") + data
        if {"td", "th"} & set(self._open):
            self.tables[self._table][-1][-1] += data.strip()
        if self._open[-1:] == ["i"] and "pre" in self._open:
            example = self.examples[self._section][-1]
            last = example.pop()
            example.append(last._replace(text=last.text + data))

    @property
    def cards(self) -> dict[str, tuple[str, str]]:
        """Value and note of each key figure, by title."""
        found = re.findall(
            r'<div class="card"><span>(.*?)</span><b>(.*?)</b><span>(.*?)</span>'
            '<span class="scale">.*?</span></div>',
            self.html,
        )
        return {unescape(title): (unescape(value), unescape(note)) for title, value, note in found}

    @property
    def warnings(self) -> list[str]:
        """The sentences that a reader should know first."""
        found = re.search(r'<ul class="warnings".*?</ul>', self.html, re.DOTALL)
        items = re.findall("<li>(.*?)</li>", found[0], re.DOTALL) if found else []
        return [unescape(re.sub("</?code>", "`", one)) for one in items]

    @property
    def policy(self) -> dict[str, list[str]]:
        """The Content-Security-Policy: directives with their sources."""
        (given,) = [a["content"] for tag, a in self.tags if a.get("http-equiv") == "Content-Security-Policy"]
        return {name: sources for name, *sources in (part.split() for part in (given or "").split("; "))}

    @property
    def data(self) -> dict[str, Any]:
        """What the page's script draws. NaN would be no JSON."""
        (text,) = [raw for raw in self.raw if raw.startswith("{")]
        return json.loads(text, parse_constant=pytest.fail)


def page_of(run: Run) -> Page:
    return Page(write_report(run.folder).read_text(encoding="utf-8"))

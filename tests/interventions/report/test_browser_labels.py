"""Labels, pins and groups in a real browser (see test_browser.py): made, kept, downloaded, shown by the next report."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.browser import file_context, opened
from support.helpers import make_tiny_run
from support.report_runs import EVIL, TASK, circuit

from bridges.run_folder import Run
from interventions.circuits.circuit import load_circuit
from interventions.report.labels import label_path, read_labels
from interventions.report.page import write_report

READ, WRITE = "0.mlp.act_in.3", "0.attn.resid_delta.3"
Page = Any
"""playwright.sync_api.Page"""


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    yield from file_context(tmp_path_factory.mktemp("browser"))


@pytest.fixture(scope="module")
def run(context: Any, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = make_tiny_run(tmp_path_factory.mktemp("labels") / "run", n_layers=1)
    circuit(run)
    write_report(run.folder)
    return run


@pytest.fixture
def page(context: Any, run: Run) -> Iterator[Page]:
    for page in opened(context, run.folder / "report.html"):
        page.evaluate("localStorage.clear()")
        page.reload()
        yield page
        page.evaluate("localStorage.clear()")


def node(page: Page, name: str) -> Any:
    return page.locator(f'.node[data-node="{name}"]')


def write(page: Page, name: str, part: str, text: str) -> None:
    node(page, name).click()
    page.locator(f".label-form [name={part}]").fill(text)
    page.locator(f".label-form [name={part}]").press("Enter")


def test_a_label_is_text_is_found_and_stays(page: Page) -> None:
    assert not page.locator(".kept").is_visible()
    write(page, READ, "label", EVIL)
    assert node(page, READ).locator(".name").text_content() == EVIL[:17] + "…"
    assert EVIL in node(page, READ).get_attribute("aria-label")
    page.locator("input[type=search]").fill("alert(")
    assert page.locator(".node.match").count() == 1
    assert "in this browser alone" in page.locator(".kept").inner_text()
    page.reload()
    assert EVIL in page.locator(".panel .list").inner_text()
    page.get_by_role("button", name="Discard changes").click()
    assert EVIL not in page.locator(".panel .list").inner_text()
    assert not page.locator(".kept").is_visible()


def test_pinned_nodes_come_first_and_alone_if_wanted(page: Page, run: Run) -> None:
    only = page.get_by_role("button", name="Only pinned")
    assert not only.is_visible()
    page.locator(".panel .jump").last.click()
    last = page.locator(".panel h4").inner_text()
    page.get_by_role("button", name="Pin", exact=True).click()
    page.locator(".panel .back").click()
    assert page.locator(".panel .jump").first.inner_text() == last
    only.click()
    assert page.locator(".node.lit").count() == page.locator(".circuit-picture.focused").count() == 1
    node(page, last).click()
    page.get_by_role("button", name="Unpin").click()
    assert not only.is_visible()


def test_a_group_is_drawn_as_one(page: Page, run: Run) -> None:
    found = load_circuit(run, TASK)
    source, target = next((edge.source, edge.target) for edge in found.edges)
    both = {source, target}
    for name in (source, target):
        write(page, name, "group", "mine")
    assert page.locator(".group").count() == 1
    hidden = page.locator(".node.grouped")
    assert set(hidden.evaluate_all("all => all.map((one) => one.dataset.node)")) == both
    assert not hidden.first.is_visible()
    assert page.locator(".edge.inside").count() == sum({e.source, e.target} <= both for e in found.edges)
    x, y = page.locator(".group").evaluate("one => one.getAttribute('transform').match(/[-.0-9]+/g)")
    touching = [edge for edge in found.edges if len({edge.source, edge.target} & both) == 1]
    ends = page.locator(".edge").evaluate_all("all => all.map((one) => one.getAttribute('d'))")
    assert sum(d.startswith(f"M{x} {y}C") != d.endswith(f" {x} {y}") for d in ends) == len(touching)
    page.locator(".group").focus()
    page.keyboard.press("Enter")
    panel = page.locator(".panel")
    assert panel.locator("h4").inner_text() == "mine"
    assert set(panel.locator(".jump").all_inner_texts()) == both
    page.get_by_role("button", name="Take the group apart").click()
    assert page.locator(".group").count() == page.locator(".edge.inside").count() == 0
    assert node(page, source).is_visible()


def test_the_file_is_what_the_run_takes_and_the_next_report_shows(
    context: Any, page: Page, run: Run, tmp_path: Path
) -> None:
    write(page, READ, "label", "opens a quote")
    write(page, WRITE, "group", "alone")
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Download labels").click()
    assert waiting.value.suggested_filename == f"{TASK}.json"
    folder = shutil.copytree(run.folder, tmp_path / "run")
    path = label_path(folder, TASK)
    path.parent.mkdir()
    waiting.value.save_as(path)
    found = read_labels(folder, TASK, load_circuit(run, TASK))
    assert found == ({READ: {"label": "opens a quote"}, WRITE: {"group": "alone"}}, [])
    for again in opened(context, write_report(folder)):
        assert "are those in the run's labels/" in again.locator(".kept").inner_text()  # also with the browser's own
        again.evaluate("localStorage.clear()")
        again.reload()
        assert node(again, READ).locator(".name").text_content() == "opens a quote"
        assert again.locator(".group").count() == 1
        write(again, READ, "label", "")
        assert "in this browser alone" in again.locator(".kept").inner_text()


def test_what_a_browser_kept_and_nobody_wrote_does_no_harm(page: Page, run: Run) -> None:
    key = f"sparse-bridges labels {load_circuit(run, TASK).fingerprint} {TASK}"
    odd = f'{{"__proto__": {{"label": "x"}}, "x": null, "{READ}": {{"label": {{}}, "group": 3, "pinned": "yes"}}}}'
    for kept in ("{", "[1]", "null", odd):
        page.evaluate("([key, kept]) => localStorage.setItem(key, kept)", [key, kept])
        page.reload()
        assert page.locator(".node").count() == load_circuit(run, TASK).n_nodes
        assert page.locator(".node.labelled, .node.pinned, .group").count() == 0


def test_an_end_lights_what_its_token_reaches(page: Page) -> None:
    ends = page.locator(".end")
    assert ends.count() == len(page.evaluate("report.circuits[Object.keys(report.circuits)[0]].ends"))
    page.locator(".end.input:not(.loose)").first.hover()
    assert page.locator(".tie.lit").count() >= 1
    assert page.locator(".node.lit").count() >= 1
    assert page.locator(".end.input.lit").count() == 1

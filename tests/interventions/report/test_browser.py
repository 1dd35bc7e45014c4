"""The report in a real browser: a Chromium without a screen opens the file and is used as a reader would.

Any Chromium will do: the one that CHROMIUM names, else chromium or google-chrome on the path. Without one these tests
are skipped. Playwright drives it; its own browsers are not needed.
"""

import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.browser import file_context, opened
from support.report_runs import EVIL, TASK, full_run

from bridges.packaged import FOLDER
from bridges.run_folder import Run
from interventions.circuits.circuit import Circuit, load_circuit
from interventions.circuits.node_model import NodeModel
from interventions.report import circuits
from interventions.report.page import write_report
from interventions.tasks.base import TaskBatch

Page = Any
"""playwright.sync_api.Page"""

NODES = "article:not([hidden]) .node"


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    yield from file_context(tmp_path_factory.mktemp("browser"))


@pytest.fixture(scope="module")
def run(context: Any, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Every part of a report; the channel's name is markup. After `context`, so that nothing is made in vain.

    Random nodes of a random model carry no information, whatever their number: the losses are made up.
    """
    run = full_run(tmp_path_factory.mktemp("report") / "run", EVIL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(circuits, "size_curve", made_up_sizes)
        write_report(run.folder)
    return run


def made_up_sizes(model: NodeModel, circuit: Circuit, ranked: list[str], batch: TaskBatch) -> list[tuple[int, float]]:
    return [(k, 0.7 - 0.5 * k / len(ranked)) for k in (0, len(ranked) // 2, len(ranked))]


@pytest.fixture
def page(context: Any, run: Run) -> Iterator[Page]:
    yield from opened(context, run.folder / "report.html")


def shown(page: Page) -> int:
    """Nodes that are drawn as part of the circuit."""
    return page.locator(f"{NODES}:not(.off)").count()


def lit(page: Page, selector: str) -> set[str]:
    return set(page.eval_on_selector_all(selector, "all => all.map((one) => one.dataset.node)"))


def test_it_opens_and_everything_is_drawn(page: Page, run: Run) -> None:
    assert page.title() == "run – bridge report"
    assert page.locator("figure.chart canvas").count() == page.locator("figure.chart").count() == 10
    assert shown(page) == load_circuit(run, TASK).n_nodes
    assert page.locator("article:not([hidden]) .edge").count() == load_circuit(run, TASK).n_edges
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
    assert (run.folder / "report.html").stat().st_size < 5_000_000


def test_the_policy_forbids_connections_and_foreign_scripts(context: Any, run: Run) -> None:
    page = context.new_page()
    page.goto((run.folder / "report.html").as_uri())
    broken = page.evaluate(
        """async () => {
          const broken = [];
          document.addEventListener("securitypolicyviolation", (event) => broken.push(event.effectiveDirective));
          await fetch("http://127.0.0.1:9/").catch(() => null);
          new Image().src = "http://127.0.0.1:9/x.png";
          try { document.body.innerHTML += "<b>x</b>"; } catch { broken.push("innerHTML"); }
          try { document.body.setAttribute("onclick", "1"); } catch { broken.push("onclick"); }
          await new Promise((done) => setTimeout(done, 50));
          return broken;
        }"""
    )
    page.close()
    assert {"connect-src", "img-src", "innerHTML", "onclick"} <= set(broken)


def test_markup_in_a_name_stays_text(page: Page) -> None:
    assert page.evaluate("document.scripts.length") == 3
    assert page.locator("article.channel h3").inner_text() == EVIL
    page.locator(f'{NODES}[data-node="0.mlp.act_in.3"]').click()
    assert page.locator(".panel a").first.inner_text() == EVIL
    assert EVIL in page.locator(f'{NODES}[data-node="0.mlp.act_in.3"]').get_attribute("aria-label")


def test_the_slider_changes_nodes_and_loss(page: Page, run: Run) -> None:
    slider, text = page.locator("article:not([hidden]) input[type=range]"), page.locator(".size-text").first
    circuit = load_circuit(run, TASK)
    total, half = circuit.n_nodes, circuit.n_nodes // 2
    assert (shown(page), text.inner_text()) == (
        total,
        f"{total} of {total} nodes, {circuit.n_edges} edges, loss 0.200 nats",
    )
    slider.focus()
    page.keyboard.press("Home")
    assert (shown(page), text.inner_text()) == (0, f"0 of {total} nodes, 0 edges, loss 0.700 nats")
    page.keyboard.press("ArrowRight")
    kept = lit(page, f"{NODES}:not(.off)")
    assert len(kept) == half
    edges = sum({edge.source, edge.target} <= kept for edge in circuit.edges)
    assert page.locator("article:not([hidden]) .edge:not(.off)").count() == edges
    assert text.inner_text() == f"{half} of {total} nodes, {edges} edges, loss {0.7 - 0.5 * half / total:.3f} nats"
    page.locator("article:not([hidden]) .sizes circle").last.click()
    assert shown(page) == total


def test_a_click_shows_a_nodes_weights_and_examples(page: Page, run: Run) -> None:
    circuit = load_circuit(run, TASK)
    name = max(circuit.names, key=lambda name: len(circuit.edges_at(name)))
    page.locator(f'{NODES}[data-node="{name}"]').click()
    panel = page.locator("article:not([hidden]) .panel")
    assert panel.locator("h4").inner_text() == name
    rows = panel.locator(".weights tr").all()
    found = sorted((row.locator("th").inner_text(), row.locator("td").nth(1).inner_text()) for row in rows)
    wanted = []
    for edge in circuit.edges_at(name):
        other = edge.target if edge.source == name else edge.source
        wanted.append((other, f"{edge.weight:+.3f}".replace("-", "−")))
    assert [other for other, _ in found] == sorted(other for other, _ in wanted)
    assert [float(w.replace("−", "-")) for _, w in found] == pytest.approx(
        [float(w.replace("−", "-")) for _, w in sorted(wanted)], abs=2e-3
    )
    evidence = page.locator("article:not([hidden]) .evidence")
    assert evidence.locator("h5").all_inner_texts()[0] == "On the task's prompts"
    assert evidence.locator("pre.tokens i.peak").count() >= 1
    panel.locator(".jump").first.click()  # the other end of an edge
    assert panel.locator("h4").inner_text() in {other for other, _ in wanted}
    panel.locator(".back").click()
    assert panel.locator(".list .jump").count() == circuit.n_nodes


def test_hovering_lights_what_a_node_is_connected_to(page: Page) -> None:
    page.locator(f'{NODES}[data-node="0.attn.resid_delta.3"]').hover()
    connected = lit(page, f"{NODES}.lit")
    assert {"0.attn.resid_delta.3", "0.mlp.act_in.3"} <= connected
    assert len(connected) < shown(page)
    page.mouse.move(5, 5)
    assert page.locator(".circuit-picture.focused").count() == 0


def test_search_by_either_name(page: Page) -> None:
    search = page.locator("article:not([hidden]) input[type=search]")
    for name in ("0.mlp.act_in.3", "blocks.0.mlp.hook_in[3]", "<script>"):
        search.fill(name)
        assert "0.mlp.act_in.3" in lit(page, f"{NODES}.match")
    search.fill("blocks.0.mlp.hook_in[3]")
    search.press("Enter")
    assert page.locator("article:not([hidden]) .panel h4").inner_text() == "0.mlp.act_in.3"
    search.fill("nothing like it")
    assert page.locator("article:not([hidden]) .found").inner_text() == "0 found"


def test_everything_is_reached_by_keyboard(page: Page) -> None:
    seen = set()
    page.locator("body").press("Tab")
    for _ in range(150):
        seen.add(
            page.evaluate(
                """() => {
                  const at = document.activeElement;
                  if (at.closest(".node")) return "node";
                  if (at.matches(".legend button")) return "legend";
                  return at.id || at.type || [...at.classList][0] || at.tagName;
                }"""
            )
        )
        page.keyboard.press("Tab")
    wanted = {"theme", "A", "plot", "legend", "node", "range", "search", "circuit-choice", "SUMMARY", "button", "list"}
    assert wanted <= seen


def test_the_picture_is_used_by_keyboard(page: Page) -> None:
    page.locator(f'{NODES}[tabindex="0"]').focus()
    first = page.evaluate("document.activeElement.dataset.node")
    page.keyboard.press("Enter")
    panel = page.locator("article:not([hidden]) .panel")
    assert panel.locator("h4").inner_text() == first
    moved = set()
    for key in ("ArrowRight", "ArrowLeft", "ArrowDown", "ArrowUp"):
        page.keyboard.press(key)
        moved.add(page.evaluate("document.activeElement.dataset.node"))
    assert len(moved) > 1
    page.keyboard.press("Escape")
    assert panel.locator("h4").count() == 0
    assert page.locator(f'{NODES}[tabindex="0"]').count() == 1


def test_another_circuit_can_be_chosen(page: Page, run: Run) -> None:
    page.select_option("#circuit-choice", f"{TASK}-dense")
    assert shown(page) == load_circuit(run, TASK, "dense").n_nodes
    assert page.locator("article:not([hidden]) .uncontrolled").is_visible()
    page.select_option("#circuit-choice", TASK)
    assert page.locator("article:not([hidden]) table.controls").is_visible()


def test_the_picture_is_saved_as_svg(page: Page, run: Run, tmp_path: Path) -> None:
    with page.expect_download() as waiting:
        page.locator("article:not([hidden]) [data-export]").click()
    assert waiting.value.suggested_filename == f"run-{TASK}.svg"
    waiting.value.save_as(tmp_path / "circuit.svg")
    root = ElementTree.parse(tmp_path / "circuit.svg").getroot()
    tags = [element.tag.rpartition("}")[2] for element in root.iter()]
    assert tags.count("circle") == 2 * load_circuit(run, TASK).n_nodes
    assert "script" not in tags
    strokes = {element.get("stroke") for element in root.iter() if element.tag.endswith("path")}
    assert not any("var(" in (stroke or "") for stroke in strokes)


def test_curves_show_values_hide_and_zoom(page: Page) -> None:
    chart = page.locator('figure[data-chart="training-terms"]')
    chart.scroll_into_view_if_needed()
    over = chart.locator(".u-over").bounding_box()
    page.mouse.move(over["x"] + over["width"] / 2, over["y"] + over["height"] / 2)
    values = chart.locator(".legend output").all_inner_texts()
    assert all(values)
    assert 4 < float(values[0]) < 5
    other = page.locator('figure[data-chart="training-rate"] .legend output')
    (rate,) = other.all_inner_texts()
    step = 1 + round(30 * (5 - float(values[0])))  # the charts of training share their cursor
    assert float(rate) == pytest.approx(1e-3 / step, rel=0.01)
    chip = chart.locator(".legend button").first
    chip.click()
    assert chip.get_attribute("aria-pressed") == "false"
    before = chart.locator("canvas").screenshot()
    chart.get_by_role("button", name="log").click()
    page.mouse.move(over["x"] + 60, over["y"] + 50)
    page.mouse.down()
    page.mouse.move(over["x"] + 160, over["y"] + 50, steps=4)
    page.mouse.up()
    assert chart.locator("canvas").screenshot() != before
    chart.locator(".plot").focus()
    page.keyboard.press("ArrowRight")
    assert chart.locator(".sr").inner_text().startswith("step ")


def test_themes(page: Page) -> None:
    def ground() -> str:
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    page.emulate_media(color_scheme="light")
    light = ground()
    page.emulate_media(color_scheme="dark")
    dark = ground()
    assert light != dark
    page.locator("#theme").click()
    assert ground() == light
    page.reload()
    assert ground() == light  # kept
    page.locator("#theme").click()
    assert ground() == dark
    page.evaluate("localStorage.clear()")


def test_paper_is_white_and_has_no_controls(page: Page) -> None:
    page.emulate_media(color_scheme="dark", media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    for controls in (".bar", ".tools", "#circuit-choice", "#theme"):
        assert not page.locator(controls).first.is_visible()
    for kept in ("h1", ".cards", ".circuit-picture", "#site-table", "table.controls"):
        assert page.locator(kept).first.is_visible()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate("document.documentElement.dataset.theme ?? 'none'") == "none"


def test_nothing_moves_where_motion_is_unwanted(page: Page) -> None:
    assert page.locator(NODES).first.evaluate("node => getComputedStyle(node).transitionDuration") == "0s"
    assert page.evaluate("getComputedStyle(document.documentElement).scrollBehavior") == "auto"


@pytest.mark.parametrize("width", [1280, 820])
def test_nothing_hangs_over_the_side(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    # The charts follow the window a little later.
    page.wait_for_function("width => document.documentElement.scrollWidth <= width", arg=width)


def test_on_a_phone_no_column_is_cut(page: Page) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    page.wait_for_function("() => document.documentElement.scrollWidth <= 360")
    for details in page.locator("details").all():
        details.evaluate("one => { one.open = true; }")
    tables = page.locator(".scroll:visible")
    assert tables.count() >= 10
    cut = tables.evaluate_all(
        "all => all.filter((one) => one.scrollWidth > one.clientWidth + 1).map((one) => one.innerHTML.slice(0, 80))"
    )
    assert cut == []
    cell = page.locator("#steering-summary tbody td").nth(2)
    assert cell.evaluate("one => getComputedStyle(one, '::before').content") == '"steered"'


@pytest.mark.slow
def test_the_demo_opens_too(context: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(FOLDER / "demo", tmp_path / "demo")
    for page in opened(context, write_report(folder)):
        assert page.locator("figure.chart canvas").count() == page.locator("figure.chart").count() > 0

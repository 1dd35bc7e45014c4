"""The page of sparse-bridges serve, served by a process of its own, in a real browser (see test_browser.py)."""

import importlib.util
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from support.browser import FLAGS, chromium, sync_api
from support.helpers import CHANNEL, HANG_SECONDS, make_tiny_run

from bridges.run_folder import write_digests
from interventions.bundle.channels import Channel, save_channel

if not importlib.util.find_spec("gradio"):
    pytest.skip("needs gradio: pip install -e '.[serve]'", allow_module_level=True)

ROOT = Path(__file__).parents[3]
EVIL = '</script><script>alert("x")</script><img src=x onerror=alert(1)>${alert(2)}{{alert(3)}}'
UNSTEERED = "document.querySelector('#continuations .textfield').textContent.trim()"
Page = Any
"""playwright.sync_api.Page"""


def serve(*options: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "interventions.cli", "serve", *options],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = chromium()
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, headless=True, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def url(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a run with random weights and a channel whose name is markup. Ctrl-C ends the server, without a word."""
    folder = tmp_path_factory.mktemp("serve") / "run"
    make_tiny_run(folder)
    write_digests(folder)
    save_channel(folder, CHANNEL)
    means = {"mean_member_0": [0.25], "mean_member_1": [-0.35]}
    save_channel(folder, Channel(name=EVIL, site=1, indices=(4,), weights=(1.0,), description=EVIL, statistics=means))
    save_channel(folder, Channel(name="loop", site=1, indices=(5,), weights=(1.0,), selection={"task": "for_while"}))
    server = serve("--run", str(folder), "--port", "0")
    assert server.stdout is not None
    assert select.select([server.stdout], [], [], HANG_SECONDS)[0], "the server does not start"
    said = server.stdout.readline()
    if "served at http://127.0.0.1:" not in said:
        pytest.fail(f"the server did not start: {said}{server.communicate()[1]}")
    yield said.split("served at ")[1].split(";")[0]
    server.send_signal(signal.SIGINT)
    out, errors = server.communicate(timeout=HANG_SECONDS)
    assert (server.returncode, out.strip(), errors.strip()) == (0, "", "")


@pytest.fixture
def page(browser: Any, url: str) -> Iterator[Page]:
    """The page, opened. When the test is over, nothing may have complained or been asked elsewhere."""
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    page.set_default_timeout(1000 * HANG_SECONDS)
    said: list[str] = []
    asked: set[str] = set()
    page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(f"error: {error}"))
    page.on("dialog", lambda dialog: (said.append("a dialog"), dialog.dismiss()))
    page.on("request", lambda request: asked.add(request.url))
    page.goto(url)
    page.locator("#result .verdict").wait_for()
    yield page
    page.close()
    assert not said
    assert {one[: len(url)] for one in asked if not one.startswith(("data:", "blob:"))} == {url}


def probabilities(page: Page) -> list[tuple[str, str, str]]:
    rows = page.locator("#result tbody tr").all()
    return [tuple(row.locator(".number").all_inner_texts()) for row in rows]


def continuations(page: Page) -> list[str]:
    return [one.text_content().strip() for one in page.locator("#continuations .textfield").all()]


def answered(page: Page, *, channel: str | None = None, delta: float | None = None) -> None:
    """Wait for the answer to this: the one before may still be arriving, or arrive twice."""
    page.wait_for_function(
        """([channel, delta]) => {
          const asked = document.querySelector('#result [data-delta]')?.dataset;
          return asked && (channel === null || asked.channel === channel)
            && (delta === null || Number(asked.delta) === delta);
        }""",
        arg=[channel, delta],
    )


def delta_to(page: Page, value: float) -> None:
    """Type a delta, and wait for the answer."""
    page.locator("#delta input[type=number]").fill(str(value))
    page.locator("#delta input[type=number]").blur()
    answered(page, delta=value)


def choose(page: Page, name: str) -> None:
    page.locator("#channel input").fill(name)
    page.locator("#channel input").press("Enter")
    answered(page, channel=name)


def test_the_slider_steers_the_answer_and_zero_is_the_unsteered_model(page: Page) -> None:
    delta_to(page, -7)
    assert any(unsteered != steered for unsteered, steered, _ in probabilities(page))
    assert any(unsteered != random != steered for unsteered, steered, random in probabilities(page))
    delta_to(page, 0)
    assert len(probabilities(page)) == 10
    assert all(unsteered == steered == random for unsteered, steered, random in probabilities(page))
    plain, steered, random = continuations(page)
    assert plain == steered == random
    assert "0.000 nats" in page.locator("#result").inner_text()
    slider = page.locator("#delta input[type=range]")
    slider.focus()
    for _ in range(30):
        page.keyboard.press("ArrowRight")
    answered(page, delta=float(slider.input_value()))
    assert any(unsteered != steered for unsteered, steered, _ in probabilities(page))
    assert continuations(page)[0] == plain
    assert continuations(page)[1] != plain


def test_a_channel_brings_its_range_and_an_address_will_do(page: Page) -> None:
    slider = page.locator("#delta input[type=range]")
    assert (slider.get_attribute("min"), slider.get_attribute("max")) == ("-10", "10")
    choose(page, EVIL)
    page.wait_for_function("document.querySelector('#delta input[type=range]').max == '5'")
    assert float(slider.input_value()) == 0  # it has no prompts of its own to start from
    assert EVIL in page.locator("p.quiet", has_text="class 0").inner_text()
    choose(page, "mlp.1.read.7")
    page.wait_for_function("document.querySelector('#delta input[type=range]').max == '10'")
    delta_to(page, 9)  # beyond the range of the channel before it
    assert page.locator("#result .verdict").count() == 1


def test_mistakes_are_one_sentence_each_and_the_page_goes_on(page: Page) -> None:
    prompt, error = page.locator("#prompt textarea"), page.locator("#result .error")

    def says(text: str) -> None:
        page.wait_for_function("text => document.querySelector('#result .error')?.textContent.includes(text)", arg=text)

    prompt.fill("")
    says("the prompt is empty")
    prompt.fill("cat " * 100)
    says("the model's context has room for 63")
    prompt.fill('print("red cup')
    page.locator("#result .verdict").wait_for()
    choose(page, "<b>pear</b>")
    says("unknown channel '<b>pear</b>'")
    assert error.locator("b").count() == 0
    choose(page, "attn.7.read.0")
    says("the model has no attn.7")
    choose(page, "pair")
    page.locator("#result .verdict").wait_for()
    assert error.count() == 0
    assert prompt.input_value() == 'print("red cup'  # what a reader typed stays


def test_a_channel_with_a_task_brings_its_first_prompt(page: Page) -> None:
    before = page.locator("#prompt textarea").input_value()
    choose(page, "loop")
    page.get_by_text("at the first of its prompts").wait_for()
    last = page.locator("#examples button").first.inner_text().strip()
    page.wait_for_function("last => document.querySelector('#prompt textarea').value.trim().endsWith(last)", arg=last)
    assert last.split()[0] in ("for", "while")
    assert page.locator("#prompt textarea").input_value() != before


def test_markup_in_a_prompt_stays_text(page: Page) -> None:
    page.locator("#prompt textarea").fill(EVIL[:60])
    page.wait_for_function("document.querySelector('#continuations .textfield')?.textContent.includes('</script>')")
    assert continuations(page)[0].startswith(EVIL[:60])
    assert page.locator("#result script, #result img").count() == 0


def test_an_example_and_sampling(page: Page) -> None:
    page.locator("#continuations .textfield").first.wait_for()
    before, first = page.locator("#prompt textarea").input_value(), continuations(page)[0]
    page.locator("#examples button").nth(1).click()
    page.wait_for_function(f"first => {UNSTEERED} != first", arg=first)
    assert page.locator("#prompt textarea").input_value() != before
    greedy = continuations(page)
    page.get_by_text("Sampling").click()
    page.get_by_label("Draw tokens").check()
    page.wait_for_function(f"before => {UNSTEERED} != before", arg=greedy[0])
    plain, steered, random = continuations(page)
    assert plain == steered == random != greedy[0]


@pytest.mark.parametrize("width", [1280, 420])
def test_light_and_dark_and_nothing_hangs_over_the_side(page: Page, width: int) -> None:
    grounds = set()
    page.set_viewport_size({"width": width, "height": 900})
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.reload()
        page.locator("#result .verdict").wait_for()
        grounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert len(grounds) == 2


def test_the_policy_forbids_other_hosts_and_a_foreign_name_is_refused(browser: Any, url: str) -> None:
    page = browser.new_page()
    page.set_default_timeout(1000 * HANG_SECONDS)
    page.goto(url)
    refused = page.evaluate(
        """async () => {
          const broken = [];
          document.addEventListener("securitypolicyviolation", (event) => broken.push(event.effectiveDirective));
          await fetch("http://127.0.0.1:9/").catch(() => null);
          new Image().src = "http://127.0.0.1:9/x.png";
          await new Promise((done) => setTimeout(done, 50));
          return broken;
        }"""
    )
    page.close()
    assert {"connect-src", "img-src"} <= set(refused)
    with pytest.raises(HTTPError, match="400"):
        urlopen(Request(url, headers={"Host": "attacker.example"}))


def test_it_takes_no_files_and_answers_no_other_page(url: str) -> None:
    """Asked as a program would: the pages of other programs on this machine have another port."""

    def status(path: str, headers: dict[str, str], data: bytes | None = None) -> int:
        try:
            return urlopen(Request(url + path, data, headers)).status
        except HTTPError as error:
            return error.code

    end = "x"
    empty = f'--{end}\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n\r\n--{end}--\r\n'.encode()
    form = {"Content-Type": f"multipart/form-data; boundary={end}"}
    for path in ("gradio_api/upload", "gradio_api//upload/"):
        assert status(path, form, empty) == 404
    for path in ("openapi.json", "gradio_api/openapi.json", "gradio_api/info", "docs", "redoc"):
        assert status(path, {}) == 404, path
    own = url.rstrip("/")
    other = own[: own.rindex(":")] + ":1"
    for path, data in (("config", None), ("gradio_api/queue/join", b"{}")):
        for origin in (other, "null", "http://localhost", "https://attacker.example", own + ".attacker.example"):
            assert status(path, {"Origin": origin, "Content-Type": "application/json"}, data) == 403, origin
    assert status("config", {"Origin": own}) == status("config", {}) == 200

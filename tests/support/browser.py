"""A Chromium without a screen, driven by playwright."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.helpers import HANG_SECONDS

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -e '.[dev]'")

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def chromium() -> str:
    """Path of a Chromium; skips where there is none."""
    named = os.environ.get("CHROMIUM")
    found = named or next(filter(None, map(shutil.which, NAMES)), None)
    if not found:
        pytest.skip(f"no Chromium: install one of {', '.join(NAMES)}, or name it with CHROMIUM=/path")
    return found


def file_context(folder: Path) -> Iterator[Any]:
    """A browser on a window of 1280 by 800 whose profile lies in a folder."""
    path = chromium()
    with sync_api.sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            folder,
            executable_path=path,
            headless=True,
            args=list(FLAGS),
            viewport={"width": 1280, "height": 800},
            reduced_motion="reduce",
        )
        context.set_default_timeout(1000 * HANG_SECONDS)
        yield context
        context.close()


def opened(context: Any, path: Path) -> Iterator[Any]:
    """A page on a file. When the test is over, nothing may have complained and nothing may have been requested."""
    page = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(f"error: {error}"))
    page.on("dialog", lambda dialog: (said.append("a dialog"), dialog.dismiss()))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    yield page
    page.close()
    assert not said
    assert {url for url in asked if not url.startswith(("data:", "blob:"))} == {path.as_uri()}

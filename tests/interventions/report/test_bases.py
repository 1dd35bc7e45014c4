"""Every number of the page on bases equals metrics.json."""

import json

from support.report_page import Page
from support.report_runs import TASK

from bridges.run_folder import Run


def test_the_table(page: Page) -> None:
    rows = page.tables["bases"][1:]
    assert rows == [
        ["sparse channels, 1", "0.400", "2", "never", "0.500", "0.050", "0.75", "never", "–", "–"],
        ["sparse channels, 4", "0.900", "0.5", "1", "0.125", "0.013", "0.75", "0.250", "0.025", "0.75"],
        ["rotated axes, 4", "0.800", "1", "2", "0.250", "0.025", "0.75", "0.500", "0.050", "0.75"],
        ["difference of means", "0.300", "2", "never", "0.500", "0.050", "0.75", "never", "–", "–"],
    ]


def test_the_words(page: Page) -> None:
    words = " ".join(page.words["bases"].split())
    assert "4 sparse channels go 0.9 of the way to the counterfactual's P at norm 1; so do 1 of 1 other bases," in words
    assert "at 2 (rotated axes) or more." in words
    assert "As one vector at every token they do with a KL of 0.025 on other text," in words
    assert "the quietest other, rotated axes, with 0.050." in words
    assert "TopK autoencoder, k 8 0.123." in words


def test_the_charts(full: Run, page: Page) -> None:
    saved = json.loads((full.folder / "metrics.json").read_text())["bases"][TASK]
    effect, side = (page.data["charts"][name] for name in ("bases-1", "bases-kl-1"))
    assert effect["x"] == side["x"] == saved["ladder"]
    shown = [row for row in saved["rows"] if row["latents"] == 4 or not row["indices"]]
    assert [series["values"] for series in effect["series"]] == [*(row["p"] for row in shown), saved["random_p95"]]
    assert [series["values"] for series in side["series"]] == [row["kl"] for row in shown]
    names = ["sparse channels, 4", "rotated axes, 4", "difference of means"]
    assert [series["name"] for series in effect["series"]] == [*names, "random directions, 95th percentile"]

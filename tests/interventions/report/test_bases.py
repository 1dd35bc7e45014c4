"""Every number of the page on bases equals metrics.json."""

import json

from support.report_page import Page
from support.report_runs import TASK

from bridges.run_folder import Run


def test_the_table(page: Page) -> None:
    rows = page.tables["bases"][1:]
    assert rows == [
        ["sparse channels, 1", "0.400", "0.040", "2", "0.610", "0.061", "0.75", "never", "–", "–", "–"],
        ["sparse channels, 4", "0.900", "0.090", "0.5", "0.620", "0.062", "0.75", "1", "0.920", "0.092", "0.75"],
        ["rotated axes, 4", "0.800", "0.080", "1", "0.810", "0.081", "0.75", "2", "0.910", "0.091", "0.75"],
        ["difference of means", "0.300", "0.030", "2", "0.710", "0.071", "0.75", "never", "–", "–", "–"],
    ]


def test_the_words(page: Page) -> None:
    words = " ".join(page.words["bases"].split())
    assert (
        "4 sparse channels reach P 0.9 at norm 1, with a KL of 0.092 on other text; so do 1 of 1 other bases" in words
    )
    assert "the shortest rotated axes (2), the one with the least KL rotated axes (0.091)." in words
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

"""Every number of the page on the twenty tasks equals metrics.json."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from support.report_page import Page, page_of
from support.report_runs import TASK

from bridges.run_folder import Run, update_metrics
from interventions.report.tasks import counting_words
from interventions.tasks.catalogue import list_tasks


def test_the_table(full: Run, page: Page) -> None:
    metrics = json.loads((full.folder / "metrics.json").read_text())
    rows = {row[0]: row[1:] for row in page.tables["task-table"][2:]}
    assert list(rows) == list_tasks()
    for name, found in metrics["tasks"].items():
        for at, label in ((0, "dense"), (2, "sparse")):
            score = found.get(label)
            wanted = [f"{score['pair_accuracy']:.2f}", f"{score['p_right']:.2f}"] if score else ["–", "–"]
            assert rows[name][at : at + 2] == wanted, name
        if name != TASK:
            assert rows[name][4:10] == [""] * 6
    assert rows[TASK][4:10] == ["0.00", "0.50", "0.98", "110", "4", "27.5"]  # medians of 90, 110, 400 and of 4, 5, 0
    assert rows["with_as"][10] == metrics["tasks"]["with_as"].get("unsupported", "not solved by <both>")


def test_solved_tasks_are_bold_from_the_threshold_on(bare: Run) -> None:
    scores = {
        name: {label: {"pair_accuracy": p, "p_right": 0.5, "loss": 0.1} for label in ("dense", "sparse")}
        for name, p in (("with_as", 0.9), ("with_open", 0.89))
    }
    update_metrics(bare.folder, tasks=scores)
    page = page_of(bare)
    assert "bold from 0.9." in " ".join(page.words["tasks"].split())
    assert page.html.count("<b>0.90</b>") == 2
    assert "<b>0.89</b>" not in page.html


def test_sizes(page: Page) -> None:
    words = " ".join(page.words["tasks"].split())
    assert "the dense model's circuits have 22.5 times as many edges" in words  # the median of 22.5, 22 and 400
    assert "at a calibrated task loss of 0.15 nats; the sparse model's loss is 1.750 nats per token" in words
    assert "the dense one's 1.500." in words


def test_without_an_edge_in_both_there_is_no_ratio(bare: Run) -> None:
    sizes = {"target_loss": 0.2, "ce": {"sparse": 1.54, "dense": 1.5}, "with_edges": {"ratio": []}, "tasks": {}}
    edges = {"dense": [{"edges": 3}, {"edges": 4}], "sparse": [{"edges": 0}]}
    update_metrics(bare.folder, circuit_size=sizes | {"tasks": {"with_as": edges}})
    page = page_of(bare)
    assert "No task needs an edge in both models" in page.words["tasks"]
    assert page.tables["task-table"][2][8:11] == ["3.5", "0", "3.5"]  # no edges count as one
    assert not [warning for warning in page.warnings if re.search("unequal loss", warning)]


def test_floors_and_what_they_say_of_a_task(bare: Run) -> None:
    def of(trigram: float) -> dict[str, Any]:
        return {"floors": {"evaluation": {"bigram": 0.0, "trigram": trigram, "5-gram": 1.0}}}

    update_metrics(bare.folder, tasks={"with_as": of(0.98), "for_while-natural": of(0.97), "mine": of(0.25)})
    page = page_of(bare)
    rows = {row[0]: row[1:] for row in page.tables["task-table"][2:]}
    assert list(rows) == ["with_as", "for_while-natural", "mine"]
    assert [row[4:7] for row in rows.values()] == [["0.00", f"{p:.2f}", "1.00"] for p in (0.98, 0.97, 0.25)]
    assert page.html.count('<td class="soft">') == 3  # those of with_as
    words = counting_words(json.loads((bare.folder / "metrics.json").read_text()))
    assert words["with_as"].endswith("get 0%, 98%, 100% of its pairs right: this task needs no more than counting.")
    assert words["mine"].endswith("get 0%, 25%, 100% of its pairs right: this task needs more than counting.")


def test_natural_prompts_by_distance(bare: Run) -> None:
    def scores(*ranges: tuple[str, int, float, float | None]) -> dict[str, Any]:
        return {far: {"pairs": n, "accuracy": right, "p_right": p} for far, n, right, p in ranges}

    natural = {
        "dense": scores(("all", 40, 0.7, 0.6), ("2", 30, 0.8, 0.65), ("9 to 16", 10, 0.4, 0.45)),
        "trigram": scores(("all", 40, 0.5, None), ("2", 30, 0.6, None), ("9 to 16", 10, 0.2, None)),
    }
    sparse = {"sparse": scores(("all", 3, 0.0, 0.1), ("over 32", 3, 0.0, 0.125))}
    only_counted = {"bigram": scores(("all", 40, 0.7, None), ("2", 40, 0.7, None))}
    by_task = {"for_while-natural": natural, "with_as-natural": sparse, "with_as": only_counted}
    update_metrics(bare.folder, tasks={name: {"by_distance": by} for name, by in by_task.items()})
    page = page_of(bare)
    assert page.tables["distance-table"][2:] == [
        ["for_while-natural", "2", "30", "0.80", "0.65", "–", "–", "", "0.60", ""],
        ["for_while-natural", "9 to 16", "10", "0.40", "0.45", "–", "–", "", "0.20", ""],
        ["with_as-natural", "over 32", "3", "–", "–", "0.00", "0.12", "", "", ""],
    ]
    update_metrics(bare.folder, tasks={"with_as": {"by_distance": only_counted}})
    assert "distance-table" not in page_of(bare).tables


def test_a_changed_task_file_is_said(bare: Run, tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text("as it was")
    record = {"prompts": "file", "file": str(file), "sha256": hashlib.sha256(b"as it was").hexdigest()}
    update_metrics(bare.folder, task_prompts={"mine": record, "with_as": {"prompts": "generated"}})
    assert not [warning for warning in page_of(bare).warnings if "task file" in warning]
    file.write_text("another")
    assert f"Task mine: the task file {file} has changed since; " in " ".join(page_of(bare).warnings)
    file.unlink()
    assert f"Task mine: the task file {file} is gone: " in " ".join(page_of(bare).warnings)

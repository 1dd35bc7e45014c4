"""Reports of tasks: count tables against counting by hand, models by distance, and what check-task prints of them."""

import json
from pathlib import Path

import pytest
import torch
from support.helpers import make_tiny_run, tiny_tokenizer
from support.task_files import GOOD, write

from interventions import get_task
from interventions.cli.main import main
from interventions.tasks import floors
from interventions.tasks.base import TaskBatch
from interventions.tasks.floors import ngram_floor, ngrams_right
from interventions.tasks.reports import TABLE_NAMES, TaskReport, distance_table, report_tasks
from interventions.tasks.scores import score


def by_hand(stream: list[int], batch: TaskBatch, n: int) -> list[bool]:
    """Counted with a loop over the text."""

    def count(gram: list[int]) -> int:
        return sum(stream[i : i + len(gram)] == gram for i in range(len(stream)))

    right = []
    for pair in range(len(batch.last)):
        members = []
        for member in (0, 1):
            prompt = batch.tokens[pair, member, : int(batch.last[pair]) + 1].tolist()
            answers = [int(batch.answers[pair, member]), int(batch.answers[pair, 1 - member])]
            for order in range(n, 0, -1):
                context = prompt[len(prompt) - order + 1 :] if order <= len(prompt) + 1 else None
                counts = [0 if context is None else count([*context, answer]) for answer in answers]
                if any(counts):
                    break
            members.append(counts[0] > counts[1])
        right.append(all(members))
    return right


def test_tables_count_what_a_loop_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floors, "_CHUNK", 37)  # n-grams across the chunks' borders
    torch.manual_seed(0)
    stream = torch.randint(4, (20, 20))
    batches = {
        number: TaskBatch(
            torch.randint(4, (60, 2, 6)), torch.tensor([[0, 1], [2, 3], [1, 2]] * 20), torch.randint(6, (60,)), []
        )
        for number in range(2)
    }
    for number, right in ngrams_right(stream, batches, (1, 2, 3, 5)).items():
        for n, found in right.items():
            wanted = by_hand(stream.flatten().tolist(), batches[number], n)
            assert found.tolist() == wanted
            assert ngram_floor(stream, batches[number], n) == pytest.approx(sum(wanted) / 60)
        assert 0 < right[3].sum() < 60


def test_a_report_has_models_and_tables_side_by_side(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    task = get_task(write(tmp_path, GOOD), tokenizer, max_tokens=40)
    double = tokenizer.encode('")')[0]

    def always_double(tokens: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.full_like(tokens, double), len(tokenizer)).float()

    training = torch.tensor(tokenizer.encode("load(\"cat\")\nload('cat')\n" * 3))
    short = get_task("for_while", tokenizer, max_tokens=3)
    reports = report_tasks([task, short], {"model": always_double}, training, pairs=10)
    assert isinstance(reports["for_while"], str)
    report = reports["mine"]
    assert isinstance(report, TaskReport)
    assert report.record == task.record
    assert report.available == {"train": 8, "selection": 24, "evaluation": 24}
    assert list(report.scores) == ["model", *TABLE_NAMES.values()]
    batch = task.sample(10, split="evaluation", seed=0)
    assert report.scores["model"] == score(always_double, batch)
    assert report.scores["model"]["all"].accuracy == 0
    for n, name in TABLE_NAMES.items():
        floor = ngram_floor(training, batch, n)
        assert report.floors["evaluation"][name] == report.scores[name]["all"].accuracy == pytest.approx(floor)
        assert report.scores[name]["all"].p_right is None
    assert report.needs_more_than_counting == (report.floors["evaluation"]["trigram"] < 0.98)
    assert json.loads(json.dumps(report.as_json()))["floors"] == report.floors
    lines = distance_table(report).splitlines()
    assert lines[0] == "| distance | pairs | model | bigram | trigram | 5-gram |"
    assert lines[2].startswith("| all | 10 | 0.00, ")
    uncounted = report_tasks([task], {}, None)["mine"]
    assert isinstance(uncounted, TaskReport)
    assert uncounted.needs_more_than_counting is None


def test_check_task_prints_it(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setenv("SPARSE_BRIDGES_CACHE", str(tmp_path))
    run = make_tiny_run(tmp_path / "run")
    files = sorted(path.name for path in run.folder.iterdir())
    main(["check-task", "--run", str(run.folder), "--task", str(write(tmp_path, GOOD))])
    printed = capsys.readouterr().out
    assert "mine: The pairs of mine.jsonl." in printed
    assert "sha256" in printed
    assert "train      8 pairs; pair accuracy of counting: bigram 0.00, trigram " in printed
    assert "| distance | pairs | dense | sparse | bigram | trigram | 5-gram |\n" in printed
    assert "than counting trigrams" in printed
    assert sorted(path.name for path in run.folder.iterdir()) == files
    main(["check-task", "--run", str(run.folder), "--task", "for_while", "--no-floors"])
    printed = capsys.readouterr().out
    assert "prompts: prompts generated\ntrain      as many pairs as wanted\n" in printed
    assert "counting" not in printed


def test_solved_tasks_adds_to_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setenv("SPARSE_BRIDGES_CACHE", str(tmp_path))
    run = make_tiny_run(tmp_path / "run")
    path = write(tmp_path, GOOD)
    main(["solved-tasks", str(run.folder), "--task", str(path), "--pairs", "4", "--no-floors"])
    main(["solved-tasks", str(run.folder), "--task", "while_return_true", "--prompts", "natural", "--pairs", "4"])
    printed = capsys.readouterr().out
    kept = json.loads((run.folder / "metrics.json").read_text())["tasks"]
    assert list(kept) == ["mine", "while_return_true-natural"]
    assert kept["mine"]["prompts"]["file"] == str(path.resolve())
    natural = kept["while_return_true-natural"]
    assert natural["prompts"] == {"prompts": "natural", "text": "held-out files of stdlib"}
    assert set(natural["by_distance"]) == {"dense", "sparse", "bigram", "trigram", "5-gram"}
    assert natural["by_distance"]["dense"]["all"]["pairs"] == 4
    assert natural["by_distance"]["dense"]["all"]["accuracy"] == pytest.approx(natural["dense"]["pair_accuracy"])
    assert "\nrun, while_return_true-natural\n\n| distance | pairs | dense | sparse | bigram" in printed

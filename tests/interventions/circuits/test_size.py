"""Circuit sizes of two models: averages by hand, measurements kept and reused, both kinds of pairs, solved tasks."""

import json
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path

import circuit_size as script
import pytest
import torch
from support.helpers import make_tiny_run, tiny_tokenizer

from bridges.run_folder import Run, open_run, update_metrics
from interventions.circuits import size as circuit_size
from interventions.circuits import task_scores as solved
from interventions.circuits.measures import Necessity, Repruned
from interventions.circuits.node_model import as_nodes
from interventions.circuits.prune_config import PruneConfig
from interventions.circuits.size import (
    Contest,
    Measured,
    Measuring,
    Settings,
    Size,
    contest_of_pretrained,
    contest_of_run,
)
from interventions.circuits.size_table import contest_summary, contest_table, curve, geometric_mean, overview
from interventions.circuits.task_scores import score_task, score_tasks
from interventions.cli import solved_tasks
from interventions.tasks.base import answer_probabilities, pair_accuracy
from interventions.tasks.catalogue import get_task, list_tasks
from sparse_model.config import SparsityConfig, to_json
from sparse_model.data.generated_python import generate_document
from sparse_model.data.tokenizer import save_tokenizer, train_tokenizer
from sparse_model.model.checkpoint import save_sparse
from sparse_model.model.transformer import SparseTransformer
from sparse_model.training.pretrain import PretrainConfig

CONFIG = PruneConfig(steps=2, pairs=4, pool=8, selection_pairs=4, target_loss=0.75, reference_tokens=128)
"""Asked for no more than chance: then no node at all is needed."""
TASK = "single_double_quote"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    make_tiny_run(folder)
    update_metrics(folder, sparse={"ce": 2.5}, dense={"ce": 2.25})
    return folder


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSE_BRIDGES_CACHE", str(tmp_path))


@pytest.fixture
def run(folder: Path) -> Run:
    return open_run(folder)


def test_geometric_mean() -> None:
    assert geometric_mean([1, 10, 100]) == pytest.approx(10)
    assert geometric_mean([0, 16]) == pytest.approx(4)
    with pytest.raises(ValueError, match="no task to average over"):
        geometric_mean([])


def measured(edges: int, further: int | None = None, redrawn: int | None = None) -> Measured:
    """One of `edges` at 0.15 and `further` at 0.3."""
    sizes = [Size(0.15, 5, edges, 0.14)] + ([Size(0.3, 3, further, 0.29)] if further is not None else [])
    return Measured(0.01, sizes, Necessity(2.0, [0.1, 0.2], 0.2, [0.1, 0.1]), Repruned(0.5, redrawn, redrawn, 0.6))


@pytest.fixture
def contest(folder: Path) -> Contest:
    return contest_of_run(folder)


def test_figures_of_two_tasks_and_two_seeds_by_hand(contest: Contest) -> None:
    sizes = {
        "a": {"sparse": [measured(4, 2), measured(9, 3)], "dense": [measured(64, 8), measured(90, 27)]},
        "b": {"sparse": [measured(1), measured(1)], "dense": [measured(16, 2), measured(10, 3, redrawn=7)]},
    }
    figures = contest_summary(contest, sizes, 0.15, (0, 1), {"c": "why"})
    assert figures["all"]["geometric_mean_edges"]["sparse"] == pytest.approx([2, 3])
    assert figures["all"]["geometric_mean_edges"]["dense"] == pytest.approx([32, 30])
    assert figures["all"]["ratio"] == pytest.approx([16, 10])
    assert figures["with_edges"] == {"tasks": ["a", "b"]} | figures["all"]
    assert figures["ce"] == {"sparse": 2.5, "dense": 2.25}
    assert figures["curve"]["sparse"] == [(0.15, pytest.approx(2.5))]  # task b's sparse model misses 0.3
    assert curve({"a": sizes["a"]}, "dense", 2) == [(0.15, pytest.approx(77)), (0.3, pytest.approx(17.5))]
    json.dumps(figures)
    printed = contest_table(figures)
    assert "| geometric mean |  | 2.5 (2.0 to 3.0) |" in printed
    sizes["b"]["sparse"] = [measured(1), measured(0)]  # none counts as one, and once more without the task
    figures = contest_summary(contest, sizes, 0.15, (0, 1), {})
    assert figures["all"]["ratio"] == pytest.approx([16, 10])
    assert figures["with_edges"]["tasks"] == ["a"]
    assert figures["with_edges"]["ratio"] == pytest.approx([16, 10])
    assert figures["curve"]["sparse"] == [(0.15, pytest.approx(6.5)), (0.3, pytest.approx(2.5))]
    assert "| a | 5 (5 to 5) | 6.5 (4 to 9) | yes | not reached |" in printed
    assert "| 7 where reached |" in printed
    assert "left out, c: why" in printed


def test_several_summaries_side_by_side() -> None:
    def one(sparse: float, dense: float, *ratio: float) -> dict:
        means = {"sparse": [n / 8 for n in ratio], "dense": [n * n / 8 for n in ratio]}
        found = {"geometric_mean_edges": means, "ratio": list(ratio)} if ratio else {}
        return {"ce": {"sparse": sparse, "dense": dense}, "with_edges": {"tasks": ["t"] * bool(ratio)} | found}

    lines = overview({"a": one(1.5, 1.25, 16.0), "b": one(2.0, 2.0), "c": one(1.0, 1.0, 8.0, 24.0, 80.0)}).splitlines()
    assert lines[2:] == [
        "| a | 1 | 1.5000 | 1.2500 | 2.0 | 32.0 | 16.0 |",
        "| b | 0 | 2.0000 | 2.0000 |  |  |  |",
        "| c | 1 | 1.0000 | 1.0000 | 3.0 | 72.0 | 24.0 |",
        "| median |  |  |  | 2.5 (2.0 to 3.0) | 52.0 (32.0 to 72.0) | 20.0 (16.0 to 24.0) |",
    ]


def test_a_measurement_is_made_once(contest: Contest, monkeypatch: pytest.MonkeyPatch) -> None:
    task = get_task(TASK, contest.tokenizer, max_tokens=contest.n_ctx)
    settings = Settings((0.7,), 2, True)
    first = [Measuring(contest, side, CONFIG, settings)(task) for side in contest.sides]
    for found in first:
        assert found.size_at(0.75) == Size(0.75, 0, 0, pytest.approx(0.693, abs=1e-3))
        assert found.necessity is not None
        assert len(found.necessity.random) == 2
        assert found.redrawn is not None

    def never(*_: object, **__: object) -> None:
        raise RuntimeError("measured again")

    monkeypatch.setattr(circuit_size, "fit_gates", never)
    assert [Measuring(contest, side, CONFIG, settings)(task) for side in contest.sides] == first
    side = contest.sides[0]
    changes = (
        (replace(CONFIG, steps=3), settings),
        (CONFIG, settings._replace(levels=())),
        (replace(CONFIG, seed=1), settings),
    )
    for config, other in changes:
        with pytest.raises(RuntimeError, match="measured again"):
            Measuring(contest, side, config, other)(task)
    fresh = side._replace(model=as_nodes(SparseTransformer(side.model.shape)))
    with pytest.raises(RuntimeError, match="measured again"):
        Measuring(contest, fresh, CONFIG, settings)(task)
    path = side.folder / "circuits" / "sizes" / f"{TASK}-sparse-seed0.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(RuntimeError, match="measured again"):
        Measuring(contest, side, CONFIG, settings)(task)


def test_a_target_below_the_whole_model_s_loss_is_noted(contest: Contest) -> None:
    task = get_task(TASK, contest.tokenizer, max_tokens=contest.n_ctx)
    found = Measuring(contest, contest.sides[0], replace(CONFIG, target_loss=1e-4), Settings((), 2, False))(task)
    assert found.whole_loss > 1e-4
    assert found.sizes == []


def pretrained(folder: Path, seed: int, nonzero: float) -> Path:
    """A folder as sparse-bridges train-sparse leaves it, with random weights."""
    torch.manual_seed(seed)
    config = PretrainConfig(corpus_tokens=20_000, sparsity=SparsityConfig(nonzero_fraction=nonzero))
    config = replace(config, sparse=replace(config.sparse, d_model=32, d_mlp=64, n_heads=2, d_vocab=384))
    to_json(config, folder / "config.json")
    save_tokenizer(tiny_tokenizer(), folder / "tokenizer")
    save_sparse(SparseTransformer(config.sparse), folder / "sparse")
    (folder / "metrics.json").write_text(json.dumps({"val_ce": 3.0 + seed}))
    return folder


def test_two_models_trained_alone_can_be_compared(tmp_path: Path) -> None:
    a, b = pretrained(tmp_path / "a", 0, 0.25), pretrained(tmp_path / "b", 1, 1.0)
    contest = contest_of_pretrained(a, b)
    assert [(side.label, side.folder, side.ce) for side in contest.sides] == [("sparse", a, 3.0), ("dense", b, 4.0)]
    assert contest.sides[0].digest != contest.sides[1].digest
    assert contest.blocks.shape[1] == contest.n_ctx == 64
    with pytest.raises(ValueError, match=r"dense_run='.*a' keeps 0.25 of its weights"):
        contest_of_pretrained(b, a)
    (b / "metrics.json").unlink()
    with pytest.raises(ValueError, match="no held-out loss: train one in another folder"):
        contest_of_pretrained(a, b)
    save_tokenizer(train_tokenizer([generate_document(random.Random(5))] * 9, 300), b / "tokenizer")
    with pytest.raises(ValueError, match="token ids would mean different text"):
        contest_of_pretrained(a, b)


def test_the_script_counts_draws_and_keeps(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Random models solve nothing, so that they count as solving everything here."""
    options = script.Options(runs=(str(folder),), tasks=(TASK,), draws=2, levels=(), controls=False, config=CONFIG)
    with pytest.raises(ValueError, match="no task to average over"):
        script.main(options)
    monkeypatch.setattr(solved, "SOLVED", 0)
    script.main(replace(options, seeds=(0, 1)))
    printed = capsys.readouterr().out
    assert f"| {TASK} | 0 (0 to 0) | 0 (0 to 0) |" in printed
    assert "sparse 2.5000, dense 2.2500" in printed
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["circuit_size"]["all"]["ratio"] == [1, 1]
    assert metrics["circuit_size"]["with_edges"] == {"tasks": []}
    assert metrics["sparse"]["ce"] == 2.5
    assert (folder / "circuit_size.png").read_bytes().startswith(b"\x89PNG")
    for wrong in (
        {"runs": ()},
        {"sparse_runs": ("a",)},
        {"runs": (), "dense_runs": ("b",)},
        {"runs": (), "sparse_runs": ("a", "b"), "dense_runs": ("c",)},
    ):
        with pytest.raises(ValueError, match="name RUN folders, or as many --sparse-runs as --dense-runs"):
            script.main(replace(options, **wrong))
    with pytest.raises(ValueError, match=r"seeds=\(\): name at least one"):
        script.main(replace(options, seeds=()))


def test_a_task_s_score_by_hand(run: Run) -> None:
    batch = get_task(TASK, run.tokenizer).sample(6, split="evaluation", seed=0)
    for part in (run.sparse, run.dense):
        found = score_task(as_nodes(part), batch)
        with torch.no_grad():
            logits = part(batch.tokens.flatten(0, 1)).unflatten(0, (6, 2))
        assert found.pair_accuracy == float(pair_accuracy(logits, batch))
        assert found.p_right == pytest.approx(float(answer_probabilities(logits, batch)[0].mean()), rel=1e-4)


def test_tasks_that_the_tokenizer_cannot_present_are_listed(
    folder: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    models = {"sparse": as_nodes(run.sparse)}
    with pytest.raises(ValueError, match="n_pairs=0"):  # no task is to blame for it
        score_tasks(models, run.tokenizer, max_tokens=5, pairs=0, seed=0)
    found = score_tasks(models, run.tokenizer, max_tokens=5, pairs=2, seed=0)
    assert list(found) == list_tasks()
    assert all(isinstance(of, str) and f"task '{name}': 64 fillings" in of for name, of in found.items())
    solved_tasks.main(solved_tasks.Options(runs=(str(folder),), pairs=2))
    kept = json.loads((folder / "metrics.json").read_text())["tasks"]
    assert list(kept) == list_tasks()
    unsupported = [name for name, of in kept.items() if "unsupported" in of]
    assert unsupported  # 384 tokens are too few for some
    printed = capsys.readouterr().out
    for name, of in kept.items():
        if name in unsupported:
            assert re.search(rf"\| {name} +\| - +\| - +\| - +\| - +\|", printed)
            assert " ".join(f"unsupported, {name}: {of['unsupported']}".split()) in " ".join(printed.split())
        else:
            assert 0 <= of["dense"]["pair_accuracy"] <= 1
            assert set(of) == {"dense", "sparse", "prompts", "available", "floors", "by_distance"}
            floors = of["floors"]["evaluation"]
            assert list(floors) == ["bigram", "trigram", "5-gram"]
            cells = [f"{p:.2f}" for p in floors.values()]
            assert re.search(rf"\| {name} .*\| {' +. '.join(cells)} +\|", printed)


def test_a_folder_with_one_model_will_do(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part in ("dense", "sparse"):
        for name in (part, "tokenizer"):
            shutil.copytree(folder / name, tmp_path / part / name)
    solved_tasks.main(solved_tasks.Options(runs=(str(folder),), pairs=2))
    both = json.loads((folder / "metrics.json").read_text())["tasks"]
    solved_tasks.main(solved_tasks.Options(runs=(str(tmp_path / "dense"), str(tmp_path / "sparse")), pairs=2))
    lines = capsys.readouterr().out.splitlines()
    heads = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| task")]
    assert heads[-2:] == [["task", "dense pairs", "P"], ["task", "sparse pairs", "P"]]
    assert max(len(line) for line in lines) <= 100
    for part in ("dense", "sparse"):
        alone = json.loads((tmp_path / part / "metrics.json").read_text())["tasks"]
        scored = {name: of for name, of in alone.items() if "unsupported" not in of}
        assert {name: of[part] for name, of in scored.items()} == {
            name: of[part] for name, of in both.items() if "unsupported" not in of
        }
        assert not any(of["floors"]["evaluation"] for of in scored.values())  # nothing says what it was trained on
    with pytest.raises(FileNotFoundError, match="has neither dense/ nor sparse/"):
        solved_tasks.main(solved_tasks.Options(runs=(str(tmp_path / "none"),)))

"""The search over pruning's settings: it prunes, resumes, stops when told to, and never ends worse than it began."""

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support.solver import CONFIG, solver, solver_batch

from interventions.circuits.ablation import measure_ablation
from interventions.circuits.node_model import as_nodes, count_edges
from interventions.circuits.prune_config import PruneConfig
from interventions.circuits.pruning import prune
from interventions.circuits.settings_search import RANGES, search_config
from sparse_model.io.atomic import WriteFailed


def test_two_trials_of_pruning(tmp_path: Path) -> None:
    """The first has the given settings, with which the hand-built model's circuit has its two edges."""
    model, tried = as_nodes(solver()), []
    ablation = measure_ablation(model, solver_batch(32, seed=9).tokens.flatten(0, 1))
    base = replace(CONFIG, steps=30, lr=3e-2)

    def edges(config: PruneConfig) -> int:
        tried.append(config)
        return count_edges(model, prune(model, solver_batch(32), solver_batch(16, seed=1), ablation, config).kept)

    best, fewest, trials = search_config(edges, base, 2, tmp_path / "circuits" / "search.db", "t sparse f")
    assert trials == len(tried) == 2
    for name in RANGES:
        assert getattr(tried[0], name) == pytest.approx(getattr(base, name))
        assert getattr(tried[1], name) != getattr(base, name)
    assert fewest == edges(best) <= edges(tried[0])
    assert replace(best, **{name: getattr(base, name) for name in RANGES}) == base


def test_a_search_goes_on_where_it_stopped(tmp_path: Path) -> None:
    tried: list[PruneConfig] = []

    def edges(config: PruneConfig) -> int:
        tried.append(config)
        return round(1e6 * config.lr)

    def search(trials: int, key: str = "k", base: PruneConfig = CONFIG) -> tuple[PruneConfig, int, int]:
        return search_config(edges, base, trials, tmp_path / "search.db", key)

    assert search(3)[2] == 3
    best, fewest, trials = search(5)
    assert trials == len(tried) == 5
    assert len({config.lr for config in tried}) == 5
    assert fewest == min(round(1e6 * config.lr) for config in tried) == round(1e6 * best.lr)
    assert search(5) == (best, fewest, 5)
    assert len(tried) == 5
    assert search(1, key="another")[2] == 1
    assert search(1, base=replace(CONFIG, target_loss=0.3))[2] == 1
    assert len(tried) == 7


def test_ctrl_c_keeps_what_is_finished(tmp_path: Path) -> None:
    tried = []

    def edges(config: PruneConfig) -> int:
        tried.append(config)
        if len(tried) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return len(tried)

    best, fewest, trials = search_config(edges, CONFIG, 9, tmp_path / "search.db", "k")
    assert (fewest, trials, len(tried)) == (1, 2, 2)
    assert best.lr == pytest.approx(CONFIG.lr)


def test_a_search_without_optuna_or_trials_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="search=0: at least one trial"):
        search_config(lambda _: 1, CONFIG, 0, tmp_path / "search.db", "k")
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ValueError, match=r"pip install 'sparse-bridges\[search\]'"):
        search_config(lambda _: 1, CONFIG, 1, tmp_path / "search.db", "k")


def test_a_database_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "search.db").mkdir()
    with pytest.raises(WriteFailed, match=r"search\.db could not be written"):
        search_config(lambda _: 1, CONFIG, 1, tmp_path / "search.db", "k")


def test_a_full_disk_is_one_sentence_and_what_is_finished_stays(tmp_path: Path) -> None:
    path = tmp_path / "search.db"
    search_config(lambda _: 1, CONFIG, 1, path, "k")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("interventions.circuits.settings_search._finished", full_disk)
        with pytest.raises(WriteFailed, match=r"search\.db could not be written \(the disk took no more of it"):
            search_config(lambda _: 1, CONFIG, 2, path, "k")
    assert search_config(lambda _: 1, CONFIG, 1, path, "k")[2] == 1


def full_disk(_: object) -> int:
    """As optuna tells it: an error of its own, whose cause is sqlite's."""
    raise RuntimeError("An exception is raised during the commit.") from OSError("database or disk is full")

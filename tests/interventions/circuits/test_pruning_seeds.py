"""Which of several prunings is taken, their overlap and consensus; and that circuits say all of it, failed ones too."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.helpers import make_tiny_run
from support.report_runs import SCORES
from support.solver import CONFIG, SolverTask, cancelling, solver, solver_batch

from bridges.run_folder import Run, open_run
from interventions.circuits.ablation import measure_ablation
from interventions.circuits.circuit import Circuit, circuit_paths, failed_circuits, load_circuit, save_circuit
from interventions.circuits.circuit_search import find_circuit, with_controls
from interventions.circuits.node_model import as_nodes, locations
from interventions.circuits.prune_config import PruneConfig
from interventions.circuits.pruning import Pruned, prune
from interventions.circuits.pruning_seeds import (
    SeededPruning,
    SeedSummary,
    choose,
    consensus,
    overlap,
    prune_seeds,
    summaries,
)
from interventions.cli.find_circuit import Options, format_faithfulness, main
from interventions.cli.solved_tasks import Options as SolvedOptions
from interventions.cli.solved_tasks import main as solved_tasks

NEURON = "blocks.0.mlp.hook_post"
SEEDS = tuple(
    SeedSummary(seed, 12, 9, 0.14, 0.16, agreed, taken)
    for seed, agreed, taken in ((0, 1.0, True), (1, 0.23, False), (2, 0.44, False), (None, 0.5, False))
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    make_tiny_run(folder)
    return folder


@pytest.fixture
def run(folder: Path) -> Run:
    return open_run(folder)


def pruning(seed: int, edges: int, fresh: float, *neurons: int) -> SeededPruning:
    kept = {place.name: torch.zeros(place.width, dtype=torch.bool) for place in locations(solver().cfg)}
    kept[NEURON][list(neurons)] = True
    tau = {name: mask.float() - 0.5 for name, mask in kept.items()}
    pruned = Pruned(kept, len(neurons), 0.1, 0.0, None, tau, [])  # type: ignore[arg-type]
    return SeededPruning(replace(CONFIG, seed=seed), pruned, edges, fresh)


def test_the_fewest_edges_of_those_that_reach_the_target_on_fresh_prompts() -> None:
    small, good, large = pruning(0, 3, 0.4), pruning(1, 9, 0.1), pruning(2, 12, 0.05)
    assert CONFIG.target_loss == 0.15
    assert choose([small, large, good]) is good
    assert choose([small, pruning(3, 2, 0.5)]) is small


def test_overlap_and_summaries() -> None:
    first, second = pruning(0, 1, 0.1, 1, 2, 3), pruning(1, 1, 0.1, 2, 3, 4, 5)
    assert overlap(first.pruned.kept, second.pruned.kept) == pytest.approx(2 / 5)
    rows = summaries([first, second], None, second)
    assert [(row.seed, row.overlap, row.taken) for row in rows] == [(0, pytest.approx(0.4), False), (1, 1.0, True)]
    assert overlap(pruning(0, 0, 0.1).pruned.kept, pruning(1, 0, 0.1).pruned.kept) == 1


def test_seeds_of_one_model_agree_and_their_consensus_is_cut_out() -> None:
    model, task = as_nodes(solver()), SolverTask()
    ablation = measure_ablation(model, solver_batch(8).tokens[:, 0])
    config = replace(CONFIG, steps=40, selection_pairs=8)
    prunings = prune_seeds(model, task, ablation, config, 2)
    assert [made.config.seed for made in prunings] == [0, 1]
    assert all(made.pruned.kept[NEURON].nonzero().flatten().tolist() == [5] for made in prunings)
    agreed = consensus(model, task, ablation, prunings)
    assert agreed is not None
    assert agreed.pruned.kept[NEURON].nonzero().flatten().tolist() == [5]
    assert agreed.fresh_loss <= config.target_loss
    assert consensus(model, task, ablation, prunings[:1]) is None  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="seeds=0: prune with at least one seed"):
        prune_seeds(model, task, ablation, config, 0)


def test_the_consensus_prefers_nodes_with_more_votes() -> None:
    """Neuron 5 does the task; the others do nothing. Two of three prunings have it, with a tau below the others'."""
    model, task = as_nodes(solver()), SolverTask()
    ablation = measure_ablation(model, solver_batch(8).tokens[:, 0])

    def made(seed: int, *neurons: int) -> SeededPruning:
        base = pruning(seed, 1, 0.1, *neurons)
        base.pruned.kept["blocks.0.mlp.hook_in"][0] = base.pruned.kept["blocks.0.hook_mlp_out"][7] = True
        tau = {name: mask.float() - 0.5 for name, mask in base.pruned.kept.items()}
        tau[NEURON][8], tau[NEURON][5] = 1.0, -0.4
        return base._replace(config=replace(base.config, eliminate=False), pruned=base.pruned._replace(tau=tau))

    agreed = consensus(model, task, ablation, [made(0, 5), made(1, 5), made(2, 8)])
    assert agreed is not None
    assert agreed.pruned.kept[NEURON].nonzero().flatten().tolist() == [5]


def found(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **options: int) -> Circuit:
    monkeypatch.setenv("SPARSE_BRIDGES_CACHE", str(tmp_path))
    config = PruneConfig(steps=1, pairs=4, pool=8, selection_pairs=4, target_loss=0.75, reference_tokens=128)
    return find_circuit(run, "single_double_quote", config, evaluation_pairs=4, **options)


def test_a_failed_circuit_says_so_everywhere(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = found(run, tmp_path, monkeypatch, seeds=1)
    assert plain.faithfulness is not None
    assert not plain.failed
    assert plain.faithfulness.loss <= 0.75
    scores = SCORES
    failed = replace(
        plain, faithfulness=scores, seeds=SEEDS, ngram_floor=0.5, config=plain.config | {"target_loss": 0.15}
    )
    assert failed.failed
    path = save_circuit(run.folder, failed)
    assert json.loads(path.read_text())["failed"] is True
    back = load_circuit(run, failed.task)
    assert (back.failed, back.faithfulness, back.seeds, back.ngram_floor) == (True, scores, SEEDS, 0.5)
    assert back.overlaps == [0.23, 0.44]
    text = format_faithfulness(back, scores)
    for words in ("FAILED", "2.8% of the whole", "task loss 0.6060 (target 0.15)", "25% (counting alone 50%)"):
        assert words in text
    assert "seed 0, taken" in text
    assert "consensus" in text
    rows = {line.split("  ")[0]: line.split()[-3:] for line in text.splitlines()}
    assert rows["each with p = 0.1, mean of 2 draws"] == ["0.200", "70%", "0.020"]
    assert rows["each with p = 0.1, worst draw"] == ["0.300", "50%", "0.030"]
    assert rows["worst subset found (49% of them)"] == ["11.500", "0%", "0.690"]
    reason = "its circuit failed: task loss 0.606 on evaluation prompts, target 0.15"
    assert failed_circuits(run.folder) == {failed.task: reason}
    solved_tasks(SolvedOptions(runs=(str(run.folder),), pairs=2))
    assert f"{failed.task}: {reason}" in capsys.readouterr().out
    assert "FAILED" in str(failed.plot().texts) + str([a.get_title() for a in failed.plot().axes])
    # A circuit of an earlier version has none of it, and loads.
    data = json.loads(path.read_text())
    for name in ("faithfulness", "seeds", "ngram_floor", "failed", "sha256"):
        del data[name]
    path.write_text(json.dumps(data))
    old = load_circuit(run, failed.task)
    assert (old.faithfulness, old.seeds, old.failed, old.overlaps) == (None, (), False, [])
    assert failed_circuits(run.folder) == {}


def test_several_seeds_are_the_default_and_an_empty_circuit_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SPARSE_BRIDGES_CACHE", str(tmp_path))
    floors = {"evaluation": {"trigram": 0.31}}
    (folder / "metrics.json").write_text(json.dumps({"tasks": {"single_double_quote": {"floors": floors}}}))
    config = PruneConfig(steps=1, pairs=4, pool=8, selection_pairs=4, target_loss=0.75, reference_tokens=128)
    main(Options(run=str(folder), consensus=True, evaluation_pairs=4, config=config))
    printed = capsys.readouterr().out
    (folder / "metrics.json").unlink()
    circuit = load_circuit(open_run(folder), "single_double_quote")
    assert [(summary.seed, summary.taken) for summary in circuit.seeds] == [
        (0, False),
        (1, False),
        (2, False),
        (None, True),
    ]
    assert circuit.overlaps == [1.0, 1.0, 1.0]
    assert circuit.ngram_floor == 0.31
    assert "the circuit is empty: what no circuit has as a node" in printed
    assert "(counting alone 31%)" in printed
    assert "consensus, taken" in printed
    assert circuit_paths(folder, circuit.task)[0].exists()


def test_what_cannot_be_asked_for_is_a_sentence(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    circuit = found(run, tmp_path, monkeypatch, seeds=1)
    with pytest.raises(ValueError, match=r"is of another model \(other; .*open the run that it was found in"):
        with_controls(run, replace(circuit, fingerprint="other"))
    with pytest.raises(ValueError, match="seeds=1: a consensus needs at least two prunings"):
        find_circuit(run, "single_double_quote", PruneConfig(), seeds=1, agreed=True)
    model, batch = as_nodes(solver()), solver_batch(16)
    ablation = measure_ablation(model, batch.tokens[:, 0])
    backwards = batch._replace(answers=batch.answers.flip(1))
    with pytest.raises(ValueError, match=r"does not solve the task: it gets both prompts of 0% .*solved-tasks"):
        prune(model, batch, backwards, ablation, CONFIG)
    model = as_nodes(cancelling())
    with pytest.raises(ValueError, match=r"target_loss=1e-09 is below the whole model's own .*raise --target-loss"):
        prune(model, batch, batch, measure_ablation(model, batch.tokens[:, 0]), replace(CONFIG, target_loss=1e-9))

"""Scores of a circuit by hand-made ablation, the adversary against brute force, and prunings that must withstand it."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from support.helpers import make_tiny_run
from support.solver import CONFIG, SolverTask, cancelling, solver_batch
from torch import Tensor

from bridges.run_folder import Run
from interventions.circuits import faithfulness, partial_ablation
from interventions.circuits.ablation import Calibration, measure_ablation
from interventions.circuits.faithfulness import DRAWS, RATES, Faithfulness, measure_faithfulness
from interventions.circuits.gates import Fitted, GateLayout, fit_gates, rows_at_random_rates
from interventions.circuits.node_model import NodeModel, as_nodes, count_edges, locations
from interventions.circuits.partial_ablation import Adversary
from interventions.circuits.prune_config import PruneConfig
from interventions.circuits.pruning import Ranking
from interventions.circuits.worst_case import plot_worst_case, worst_case_curve
from interventions.tasks.base import TaskBatch
from interventions.tasks.catalogue import get_task
from sparse_model.io.reading import typed
from sparse_model.model.transformer import SparseTransformer

NEURON = "blocks.0.mlp.hook_post"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_tiny_run(tmp_path_factory.mktemp("runs") / "run")


def by_hand(model: SparseTransformer, batch: TaskBatch, shut: dict[str, Tensor], means: dict[str, Tensor]) -> Tensor:
    """Log-odds of the right answers with some channels at their means: TransformerLens' hooks, prompt by prompt."""

    def put(value: Tensor, hook: object) -> Tensor:
        flat = value.flatten(2).clone()
        flat[..., shut[hook.name]] = means[hook.name][0][shut[hook.name]]  # type: ignore[attr-defined]
        return flat.view(value.shape)

    log_odds = torch.zeros(len(batch.last), 2)
    for pair, last in enumerate(batch.last.tolist()):
        for member in (0, 1):
            tokens = batch.tokens[pair, member, : last + 1][None]
            logits = model.run_with_hooks(tokens, fwd_hooks=[(name, put) for name in shut])[0, -1]
            right, wrong = batch.answers[pair, member], batch.answers[pair, 1 - member]
            log_odds[pair, member] = logits[right] - logits[wrong]
    return log_odds


def loss_and_accuracy(log_odds: Tensor) -> list[float]:
    return [float((1 + (-log_odds).exp()).log().mean()), float((log_odds > 0).all(1).float().mean())]


def split(model: NodeModel, flat: Tensor) -> dict[str, Tensor]:
    widths = [place.width for place in locations(model.shape)]
    parts = flat.split(widths)
    return {place.name: part for place, part in zip(locations(model.shape), parts, strict=True)}


def test_scores_are_those_of_ablation_by_hand(run: Run) -> None:
    model = as_nodes(run.sparse)
    batch = get_task("single_double_quote", run.tokenizer).sample(4, split="evaluation", seed=0)
    ablation = measure_ablation(model, torch.randint(384, (4, 20), generator=torch.Generator().manual_seed(2)))
    n_gates = sum(place.width for place in locations(model.shape))
    inside = torch.rand(n_gates, generator=torch.Generator().manual_seed(3)) < 0.2
    calibration = Calibration(3.0, {int(batch.answers[0, 0]): 0.5})
    with torch.no_grad():
        run.sparse.bigram.mul_(0)  # or it gives most of the log-odds
        got = measure_faithfulness(model, split(model, inside), ablation, calibration, batch, PruneConfig(seed=7))
        whole = by_hand(run.sparse, batch, {}, ablation.values)
        alone = by_hand(run.sparse, batch, split(model, ~inside), ablation.values)
        assert got.whole[:2] == pytest.approx(loss_and_accuracy(whole), abs=1e-5)
        assert got.alone[:2] == pytest.approx(loss_and_accuracy(alone), abs=1e-5)
        assert got.log_odds_share == pytest.approx(float(alone.mean() / whole.mean()), abs=1e-4)
        shift = torch.where(batch.answers == batch.answers[0, 0], 0.5, -0.5)
        assert [got.loss, got.accuracy] == pytest.approx(loss_and_accuracy(3 * alone + shift), abs=1e-5)
        generator = torch.Generator().manual_seed(7)
        for rate, drawn in zip(RATES, got.random, strict=True):
            shut = [~inside & (torch.rand(n_gates, generator=generator) < rate) for _ in range(DRAWS)]
            expected = [
                loss_and_accuracy(by_hand(run.sparse, batch, split(model, s), ablation.values)) for s in shut[:2]
            ]
            assert drawn.rate == rate
            assert [list(draw[:2]) for draw in drawn.draws[:2]] == [pytest.approx(e, abs=1e-5) for e in expected]
    for drawn in got.random:
        assert drawn.worst.loss == max(draw.loss for draw in drawn.draws) > drawn.mean.loss
        assert drawn.worst.accuracy == min(draw.accuracy for draw in drawn.draws)
    assert got.worst.loss > max(got.alone.loss, got.whole.loss)
    assert typed(Faithfulness, got.to_dict(), "faithfulness", "") == got


def only(model: NodeModel, *neurons: int) -> dict[str, Tensor]:
    """The path of the answer: what is read, neurons of the first MLP, what they write."""
    kept = {place.name: torch.zeros(place.width, dtype=torch.bool) for place in locations(model.shape)}
    kept["blocks.0.mlp.hook_in"][0] = True
    kept["blocks.0.hook_mlp_out"][7] = True
    kept[NEURON][list(neurons)] = True
    return kept


def test_the_adversary_finds_what_brute_force_finds() -> None:
    model, batch = as_nodes(cancelling()), solver_batch(8)
    ablation = measure_ablation(model, batch.tokens[:, 0])
    kept = only(model, 5)
    layout = GateLayout(locations(model.shape))
    adversary = Adversary(model, layout, ablation, batch, 0)
    inside, neurons = layout.join(kept), layout.slices[NEURON].start
    losses = {}
    for subset in product((False, True), repeat=2):
        ablated = torch.zeros(layout.n_gates, dtype=torch.bool)
        ablated[[neurons + 6, neurons + 7]] = torch.tensor(subset)
        losses[subset] = adversary.loss(inside, ablated)
    assert losses[False, True] > 1 > max(losses[False, False], losses[True, True], losses[True, False])
    attack = adversary.attack(kept)
    assert attack.loss >= losses[False, True] - 1e-6
    assert attack.ablated[neurons + 7]
    assert not attack.ablated[neurons + 6]
    assert attack.loss == pytest.approx(adversary.loss(inside, attack.ablated))
    assert attack.passes > 20
    assert adversary.attack(only(model, 5, 6, 7)).loss < attack.loss / 2  # what cancels is out of its reach


def test_what_cancels_is_kept_only_where_partial_ablation_counts() -> None:
    """In the order of nodes the path comes first, then the two that cancel, then all others."""
    model, selection = as_nodes(cancelling()), solver_batch(8)
    layout = GateLayout(locations(model.shape))
    tau = torch.linspace(-0.5, -1, layout.n_gates)
    tau[layout.join(only(model, 5, 6, 7))] = 0.4
    tau[layout.join(only(model, 5))] = 0.5
    sizes = {}
    for outside in ("all", "random", "adversary"):
        config = replace(CONFIG, outside=outside, eliminate=False, target_loss=0.3)
        ranking = Ranking(model, Fitted(tau, []), measure_ablation(model, selection.tokens[:, 0]), selection, config)
        mask = ranking.circuit(0.3)
        assert mask is not None
        sizes[outside] = int(mask.sum())
    assert sizes["all"] <= 3
    assert sizes["random"] == 5
    assert sizes["adversary"] >= 5


def test_the_adversary_of_the_optimisation_goes_up_the_loss() -> None:
    model, train = as_nodes(cancelling()), solver_batch(32)
    config = replace(CONFIG, outside="adversary", steps=5)
    fitted = fit_gates(model, train, measure_ablation(model, train.tokens[:, 0]), config, start=only(model, 5))
    assert fitted.attack is not None
    neurons = GateLayout(locations(model.shape)).slices[NEURON].start
    assert fitted.attack[neurons + 7] == 1
    assert fitted.attack[neurons + 6] == 0
    assert fitted.attack[neurons + 5] == 0.5  # inside the circuit there is nothing to gain


def test_rates_are_drawn_row_by_row() -> None:
    drawn = rows_at_random_rates(2000, 50, torch.Generator().manual_seed(0))
    assert drawn.shape == (2000, 1, 50)
    share = drawn.mean((1, 2))
    assert float((share == 1).float().mean()) == pytest.approx(0.25, abs=0.05)
    rest = share[share < 1]
    assert float(rest.mean()) == pytest.approx(0.5, abs=0.04)
    assert float(rest.std()) > 0.25  # one rate for all rows would give .07


def test_the_worst_case_curve_ends_at_the_whole_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faithfulness, "DRAWS", 1)
    monkeypatch.setattr(partial_ablation, "ASCENT_STEPS", 2)
    monkeypatch.setattr(partial_ablation, "FLIP_ROUNDS", 2)
    model = as_nodes(cancelling())
    ablation = measure_ablation(model, solver_batch(8).tokens[:, 0])
    config = replace(CONFIG, steps=20, selection_pairs=8)
    points = worst_case_curve(model, SolverTask(), ablation, config, pairs=4)
    n_gates = sum(place.width for place in locations(model.shape))
    assert [point.nodes for point in points] == [0, 8, 16, 32, 64, 128, n_gates]
    everything = {place.name: torch.ones(place.width, dtype=torch.bool) for place in locations(model.shape)}
    assert (points[0].edges, points[-1].edges) == (0, count_edges(model, everything))
    assert points[-1].worst == points[-1].alone == points[-1].random  # nothing is left to ablate
    assert points[0].worst >= max(points[0].alone, points[0].random)
    assert plot_worst_case({"sparse": points, "other": points[:3]}, 0.15, tmp_path / "worst.png").stat().st_size > 5000

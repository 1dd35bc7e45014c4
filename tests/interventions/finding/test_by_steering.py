"""The search by what steers the dense model: doses by hand and by brute force, and a planted channel that is found."""

import math
from pathlib import Path

import pytest
import torch
from support.helpers import make_tiny_run

from bridges.run_folder import Run
from interventions.finding import by_steering as find_steering
from interventions.finding.by_patching import channel_by_patching, search_channels
from interventions.finding.by_steering import Dosed, SteeringSite, best_of, channel_by_steering, read_matters
from interventions.finding.channel_search import freeze
from interventions.finding.read_patch import ReadPatch
from interventions.steering.edits import sparse_changes
from interventions.steering.rivals import difference_of_means, exact_patch
from interventions.steering.steered_prompts import SteeredPrompts, prompts_of, steerable
from interventions.steering.strengths import LADDER, Dose, Dosing, choose_dose, quiet_count
from interventions.tasks.base import TaskBatch
from interventions.tasks.catalogue import get_task

TASK = "single_double_quote"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = make_tiny_run(tmp_path / "run")
    for decoder in run.bridges.decoders:  # or the random decoders' edits would hardly be felt
        decoder.weight.data *= 100
    return run


@pytest.fixture
def batch(run: Run) -> TaskBatch:
    return get_task(TASK, run.tokenizer).sample(6, split="selection", seed=0)


def test_quiet_strengths_end_at_the_first_loud_one() -> None:
    assert [quiet_count(p, 0.05) for p in ([], [0.06], [0.05, 0.051], [0.01, 0.06, 0.01])] == [0, 0, 1, 1]


def test_the_dose_is_the_smallest_quiet_strength_that_does_nearly_as_much_as_any() -> None:
    p = [0.1, 0.3, 0.82, 0.89, 0.2, 0.99, 0.99, 0.99, 0.99, 0.99]
    assert choose_dose(p, [0.01] * 5, 0.0) == Dose(LADDER[2], 0.82, 0.01)  # .82 >= .9 * .89
    assert choose_dose(p, [0.01, 0.02], 0.0) == Dose(LADDER[1], 0.3, 0.02)
    assert choose_dose(p, [0.01] * 6, 0.0).strength == LADDER[5]
    assert choose_dose(p, [], 0.004) == Dose(0.0, 0.004, 0.004)


@torch.no_grad()
def test_doses_are_those_of_the_edits_themselves(run: Run, batch: TaskBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    dosing, prompts = Dosing(run, batch, 2), prompts_of(batch)
    steered = SteeredPrompts(steerable(run), prompts, 2, "read")
    edit = sparse_changes(run, 2, prompts)[..., [4, 9]] @ run.bridges.directions(2)[[4, 9]]
    p = steered.answers([edit], LADDER).target.mean(2)[:, 0]
    torch.testing.assert_close(dosing.effects([[4, 9]])[:, 0], p)
    monkeypatch.setattr(SteeredPrompts, "p_at", lambda steered, share: math.inf)
    random = torch.tensor(dosing.quiet([[4, 9]])[0])
    assert len(random) == len(LADDER)
    norm = edit.norm(dim=-1, keepdim=True)
    drawn = torch.randn(100, 16, generator=torch.Generator().manual_seed(0))
    edits = [norm * one / one.norm() for one in drawn]
    torch.testing.assert_close(random, steered.answers(edits, LADDER).target.mean(2).quantile(0.95, dim=1))
    # Cut off between two strengths.
    limit = float(random.sort().values[4:6].mean())
    monkeypatch.setattr(SteeredPrompts, "p_at", lambda steered, share: limit)
    quiet, other = dosing.quiet([[4, 9], [5]])
    assert other == dosing.quiet([[5]])[0]
    assert quiet == random.tolist()[: quiet_count(random.tolist(), limit)]
    assert dosing.doses([[4, 9]])[0] == choose_dose(p.tolist(), quiet, dosing.base)


def test_of_sets_that_steer_alike_the_one_that_the_sparse_model_uses_most() -> None:
    def dosed(p: float, share: float, site: int = 1) -> Dosed:
        return Dosed(site, [0], Dose(1.0, p, 0.0), share)

    found = [dosed(0.9, 0.1), dosed(0.87, 0.4), dosed(0.8, 0.9), dosed(0.9, 0.9, site=0)]
    assert best_of(found) == dosed(0.87, 0.4)
    assert best_of([*found, dosed(0.86, 0.01, site=3)]).site == 3


def test_a_planted_channel_is_found(run: Run, batch: TaskBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    """One channel's column is made the dense model's own difference at the site; the others are made short."""
    # The tiny model does not solve the task: there is no way to go a share of.
    monkeypatch.setattr(SteeredPrompts, "p_at", lambda steered, share: share)
    site, planted = 2, 7
    dosing = Dosing(run, batch, site)
    patch = ReadPatch(run, batch, site)
    wanted = exact_patch(run.dense, site, prompts_of(batch), "read")
    with torch.no_grad():
        weight = run.bridges.decoders[site].weight
        weight.mul_(1e-3)
        at = dosing.changes[..., planted]
        weight[:, planted] = (at[..., None] * wanted).sum((0, 1)) / at.square().sum()
    channel = channel_by_steering(run, "quote_type", TASK, batch, site=site, candidates=32, largest=2)
    chosen = channel.selection
    assert chosen["sets"]["1"] == [planted]
    assert channel.indices[0] == planted
    assert channel.strength == chosen["doses"][str(len(channel.indices))]["strength"]
    assert chosen["share"]["1"] == pytest.approx(patch.effect([planted]) / patch.whole, abs=1e-3)
    (dose,) = Dosing(run, batch, site).doses([[planted]])
    assert chosen["doses"]["1"] == dose._asdict()
    assert dose.p > Dosing(run, batch, site).base


def test_the_search_tries_every_candidate_and_grows_from_the_best(run: Run, batch: TaskBatch) -> None:
    at = SteeringSite(run, batch, 2, 6)
    assert at.pool == at.single.argsort(descending=True)[:6].tolist()
    alone = at.alone()
    every = dict(zip(at.pool, at.dosing.doses([[c] for c in at.pool], 25), strict=True))
    assert {one.channels[0]: one.dose for one in alone} == every
    assert [one.dose.p for one in alone] == sorted((d.p for d in every.values()), reverse=True)
    sets = at.grow(alone[1], alone, 3)
    assert sets[1] == alone[1]
    assert [len(one.channels) for one in sets.values()] == [1, 2, 3]
    assert all(set(one.channels) <= set(at.pool) for one in sets.values())
    assert sets[2].dose == at.dosing.doses([sets[2].channels], 25)[0]


def test_the_site_is_one_that_the_sparse_model_hangs_on(
    run: Run, batch: TaskBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(find_steering, "eligible_sites", lambda _: [1, 2, 3])
    wholes = {i: ReadPatch(run, batch, i).whole for i in (1, 2, 3)}
    largest = max(wholes, key=wholes.__getitem__)
    monkeypatch.setattr(find_steering, "LEAST_READ_EFFECT", wholes[largest])
    channel = channel_by_steering(run, "quote_type", TASK, batch, largest=1, candidates=3)
    assert channel.site == largest
    assert list(channel.selection["site_single_p"]) == [str(largest)]
    assert channel.selection["site_whole_effect_nats"] == {str(i): round(w, 4) for i, w in wholes.items()}
    # Where there is none, all are searched.
    monkeypatch.setattr(find_steering, "LEAST_READ_EFFECT", math.inf)
    channel = channel_by_steering(run, "quote_type", TASK, batch, largest=1, candidates=3)
    assert list(channel.selection["site_single_p"]) == ["1", "2", "3"]


def test_the_channel_is_the_smallest_set_that_does_nearly_as_much_as_any(
    run: Run, batch: TaskBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    effects = {1: 0.9, 2: 0.96, 3: 0.97, 4: 1.0, 5: 5.0}  # a set of 5 is no channel, however much it does

    def doses(self: Dosing, sets: list[list[int]], draws: int = 100) -> list[Dose]:
        return [Dose(1.0, effects[len(one)], 0.0) for one in sets]

    monkeypatch.setattr(Dosing, "doses", doses)
    channel = channel_by_steering(run, "quote_type", TASK, batch, site=2, largest=5, candidates=6)
    assert len(channel.indices) == 2


def test_a_site_where_nothing_differs_is_an_error(run: Run, batch: TaskBatch) -> None:
    with torch.no_grad():
        run.sparse.blocks[1].ln1.weight.zero_()
    with pytest.raises(ValueError, match="site 2: no channel of the sparse read differs"):
        channel_by_steering(run, "quote_type", TASK, batch, site=2)


def test_everything_that_an_experiment_needs_is_frozen(run: Run, batch: TaskBatch) -> None:
    channel = channel_by_patching(run, "quote_type", TASK, batch, site=2)
    frozen = freeze(run, channel, batch).selection
    assert frozen["units"] == "exact"
    assert frozen["doses"].keys() == frozen["sets"].keys()
    dosing = Dosing(run, batch, 2)
    assert frozen["doses"]["2"] == dosing.doses([frozen["sets"]["2"]])[0]._asdict()
    alone = frozen["by_patching"]
    assert list(alone["sets"]) == list(alone["doses"]) == ["1", "2", "4", "8"]
    assert alone["sets"]["4"] == search_channels(run, batch, 2, beam=1).sets[4]
    assert alone["doses"]["4"] == dosing.doses([alone["sets"]["4"]])[0]._asdict()
    means = difference_of_means(run.dense, batch, 2, prompts_of(batch))
    assert frozen["difference_of_means"] == dosing.edit_doses([means])[0]._asdict()


def test_the_channel_carries_the_rules_that_chose_it(
    run: Run, batch: TaskBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand: half a nat, 95 % of the largest effect of at most four channels, four indices."""
    effects = {1: 0.9, 2: 0.96, 3: 0.97, 4: 1.0, 5: 5.0}
    monkeypatch.setattr(
        Dosing, "doses", lambda self, sets, draws=100: [Dose(1.0, effects[len(one)], 0.0) for one in sets]
    )
    channel = channel_by_steering(run, "quote_type", TASK, batch, site=2, largest=5, candidates=6)
    whole = ReadPatch(run, batch, 2).whole
    assert [(rule.bound, rule.threshold, rule.reached, rule.passed) for rule in channel.rules] == [
        ("at least", 0.5, whole, whole >= 0.5),
        ("at least", 0.95, 0.96, True),
        ("at most", 4, 2, True),
    ]
    assert read_matters(0.5)
    assert not read_matters(0.499)
    chosen = channel_by_steering(run, "quote_type", TASK, batch, largest=2, candidates=3)
    decides = chosen.selection["site_effects"][chosen.site]
    ends = chosen.selection["site_effects"][-1]
    halfway = (ends["p_stream"] + ends["p_read"]) / 2
    assert (chosen.rules[0].bound, chosen.rules[0].threshold) == ("more than", pytest.approx(halfway))
    assert chosen.rules[0].reached in (decides["p_read"], decides["p_stream"])

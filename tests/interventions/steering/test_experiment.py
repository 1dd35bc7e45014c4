"""What an experiment leaves open is filled in: sets of channels and strengths."""

import dataclasses
import math

import pytest
from support.steering_runs import CHANNEL, SMALL, TASK

from bridges.run_folder import Run
from interventions.bundle.bundle import get_bundle
from interventions.steering import rivals
from interventions.steering import strengths as doses
from interventions.steering.experiment import Experiment, chosen_strengths, default_strengths, resolved
from interventions.steering.result import Steering, chosen_strength
from interventions.steering.steer import steer
from interventions.steering.steered_prompts import SteeredPrompts, prompts_of
from interventions.steering.strengths import LADDER
from interventions.tasks.catalogue import get_task


def test_sets_come_from_the_search_the_channel_or_the_experiment(dense, monkeypatch: pytest.MonkeyPatch) -> None:
    def sets(**options) -> tuple:
        return resolved(Experiment(**options), get_bundle(dense)).sets

    searched = dataclasses.replace(CHANNEL, selection={"task": TASK, "sets": {"1": [4], "2": [4, 6], "3": [4, 6, 7]}})
    monkeypatch.setitem(get_bundle(dense).channels, "searched", searched)
    assert sets(channel="searched") == ((4,), (4, 6))
    assert sets(channel="searched", sizes=(3,)) == ((4, 6, 7),)
    assert sets(channel="searched", sets=((1, 2),)) == ((1, 2),)
    assert sets(channel="pair") == ((3, 11),)
    assert sets(channel="attn.1.read.7", task="while_return_true") == ((7,),)
    monkeypatch.setitem(get_bundle(dense).channels, "true_keyword", dataclasses.replace(CHANNEL, selection={}))
    assert sets(task="while_return_true") == ((3, 11),)
    for message, options in {
        "not found for a task": {"channel": "attn.1.read.7"},
        r"sizes=\(5,\): the search for 'pair' found 1, 2, 3": {"channel": "searched", "sizes": (5,)},
        r"sets=\[99\]: the sparse stream has channels 0 \.\. 31": {"channel": "pair", "sets": ((99,),)},
        "no two sets may be of one size": {"sets": ((1,), (2,))},
        "none of them twice": {"sets": ((1, 1),)},
        "draws=0: must be at least 1": {"draws": 0},
    }.items():
        with pytest.raises(ValueError, match=message):
            sets(**options)
    with pytest.raises(KeyError, match="unknown task 'quote'"):
        sets(channel="pair", task="quote")


def test_strengths_chosen_on_selection_prompts_are_measured(
    dense, result: Steering, monkeypatch: pytest.MonkeyPatch
) -> None:
    selection = {
        "task": TASK,
        "sets": {"1": [3], "2": [3, 11]},
        "doses": {"1": {"strength": 4.0}, "2": {"strength": 0.5}},
    }
    channel = dataclasses.replace(CHANNEL, selection=selection)
    monkeypatch.setitem(get_bundle(dense).channels, "pair", channel)
    assert list(default_strengths({"1": 4.0, "2": 0.5})) == [*(i / 10 for i in range(11)), 1.25, 1.5, 2, 2.5, 3, 4]
    assert list(default_strengths({"1": 0.75})) == [*(i / 10 for i in range(8)), 0.75, 0.8, 0.9, 1]
    # Another set of the same size has none.
    assert chosen_strengths(channel, [[5], [3, 11]]) == {"2": 0.5}
    found = steer(dense, dataclasses.replace(SMALL, strengths=(0, 0.5)), progress=False)
    assert (found.chosen["1"], found.chosen["2"]) == (4.0, 0.5)
    assert [chosen_strength(one, "2") for one in (found, result)] == [0.5, 1]  # where none was chosen: 1
    # Side effects are those at the chosen strength, whatever the evaluation prompts say.
    norm = result.side_effects["2"]["norm"] / 2
    assert found.side_effects["2"]["norm"] == pytest.approx(norm, rel=1e-4)
    assert found.digest == channel.digest != result.digest


def test_what_was_frozen_is_read_from_the_channel(dense, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets of the sparse model alone, and the strength of the difference of means, which is not chosen again."""
    selection = {
        "task": TASK,
        "units": "exact",
        "sets": {"1": [3]},
        "doses": {"1": {"strength": 1.25}},
        "by_patching": {"sets": {"1": [7], "4": [7, 8, 9, 10]}, "doses": {n: {"strength": 2.0} for n in ("1", "4")}},
        "difference_of_means": {"strength": 3.0},
    }
    channel = dataclasses.replace(CHANNEL, selection=selection)
    monkeypatch.setitem(get_bundle(dense).channels, "pair", channel)
    plan = dataclasses.replace(SMALL, strengths=(0, 1), sets=(), sizes=(1,))
    found = steer(dense, plan, progress=False)
    assert found.patching_sets == {"1": [7]}
    assert found.chosen == {"1": 1.25, "by_patching 1": 2.0, "difference_of_means": 3.0}
    alone = steer(dense, dataclasses.replace(plan, channel="attn.1.read.7", task=TASK), progress=False)
    assert found.by_patching["1"] == pytest.approx(alone.channels["1"], rel=1e-5)
    assert found.by_patching["1"][1] != pytest.approx(found.channels["1"][1], rel=1e-4)
    # The strengths are a read edit's.
    stream = steer(dense, dataclasses.replace(plan, where="stream"), progress=False)
    assert set(stream.chosen) == {"difference_of_means"}


def test_the_difference_of_means_gets_a_strength_like_any_set(dense, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    selection = {"task": TASK, "sets": {"1": [3]}, "doses": {"1": {"strength": 1.25}}}
    monkeypatch.setitem(get_bundle(dense).channels, "pair", dataclasses.replace(CHANNEL, selection=selection))
    monkeypatch.setattr(SteeredPrompts, "p_at", lambda steered, share: math.inf)
    monkeypatch.setattr(doses, "NEAR_LARGEST", 1.0)
    chosen_on = get_task(TASK, run.tokenizer, max_tokens=run.config.sparse.n_ctx).sample(6, split="selection", seed=1)
    found = steer(dense, dataclasses.replace(SMALL, strengths=(), sets=(), seed=1), progress=False)
    prompts = prompts_of(chosen_on)
    edit = rivals.difference_of_means(run.dense, chosen_on, found.site, prompts)
    p = SteeredPrompts(get_bundle(dense).run.dense.hf, prompts, found.site, "read").answers([edit], LADDER).target
    best = LADDER[int(p.mean(2)[:, 0].argmax())]
    assert found.chosen == {"1": 1.25, "difference_of_means": best}
    assert found.strength == list(default_strengths(found.chosen))
    assert chosen_strength(found, "difference_of_means") == best

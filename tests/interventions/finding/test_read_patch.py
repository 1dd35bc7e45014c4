"""Patching the open tokens alone against whole passes."""

import dataclasses
from pathlib import Path

import pytest
import torch
from support.helpers import make_tiny_run

from bridges.run_folder import Run
from bridges.sites import Site
from interventions.finding import read_patch
from interventions.finding.by_patching import search_channels
from interventions.finding.patching import flipped
from interventions.finding.read_patch import ReadPatch
from interventions.tasks.base import TaskBatch
from sparse_model.model.transformer import SparseTransformer


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_tiny_run(tmp_path / "run")


def scattered(run: Run) -> TaskBatch:
    """Pairs that differ first at the beginning, in the middle and near the end, and end at different tokens."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(run.sparse.d_vocab, (6, 1, 40), generator=generator).repeat(1, 2, 1)
    last = torch.tensor([5, 12, 12, 30, 39, 39])
    for pair, first in enumerate([0, 3, 9, 25, 20, 38]):
        tokens[pair, 1, first] = (tokens[pair, 0, first] + 1) % run.sparse.d_vocab
    return TaskBatch(tokens, torch.tensor([[1, 2]] * 6), last, prompts=[("", "")] * 6)


@torch.no_grad()
def by_hand(run: Run, batch: TaskBatch, site: int, channels: list[int]) -> float:
    """Mean log P(counterfactual answer), every prompt patched in a pass of its own, whole and without a cache."""
    name, total = Site(site, run.sparse.n_layers).read_hook, 0.0
    for tokens, other, answer, last in zip(*flipped(batch), strict=True):
        _, cache = run.sparse.run_with_cache(other[None], names_filter=name)

        def patch(value: torch.Tensor, hook: object, there: torch.Tensor = cache[name]) -> torch.Tensor:
            value = value.clone()
            value[..., channels] = there[..., channels]
            return value

        logits = run.sparse.run_with_hooks(tokens[None], fwd_hooks=[(name, patch)])
        total += float(logits[0, last].log_softmax(-1)[answer])
    return total / (2 * len(batch.last))


@pytest.mark.parametrize("site", range(5))
def test_patches_equal_whole_passes(run: Run, site: int) -> None:
    batch = scattered(run)
    patch = ReadPatch(run, batch, site)
    every = list(range(run.sparse.d_model))
    assert len(patch._groups) == 3
    base = by_hand(run, batch, site, [])
    assert patch.base == pytest.approx(base, abs=1e-5)
    assert patch.whole == pytest.approx(by_hand(run, batch, site, every) - base, abs=1e-5)
    assert abs(patch.whole) > 1e-3
    for channels in ([3], [5, 9, 20]):
        assert patch.effect(channels) == pytest.approx(by_hand(run, batch, site, channels) - base, abs=1e-5)
    assert patch.effect([]) == 0


def test_of_many_channels_those_are_patched_that_matter_to_first_order(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = scattered(run)
    patch = ReadPatch(run, batch, 2)
    first_order = patch.first_order()
    step = torch.zeros_like(first_order)
    step[3] = 1e-3
    with torch.no_grad():  # by a small step of one channel
        moved = (float(patch._score(step)) - float(patch._score(-step))) / 2e-3
    assert float(first_order[3]) == pytest.approx(moved, rel=0.05)
    every = patch.singles(range(1, 20))
    assert every[5] == patch.effect([5])
    assert not every[0]
    monkeypatch.setattr(read_patch, "_MOST_SINGLES", 4)
    some = patch.singles(range(1, 20))
    chosen = 1 + first_order[1:20].topk(4).indices
    assert sorted(some.nonzero().flatten().tolist()) == sorted(chosen.tolist())
    assert torch.equal(some[chosen], every[chosen])


def test_positions_that_are_read_beside_the_stream_are_no_channels(run: Run) -> None:
    """Nor does a search trip over them."""
    cfg = dataclasses.replace(run.sparse.cfg, positions="concat_learned", d_pos=4)
    torch.manual_seed(0)
    run = run._replace(sparse=SparseTransformer(cfg))
    batch = scattered(run)
    patch = ReadPatch(run, batch, 2)
    base = by_hand(run, batch, 2, [])
    assert patch.effect([3]) == pytest.approx(by_hand(run, batch, 2, [3]) - base, abs=1e-5)
    assert patch.singles(range(32)).shape == (run.sparse.d_model,)
    # All channels are candidates: an index behind the stream's last would be one, too.
    assert search_channels(run, batch, 2, largest=1, candidates=64).sets

"""Finding channels: the search against brute force, and the site test on models whose answer is known."""

import itertools
from pathlib import Path

import pytest
import torch
from helpers import make_tiny_run

from bridges.hybrid import residuals, suffix
from bridges.run import Run
from interventions.channels import read_nodes
from interventions.find import (
    ENOUGH,
    ReadPatch,
    SiteEffect,
    eligible_sites,
    find_channel,
    flipped,
    log_p,
    search_channels,
    site_effects,
)
from interventions.tasks import get_task
from interventions.tasks.base import TaskBatch


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_tiny_run(tmp_path / "run")


@pytest.fixture
def batch(run: Run) -> TaskBatch:
    return get_task("single_double_quote", run.tokenizer).sample(6, split="selection", seed=0)


def test_patching_the_whole_read_equals_running_from_the_other_read(run: Run, batch: TaskBatch) -> None:
    """Written out by hand at an attention site, on the sparse model's own modules."""
    tokens, other, answers, last = flipped(batch)
    with torch.no_grad():
        patch = ReadPatch(run, batch, 2)
        block = run.sparse.blocks[1]
        here, there = residuals(run.sparse, tokens)[2], residuals(run.sparse, other)[2]
        write = block.attn.sparsify("attn_out", block.attn(block.ln1(there)))
        logits = suffix(run.sparse, 3, here + write, tokens)
        assert patch.base + patch.whole == pytest.approx(float(log_p(logits, answers, last).mean()), abs=1e-5)
        assert patch.base == pytest.approx(float(log_p(run.sparse(tokens), answers, last).mean()), abs=1e-5)
        assert patch.effect([]) == 0


def test_search_is_exact_on_singles_and_close_to_brute_force_on_pairs(run: Run, batch: TaskBatch) -> None:
    search = search_channels(run, batch, 2, largest=2, beam=32, candidates=32)
    patch = ReadPatch(run, batch, 2)
    singles = [patch.effect([c]) for c in range(32)]
    best = max(patch.effect(list(pair)) for pair in itertools.combinations(range(32), 2))
    assert search.sets[1] == [max(range(32), key=singles.__getitem__)]
    assert search.share[1] == pytest.approx(max(singles) / patch.whole, rel=1e-4)
    assert search.share[2] * patch.whole == pytest.approx(best, rel=1e-4)


def test_named_channel_is_positive_for_member_0_and_the_smallest_sufficient_set(run: Run, batch: TaskBatch) -> None:
    channel = find_channel(run, "quote_type", "single_double_quote", batch, site=2)
    nodes = [read_nodes(run.sparse, batch.tokens[:, m], 2) for m in (0, 1)]
    differs = (nodes[0] != nodes[1]).any(-1)
    assert channel.value(nodes[0])[differs].mean() > channel.value(nodes[1])[differs].mean()
    assert max(abs(w) for w in channel.weights) == 1
    shares = {int(n): share for n, share in channel.selection["share"].items()}
    enough = [n for n in range(1, 5) if shares[n] >= ENOUGH]
    assert len(channel.indices) == (enough[0] if enough else 4)
    assert channel.selection["split"] == "selection"


def test_site_test_sees_where_the_answer_is(run: Run, batch: TaskBatch) -> None:
    """Patching all but the last token of the embedding gives the counterfactual prompt itself, of site 2L nothing."""
    tokens, other, answers, last = flipped(batch)
    effects = site_effects(run.dense, batch)
    body = run.dense.hf.transformer
    with torch.no_grad():
        full = float(log_p(run.dense(other), answers, last).exp().mean())
        none = float(log_p(run.dense(tokens), answers, last).exp().mean())
        here, there = residuals(run.dense, tokens)[3], residuals(run.dense, other)[3]
        logits = run.dense.unembed(here + body.h[1].mlp(body.h[1].ln_2(there)))
        read = float(log_p(logits, answers, last).exp().mean())
    assert effects[0].p_stream == pytest.approx(full, rel=1e-4)
    assert effects[4].p_stream == pytest.approx(none, rel=1e-4)
    assert effects[4].p_read == pytest.approx(full, rel=1e-4)
    assert effects[3].p_read == pytest.approx(read, rel=1e-4)


def test_eligible_sites() -> None:
    def effects(*pairs: tuple[float, float]) -> list[SiteEffect]:
        return [SiteEffect(i, str(i), stream, read) for i, (stream, read) in enumerate(pairs)]

    assert eligible_sites(effects((0.9, 0.9), (0.1, 0.7), (0.1, 0.1), (0.0, 1.0))) == [0, 1]
    assert eligible_sites(effects((0.9, 0.2), (0.8, 0.3), (0.1, 0.1), (0.0, 1.0))) == [1]
    assert eligible_sites(effects((0.3, 0.2), (0.2, 0.3), (0.1, 0.1), (0.0, 1.0))) == [0]

"""Sweeps of sparse training: what is trained, what is measured, resuming, and the two figures by hand."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from frontier import Options, main

from sparse_model.config import SparseConfig, SparsityConfig
from sparse_model.model.transformer import SparseTransformer
from sparse_model.training import sweep
from sparse_model.training.finite import TrainingDiverged
from sparse_model.training.pretrain import PretrainConfig
from sparse_model.training.sweep import (
    Job,
    Outcome,
    ablations,
    dead_neurons,
    grid,
    kurtosis,
    run_job,
    run_sweep,
    total_entries,
)

BASE = PretrainConfig(
    steps=6,
    checkpoint_every=6,
    corpus_tokens=20_000,
    eval_tokens=512,
    sparse=SparseConfig(d_model=32, d_mlp=128, n_heads=2, n_ctx=32, d_vocab=300),
)


def test_kurtosis_by_hand() -> None:
    """Of one nonzero among n: (n^2 - 3n + 3) / (n - 1); of a two-valued vector 1; of a Gaussian 3."""
    one_hot = torch.eye(5)[None, :1]
    assert kurtosis(one_hot).item() == pytest.approx((25 - 15 + 3) / 4)
    assert kurtosis(torch.tensor([[1.0, -1.0, 1.0, -1.0]])).item() == pytest.approx(1)
    assert kurtosis(torch.randn(4, 100_000)).item() == pytest.approx(3, abs=0.1)


def test_dead_neurons_are_those_never_active() -> None:
    model = SparseTransformer(dataclasses.replace(BASE.sparse, topk_fraction=1.0, act_fn="relu"))
    with torch.no_grad():
        for layer, dead in ((0, 3), (1, 5)):
            fc = model.blocks[layer].mlp.fc
            fc.weight.zero_()
            fc.bias.fill_(1.0)
            fc.bias[:dead] = -1.0
    assert dead_neurons(model, torch.randint(300, (4, 32))) == 8


def test_a_grid_holds_the_nonzeros_fixed_over_the_widths() -> None:
    variants = grid(BASE, [4096, 8192], [32, 64])
    assert len(variants) == 6
    for variant in variants:
        config = variant.config
        assert config.sparse.d_mlp == 4 * config.sparse.d_model
        count = round(config.sparsity.nonzero_fraction * total_entries(config.sparse))
        assert count == (total_entries(config.sparse) if "dense" in variant.label else int(variant.label.split()[-1]))
    with pytest.raises(ValueError, match="nonzeros=1000000000: a model of width 32 has only"):
        grid(BASE, [10**9], [32])


def test_ablations_change_one_thing_each() -> None:
    variants = {variant.label: variant.config for variant in ablations(BASE)}
    assert variants["as it is"] == BASE
    assert variants["eps 1e-8"].optim == dataclasses.replace(BASE.optim, eps=1e-8)
    assert variants["j = 2"].sparsity == dataclasses.replace(BASE.sparsity, min_per_neuron=2)
    assert len(set(map(repr, variants.values()))) == len(variants)


@pytest.mark.slow
def test_a_sweep_takes_the_best_rate_to_the_other_seeds_and_resumes(tmp_path: Path, monkeypatch) -> None:
    (variant,) = grid(BASE, [4096], [32], dense=False)
    outcomes = run_sweep([variant], (1e-9, 4e-3), (0, 1), tmp_path)[variant.label]
    assert [(o.lr, o.seed) for o in outcomes] == [(4e-3, 0), (4e-3, 1)]
    folders = [path.name for path in tmp_path.iterdir() if path.name != "tokenizer"]
    assert sorted(folders) == [
        "width-32-nonzeros-4096-lr0.004-seed0",
        "width-32-nonzeros-4096-lr0.004-seed1",
        "width-32-nonzeros-4096-lr1e-09-seed0",
    ]
    for outcome in outcomes:
        assert outcome.nonzeros == pytest.approx(4096, abs=10)
        assert outcome.entries == total_entries(variant.config.sparse)
        assert 0 < outcome.loss < 7
        assert outcome.kurtosis > 1
    monkeypatch.setattr(sweep, "pretrain", None)  # in this process; what is there is only read
    job = Job(variant.label, BASE, tmp_path / "width-32-nonzeros-4096-lr0.004-seed1")
    assert run_job(job) == outcomes[1]


def test_a_diverged_training_counts_as_infinite_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverge(*args, **kwargs):
        raise TrainingDiverged("ce is no longer finite")

    monkeypatch.setattr(sweep, "pretrain", diverge)
    job = Job("some label", BASE, tmp_path / "job")
    first = run_job(job)
    assert first.loss == run_job(job).loss == math.inf
    assert json.loads((tmp_path / "job" / "outcome.json").read_text())["loss"] is None


@pytest.mark.parametrize("what", ["grid", "ablations"])
def test_the_figures_are_drawn_from_outcomes(what: str, tmp_path: Path, monkeypatch, capsys) -> None:
    def outcomes(variants, rates, seeds, folder, *, jobs):
        return {
            v.label: [Outcome(v.label, 4e-3, s, 2.0 + s, 8000, 16000, 9.0, 3, 256) for s in seeds] for v in variants
        }

    monkeypatch.setattr("frontier.run_sweep", outcomes)
    main(Options(what=what, plot=str(tmp_path / "figure.png"), out=str(tmp_path)))
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    rows = capsys.readouterr().out.splitlines()
    assert any("| 3.000 | 2.000 to 4.000 | 0.004 | 8000 | 1/2.0 | 9.0 | 3 of 256 |" in row for row in rows)


def test_an_empty_list_of_seeds_is_named() -> None:
    with pytest.raises(ValueError, match=r"seeds=\(\): name at least one"):
        main(Options(what="grid", seeds=()))


def test_sparsity_of_one_is_dense() -> None:
    (variant,) = grid(BASE, [], [32])
    assert variant.config.sparsity == SparsityConfig(nonzero_fraction=1.0)

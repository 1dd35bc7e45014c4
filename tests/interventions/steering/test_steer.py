"""Steering experiments: predicted effects against measured ones."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from support.steering_runs import SMALL, TASK, VOCAB, make_run, p_target

from bridges.hybrid import residuals
from bridges.run_folder import Run
from interventions import Channel, intervene, intervene_vector, load_dense
from interventions.bundle.bundle import get_bundle
from interventions.bundle.channels import residual_reads
from interventions.steering import ridge
from interventions.steering.experiment import read_experiment
from interventions.steering.measure import bootstrap
from interventions.steering.result import DRAWN, Steering, named_curves
from interventions.steering.steer import steer
from interventions.steering.steered_prompts import Prompts
from sparse_model.data.prepare import prepare_corpus
from sparse_model.model.transformer import SparseTransformer


def test_curves_are_those_of_intervene_toward_the_counterfactual(dense, prompts: Prompts, result: Steering) -> None:
    for n, indices in result.sets.items():
        channel = Channel(name="set", site=2, indices=tuple(indices), weights=(1.0,) * len(indices))
        for number, strength in enumerate(result.strength):
            with intervene(dense, channel, toward=prompts.counterfactual, strength=strength):  # type: ignore[arg-type]
                logits = dense(prompts.tokens)
            p, own = (p_target(logits, prompts._replace(target=ids)) for ids in (prompts.target, prompts.own_answer))
            assert result.channels[n][number] == pytest.approx(float(p.mean()), rel=1e-3)
            assert result.two_way[n][number] == pytest.approx(float((p / (p + own)).mean()), rel=1e-3)
    assert result.channels["2"][2] != pytest.approx(result.channels["2"][0], rel=1e-2)


def test_the_papers_curve_is_that_of_its_units(dense, prompts: Prompts, result: Steering) -> None:
    channel = Channel(name="set", site=2, indices=(3, 11), weights=(1.0, 1.0))
    with intervene(dense, channel, toward=prompts.counterfactual, units="paper"):  # type: ignore[arg-type]
        p = float(p_target(dense(prompts.tokens), prompts).mean())
    assert result.paper["2"][2] == pytest.approx(p, rel=2e-5)
    assert p != pytest.approx(result.channels["2"][2], rel=1e-4)  # random streams are all about as long


def test_ridge_moves_the_same_channels_through_its_own_columns(
    dense, run: Run, prompts: Prompts, result: Steering
) -> None:
    text = prepare_corpus(run.config, run.tokenizer, progress=False).train[: 512 // 64].long()
    streams = [ridge.stream_at(model, text, 2) for model in (run.sparse, run.dense)]
    fitted = ridge.fit_ridge(streams[0], streams[1])
    changes = residual_reads(run.sparse, prompts.counterfactual, 2) - residual_reads(run.sparse, prompts.tokens, 2)
    rms = residuals(run.sparse, prompts.tokens)[2].square().mean(-1, keepdim=True).sqrt()
    edit = rms * changes[..., [3, 11]] @ fitted.columns[[3, 11]]
    with intervene_vector(dense, 2, edit):
        p = float(p_target(dense(prompts.tokens), prompts).mean())
    base = result.ridge["2"][0]
    assert p != pytest.approx(base, rel=1e-5)
    assert result.ridge["2"][2] - base == pytest.approx(p - base, rel=0.05)


def test_strength_0_is_the_unsteered_model(dense, run: Run, prompts: Prompts, result: Steering) -> None:
    base = float(p_target(run.dense(prompts.tokens), prompts).mean())
    curves = named_curves(result)
    assert len(curves) == 2 + 2 + 2 + 2 + 2 * len(DRAWN) + 2  # random directions with two more norms
    for name, curve in curves.items():
        assert curve[0] == pytest.approx(base, rel=1e-4), name
        assert curve[2] != pytest.approx(base, rel=1e-5), name


@pytest.mark.parametrize("where", ["read", "stream"])
def test_all_channels_through_identity_bridges_are_the_exact_patch(tmp_path: Path, where: str) -> None:
    """Both models embed alike, with streams of mean 0 and RMS 1, so that LayerNorm and RMSNorm agree too."""
    make_run(tmp_path / "run", d_dense=16, d_sparse=16)
    dense = load_dense(tmp_path / "run")
    bundle = get_bundle(dense)
    signs = torch.ones(VOCAB, 16)
    signs[torch.arange(VOCAB)[:, None], torch.rand(VOCAB, 16).argsort(1)[:, :8]] = -1
    sparse = SparseTransformer(dataclasses.replace(bundle.run.sparse.cfg, topk_fraction=1.0))
    with torch.no_grad():
        bundle.hf.transformer.wte.weight.copy_(signs)
        bundle.hf.transformer.wpe.weight.zero_()
        sparse.token_embed.weight.copy_(signs)
        bundle.bridges.decoders[0].weight.copy_(torch.eye(16))
    bundle._run = bundle.run._replace(sparse=sparse)
    plan = dataclasses.replace(SMALL, channel="attn.0.read.0", task=TASK, sets=(tuple(range(16)),), where=where)
    result = steer(dense, dataclasses.replace(plan, draws=1, maps=1, searches=1), progress=False)
    assert result.channels["16"] == pytest.approx(result.exact_patch, rel=1e-4)
    assert result.exact_patch[2] != pytest.approx(result.exact_patch[0], rel=0.05)
    # The decoder is an exact linear map between the streams, so ridge regression finds it.
    assert result.ridge["16"] == pytest.approx(result.exact_patch, rel=1e-3)
    assert result.ridge_fit["nmse"] < 1e-6


def test_a_shuffle_that_leaves_the_decoder_alone_gives_the_channels_curve(
    dense, result: Steering, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert result.shuffled_mean != pytest.approx(result.channels["2"], rel=1e-2)
    monkeypatch.setattr(torch, "randperm", lambda n, generator: torch.arange(n))
    same = steer(dense, dataclasses.replace(SMALL, pairs=3, draws=1, maps=1), progress=False)
    assert same.shuffled_mean == pytest.approx(same.channels[same.reference], rel=1e-4)
    assert same.norms["shuffled"] == pytest.approx(same.norms[same.reference], rel=1e-4)


def test_random_directions_are_repeated_with_each_edits_own_norm(dense, result: Steering) -> None:
    assert set(result.random_own_p95) == {*result.sets, "difference_of_means"}
    assert result.random_own_p95[result.reference] == result.random_p95
    other = next(name for name in result.sets if name != result.reference)
    alone = dataclasses.replace(SMALL, sets=(tuple(result.sets[other]),))
    assert steer(dense, alone, progress=False).random_p95 == pytest.approx(result.random_own_p95[other], rel=1e-4)


def test_bootstrap_intervals() -> None:
    values = torch.randn(2, 400) + torch.tensor([[0.0], [3.0]])
    low, high = bootstrap(values, 2000, seed=1)
    mean, error = values.mean(1), values.std(1) / 20
    assert ((low < mean) & (mean < high)).all()
    assert torch.allclose(high - low, 2 * 1.96 * error, rtol=0.1)
    assert torch.equal(low, bootstrap(values, 2000, seed=1)[0])
    assert not torch.equal(low, bootstrap(values, 2000, seed=2)[0])
    constant = bootstrap(torch.full((5,), 0.25), 10, seed=0)
    assert [float(end) for end in constant] == pytest.approx([0.25, 0.25])


def test_a_result_goes_to_json_and_back_and_its_experiment_gives_it_again(dense, result: Steering) -> None:
    again = Steering(**json.loads(json.dumps(result._asdict())))
    assert again == result
    plan = read_experiment(again.experiment)
    assert (plan.task, plan.seed, plan.sets) == (TASK, 0, ((3,), (3, 11)))
    assert steer(dense, plan, progress=False) == result
    with pytest.raises(ValueError, match="unknown key drawz"):
        read_experiment(again.experiment | {"drawz": 3})


def test_the_script_steers_sets_from_the_command_line(dense, tmp_path: Path, capsys) -> None:
    import tyro

    from interventions.cli import steer as script

    run = get_bundle(dense).folder
    names = ("pairs", "draws", "maps", "searches", "ridge-tokens", "text-tokens", "task-pairs", "new-tokens")
    counts = [f"--{name}=1" for name in names]
    sets = ["--sets", "3", "--sets", "3", "7", "--strengths", "0", "1", "--out", str(tmp_path), "--anyway"]
    script.main(tyro.cli(script.Options, args=["--run", str(run), "--channel", "pair", *sets, *counts]))
    found = json.loads((tmp_path / "metrics.json").read_text())
    steering = Steering(**found["steering"][TASK])
    assert steering.sets == {"1": [3], "2": [3, 7]}
    assert set(found["dense_task"][TASK]) == {"pair_accuracy", "p_right", "p_wrong"}
    assert (tmp_path / "steering.png").exists()
    assert not (run / "metrics.json").exists()
    printed = capsys.readouterr().out
    for name, curve in named_curves(steering).items():
        short = name.replace("95th percentile", "p95").replace("random directions as long as", "random, as long as")
        assert re.search(rf"^{short} +{curve[0]:.3f} +{curve[1]:.3f}", printed, re.MULTILINE)
    for name in ("unsteered", "2 channels", "random"):
        assert re.search(rf"^{name} .* ([a-z_]+ \d\.\d\d|none solved)$", printed, re.MULTILINE)
    assert max(len(line) for line in printed.splitlines() if not line.startswith(("plot: ", "next: "))) <= 100

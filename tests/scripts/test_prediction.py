"""The prediction study: predicted from the sparse model alone, registered, and compared with the right null."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import prediction
import prediction_figures
import pytest
import torch
from support.helpers import make_tiny_run

from bridges.run_folder import Run
from bridges.sites import Site
from interventions import load_dense
from interventions.bundle.channels import read_gain, reads_and_rms

OPTIONS = prediction.Options(channels=10, rows=4, draws=5)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_tiny_run(tmp_path_factory.mktemp("prediction") / "run")


@pytest.fixture(scope="module", autouse=True)
def few_sets() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prediction, "_SETS", 1)
        patch.setattr(prediction, "_SIZES", (1, 4))
        yield


@pytest.fixture(scope="module")
def plan(run: Run) -> prediction.Plan:
    return prediction.make_plan(run, OPTIONS)


def test_the_plan_counts_nothing_twice(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prediction, "_SETS", 3)
    plan = prediction.make_plan(run, OPTIONS)
    pairs = list(zip(plan.site.tolist(), plan.channel.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs) >= OPTIONS.channels
    sets = [(site, tuple(members)) for site, members in zip(plan.set_site.tolist(), plan.members.tolist(), strict=True)]
    assert sum(all(members) for _, members in sets) == 5  # once a site
    assert sorted(sum(members) for site, members in sets if site == 2) == [1, 1, 1, 4, 4, 4, 32]
    assert len({tuple(row) for row in plan.tokens.tolist()}) == OPTIONS.rows
    assert plan.tokens[::2, -1].tolist() == plan.tokens[1::2, -1].tolist()
    assert run.tokenizer.eos_token_id not in (*plan.tokens[:, -1].tolist(), *plan.following.tolist())


@torch.no_grad()
def test_the_prediction_is_the_sparse_models_own_change(run: Run, plan: prediction.Plan) -> None:
    """By whole passes, one channel after the other; the dense model, the encoders and the decoders are gone."""
    alone = run._replace(dense=None, bridges=None)  # type: ignore[arg-type]
    predicted = prediction.predict(alone, plan)
    base = run.sparse(plan.tokens)[:, -1]
    for number in range(0, len(plan.site), 3):
        site, channel = Site(int(plan.site[number]), 2), int(plan.channel[number])
        gain = read_gain(run.sparse, site.index)[channel]
        rms = reads_and_rms(run.sparse, plan.tokens, site.index)[1][:, -1, 0]
        edits = {"last": (site.read_hook, -1, gain), "all": (site.read_hook, slice(None), gain)}
        for edit, (name, at, amount) in (edits | {"stream": (site.stream_hook, -1, rms)}).items():

            def move(value: torch.Tensor, hook: object, at=at, amount=amount, channel=channel) -> torch.Tensor:  # type: ignore[no-untyped-def]
                value = value.clone()
                value[:, at, channel] += amount * plan.delta
                return value

            with run.sparse.hooks(fwd_hooks=[(name, move)]):
                change = run.sparse(plan.tokens)[:, -1] - base
            wanted = change - change.mean(-1, keepdim=True)
            torch.testing.assert_close(predicted[edit][number], wanted, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_permutation_of_what_is_measured_is_a_shuffled_decoder(run: Run, plan: prediction.Plan) -> None:
    dense = load_dense(run.folder)
    measured = prediction.measure(dense, plan)
    order = prediction_figures.shuffled(plan.site, torch.Generator().manual_seed(3))
    assert torch.equal(plan.site[order], plan.site)
    assert sorted(order.tolist()) == list(range(len(order)))
    assert order.tolist() != sorted(order.tolist())
    for site in range(5):
        here = plan.site == site
        weight = dense.bundle.run.bridges.decoders[site].weight
        weight[:, plan.channel[here]] = weight[:, plan.channel[order][here]].clone()
    again = prediction.measure(dense, plan)
    for edit in prediction_figures.EDITS:
        torch.testing.assert_close(again[edit], measured[edit][order], atol=1e-5, rtol=1e-4)
        assert not torch.allclose(measured[edit], measured[edit][order], atol=1e-3)


def test_figures_of_agreement_by_hand() -> None:
    x, y = torch.tensor([1.0, -2.0, 0.0, 3.0]), torch.tensor([2.0, -1.0, 5.0, -6.0])
    found = prediction_figures.agreement(x, y)
    assert found["same_sign"] == pytest.approx(2 / 3)  # nothing is said of the third
    assert found["same_sign_of_large"] == 0  # the last one alone
    assert found["slope"] == pytest.approx((2 + 2 - 18) / (1 + 4 + 9))
    assert found["correlation"] == pytest.approx(float(torch.corrcoef(torch.stack([x, y]))[0, 1]), abs=1e-6)
    ranks = torch.tensor([[2.0, 0, 1, 3], [2.0, 1, 3, 0]])
    assert found["rank_correlation"] == pytest.approx(float(torch.corrcoef(ranks)[0, 1]), abs=1e-6)


def test_a_decoder_that_carries_the_meaning_is_told_from_shuffled_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    site, following = torch.arange(3).repeat_interleave(20), torch.randint(40, (4,), generator=generator)
    predicted = torch.randn(60, 4, 40, generator=generator)
    noise = torch.randn(60, 4, 40, generator=generator)
    for strength, told in ((0.5, True), (0.0, False)):
        found = prediction_figures.compare(site, following, predicted, strength * predicted + noise, 99, 0)
        for quantity in ("top", "next"):
            assert (found[quantity]["null"]["correlation"]["p_value"] <= 0.02) is told
            assert abs(found[quantity]["null"]["correlation"]["mean"]) < 0.1
        if told:
            assert found["top"]["slope"] == pytest.approx(0.5, abs=0.1)
            assert found["top"]["pairs"] == 240
            assert set(found["top"]["sites"]) == {"0", "1", "2"}


def test_the_script_writes_prediction_figures_and_picture(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    prediction.main(replace(OPTIONS, run=str(run.folder), out=str(out)))
    figures, record = (json.loads((out / name).read_text()) for name in ("figures.json", "prediction.json"))
    assert figures["prediction"] == record["sha256"]
    assert (out / "prediction.png").stat().st_size > 20_000
    said = capsys.readouterr().out
    assert record["sha256"] in said.split("now the dense model")[0]
    assert f"| read, last token | the token predicted to move most | {4 * record['channels']} |" in said
    path = out / "prediction.safetensors"
    prediction.read_prediction(out)
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(ValueError, match="is not what was registered"):
        prediction.read_prediction(out)


def test_what_does_not_fit_is_refused(run: Run, tmp_path: Path) -> None:
    for change, words in (({"rows": 1}, "rows=1"), ({"channels": 0}, "channels=0"), ({"draws": 0}, "draws=0")):
        with pytest.raises(ValueError, match=words):
            prediction.main(replace(OPTIONS, run=str(run.folder), out=str(tmp_path / "out"), **change))
    assert not (tmp_path / "out").exists()

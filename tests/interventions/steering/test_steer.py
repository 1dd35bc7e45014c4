"""Steering experiments: predicted effects against measured ones, controls in cases whose answer is known."""

import dataclasses
import json
import random
import re
import statistics
from functools import cache
from pathlib import Path

import pytest
import torch
from support import helpers
from transformers import PreTrainedTokenizerFast

from bridges.hybrid import residuals, suffix
from bridges.run_folder import Run
from interventions import Channel, intervene, intervene_vector, load_dense
from interventions.bundle.bundle import get_bundle
from interventions.bundle.channels import read_nodes, save_channel
from interventions.steering import edits as steering_edits
from interventions.steering import side_effects
from interventions.steering import steered_prompts as answers
from interventions.steering import strengths as doses
from interventions.steering.experiment import chosen_strengths, default_strengths, read_experiment, resolved
from interventions.steering.experiment_config import Experiment
from interventions.steering.result import DRAWN, Steering, named_curves, quiet_strength
from interventions.steering.side_effects import Bystanders, SideEffects, fixed_vector, mean_effects
from interventions.steering.steer import bootstrap, steer
from interventions.steering.steered_prompts import Prompts, SteeredPrompts, plain_model, prompts_of
from interventions.steering.strengths import LADDER
from interventions.tasks.base import pair_accuracy
from interventions.tasks.catalogue import get_task, list_tasks
from sparse_model.data.generated_python import generate_document
from sparse_model.data.prepare import prepare_corpus
from sparse_model.data.tokenizer import train_tokenizer
from sparse_model.model.transformer import SparseTransformer

VOCAB = 512
TASK = "single_double_quote"
CHANNEL = Channel(name="pair", site=2, indices=(3, 11), weights=(1.0, -0.5), selection={"task": TASK})
SMALL = Experiment(
    channel="pair",
    sets=((3,), (3, 11)),
    strengths=(0, 0.5, 1),
    pairs=6,
    draws=3,
    maps=2,
    resamples=50,
    ridge_tokens=512,
    text_tokens=128,
    task_pairs=2,
    new_tokens=3,
)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Large enough to present every task."""
    rng = random.Random(0)
    return train_tokenizer([generate_document(rng) for _ in range(600)], VOCAB)


def make_run(folder: Path, **widths: int) -> Run:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(helpers, "TINY_VOCAB", VOCAB)
        patch.setattr(helpers, "tiny_tokenizer", tokenizer)
        return helpers.make_tiny_run(folder, **widths)


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSE_BRIDGES_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    make_run(folder)
    save_channel(folder, CHANNEL)
    dense = load_dense(folder)
    get_bundle(dense).bridges.rms_sparse *= 100  # or the random decoders' edits would hardly be felt
    return dense


@pytest.fixture(scope="module")
def run(dense) -> Run:
    return get_bundle(dense).run


@pytest.fixture(scope="module")
def result(dense) -> Steering:
    return steer(dense, SMALL, progress=False)


@pytest.fixture
def prompts(run: Run) -> Prompts:
    """Of several lengths, whose edits begin at different tokens."""
    return prompts_of(get_task(TASK, run.tokenizer).sample(6, split="evaluation", seed=0))


def p_target(logits: torch.Tensor, prompts: Prompts) -> torch.Tensor:
    row = torch.arange(len(prompts.last))
    return logits.detach()[row, prompts.last].softmax(-1)[row, prompts.target]


@pytest.mark.parametrize("where", ["read", "stream"])
@pytest.mark.parametrize("site", [0, 3, 4])
def test_batched_edits_equal_one_whole_pass_each(
    dense, run: Run, site: int, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the TransformerLens model, without a cache; of four edits three go into a chunk, and few into a pass."""
    prompts = prompts_of(get_task(TASK, run.tokenizer).sample(20, split="evaluation", seed=0))
    monkeypatch.setattr(answers, "_TOKENS", 24)
    monkeypatch.setattr(answers, "_ENTRIES", 3 * prompts.tokens.numel() * 16)
    edits = torch.randn(4, *prompts.tokens.shape, 16) * prompts.open[..., None]
    steered = SteeredPrompts(plain_model(dense), prompts, site, where)  # type: ignore[arg-type]
    assert len({group.start for group in steered._groups}) > 3
    assert {len(group.rows) for group in steered._groups} >= {1, 2}
    found = steered.answers(edits, (0.4, 1))
    for number, strength in enumerate((0.4, 1)):
        for at, edit in enumerate(edits):
            with intervene_vector(dense, site, edit, strength=strength, where=where):  # type: ignore[arg-type]
                logits = dense(prompts.tokens)
            assert torch.allclose(found.target[number, at], p_target(logits, prompts), rtol=1e-3, atol=1e-7)
    assert (found.target[1] / steered.base.target - 1).abs().max() > 0.05


def test_every_task_is_steered_from_its_own_answer(dense, run: Run) -> None:
    for name in list_tasks():
        prompts = prompts_of(get_task(name, run.tokenizer, max_tokens=64).sample(4, split="evaluation", seed=1))
        base = SteeredPrompts(plain_model(dense), prompts, 1, "read").base
        p = p_target(run.dense(prompts.tokens), prompts)
        own = p_target(run.dense(prompts.tokens), prompts._replace(target=prompts.own))
        assert torch.allclose(base.target, p, rtol=1e-3), name
        assert torch.allclose(base.two_way, p / (p + own), rtol=1e-3), name


def test_curves_are_those_of_intervene_toward_the_counterfactual(dense, prompts: Prompts, result: Steering) -> None:
    for n, indices in result.sets.items():
        channel = Channel(name="set", site=2, indices=tuple(indices), weights=(1.0,) * len(indices))
        for number, strength in enumerate(result.strength):
            with intervene(dense, channel, toward=prompts.counterfactual, strength=strength):  # type: ignore[arg-type]
                logits = dense(prompts.tokens)
            p, own = (p_target(logits, prompts._replace(target=ids)) for ids in (prompts.target, prompts.own))
            assert result.channels[n][number] == pytest.approx(float(p.mean()), rel=1e-3)
            assert result.two_way[n][number] == pytest.approx(float((p / (p + own)).mean()), rel=1e-3)
    assert result.channels["2"][2] != pytest.approx(result.channels["2"][0], rel=1e-2)


def test_ridge_moves_the_same_channels_through_its_own_columns(
    dense, run: Run, prompts: Prompts, result: Steering
) -> None:
    text = prepare_corpus(run.config, run.tokenizer, progress=False).train[: 512 // 64].long()
    streams = [steering_edits.stream_at(model, text, 2) for model in (run.sparse, run.dense)]
    ridge = steering_edits.fit_ridge(streams[0], streams[1])
    changes = read_nodes(run.sparse, prompts.counterfactual, 2) - read_nodes(run.sparse, prompts.tokens, 2)
    edit = run.bridges.rms_sparse[2] * changes[..., [3, 11]] @ ridge.columns[[3, 11]]
    with intervene_vector(dense, 2, edit):
        p = float(p_target(dense(prompts.tokens), prompts).mean())
    assert result.ridge["2"][2] == pytest.approx(p, rel=1e-3)
    assert p != pytest.approx(result.channels["2"][2], rel=1e-2)


def test_strength_0_is_the_unsteered_model(dense, run: Run, prompts: Prompts, result: Steering) -> None:
    base = float(p_target(run.dense(prompts.tokens), prompts).mean())
    curves = named_curves(result)
    assert len(curves) == 2 + 2 + 2 + 2 * len(DRAWN) + 2  # random directions with two more norms
    for name, curve in curves.items():
        assert curve[0] == pytest.approx(base, rel=1e-4), name
        assert curve[2] != pytest.approx(base, rel=1e-4), name


@pytest.mark.parametrize("site", range(4))
def test_exact_patch_is_the_models_own_counterfactual(dense, run: Run, prompts: Prompts, site: int) -> None:
    hf = plain_model(dense)
    streams = [residuals(run.dense, tokens) for tokens in (prompts.tokens, prompts.counterfactual)]
    here, there = streams[0][site], streams[1][site]
    own = {
        "stream": run.dense(prompts.counterfactual),
        "read": suffix(run.dense, site + 1, here + run.dense.sublayer(site, there) - there, prompts.tokens),
    }
    for where, logits in own.items():
        edit = steering_edits.exact_patch(hf, run.dense, site, prompts, where)  # type: ignore[arg-type]
        found = SteeredPrompts(hf, prompts, site, where).answers([edit], (1,))  # type: ignore[arg-type]
        assert torch.allclose(found.target[0, 0], p_target(logits, prompts), rtol=1e-3, atol=1e-7)


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
        bundle.bridges.rms_sparse[0] = 1
    bundle._run = bundle.run._replace(sparse=sparse)
    plan = dataclasses.replace(SMALL, channel="attn.0.read.0", task=TASK, sets=(tuple(range(16)),), where=where)
    result = steer(dense, dataclasses.replace(plan, draws=1, maps=1), progress=False)
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


def test_drawn_controls_are_as_long_as_the_edit_at_every_token(run: Run, prompts: Prompts) -> None:
    generator = torch.Generator().manual_seed(0)
    norm = torch.rand(*prompts.tokens.shape, 1) * prompts.open[..., None]
    directions = steering_edits.random_directions(4, 16, generator)
    for edit in steering_edits.along(directions, norm):
        assert torch.allclose(edit.norm(dim=-1, keepdim=True), norm, atol=1e-6)
    changes = steering_edits.activation_changes(run, 2, prompts)
    columns = run.bridges.directions(2)
    assert (changes[~prompts.open] == 0).all()
    moved = changes[..., [3, 11]].norm(dim=-1, keepdim=True) > 0
    assert moved.any()
    fresh = list(steering_edits.untrained_columns(run.bridges, 2, seed=0))
    assert not torch.equal(fresh[0], fresh[1])
    for one in (*steering_edits.shuffled_columns(columns, 2, generator), *fresh):
        assert one.shape == columns.shape
        edit = steering_edits.scaled(steering_edits.channel_edit(changes, one, torch.tensor(0.3), [3, 11]), norm)
        assert torch.allclose(edit.norm(dim=-1, keepdim=True), norm * moved, atol=1e-6)


def test_random_directions_are_repeated_with_each_edits_own_norm(dense, result: Steering) -> None:
    assert set(result.random_own_p95) == {*result.sets, "difference_of_means"}
    assert result.random_own_p95[result.reference] == result.random_p95
    other = next(name for name in result.sets if name != result.reference)
    alone = dataclasses.replace(SMALL, sets=(tuple(result.sets[other]),))
    assert steer(dense, alone, progress=False).random_p95 == pytest.approx(result.random_own_p95[other], rel=1e-4)


def test_random_channels_are_signed_sums_of_other_columns() -> None:
    drawn = steering_edits.random_channels(torch.eye(12), {0, 5, 7}, 4, 50, torch.Generator().manual_seed(0))
    assert ((drawn != 0).sum(1) == 4).all()
    assert (drawn[:, [0, 5, 7]] == 0).all()
    assert torch.allclose(drawn[drawn != 0].abs(), torch.tensor(0.5))
    assert (drawn < 0).any()
    assert (drawn > 0).any()
    everything = steering_edits.random_channels(torch.eye(3), {0, 1, 2}, 3, 2, torch.Generator())
    assert torch.allclose(everything.abs(), torch.full((2, 3), 3**-0.5))


def test_ridge_recovers_a_linear_relation_and_shrinks_noise() -> None:
    x, columns, bias = torch.randn(400, 12) * torch.logspace(-1, 1, 12), torch.randn(12, 5), torch.randn(5)
    exact = steering_edits.fit_ridge(x, x @ columns + bias)
    assert torch.allclose(exact.columns, columns, atol=1e-4)
    assert torch.allclose(exact.bias, bias, atol=1e-4)
    assert exact.penalty == min(steering_edits.PENALTIES)
    noise = steering_edits.fit_ridge(x, torch.randn(400, 5))
    assert noise.penalty > 0.01
    # By hand: variance and covariance are 2/3, and the penalty is in units of the variance.
    one = steering_edits.fit_ridge(torch.tensor([[-1.0], [0.0], [1.0]]), torch.tensor([[0.0], [1.0], [2.0]]), (0.5,))
    assert float(one.columns) == pytest.approx(1 / 1.5)
    assert float(one.bias) == pytest.approx(1)


def test_difference_of_means_is_one_vector_per_kind_of_token(run: Run) -> None:
    batch = get_task(TASK, run.tokenizer).sample(8, split="selection", seed=0)
    prompts = prompts_of(batch)
    laid_out = steering_edits.difference_of_means(run.dense, batch, 2, prompts)
    streams = [residuals(run.dense, batch.tokens[:, m])[2] for m in (0, 1)]
    differs = batch.tokens[:, 0] != batch.tokens[:, 1]
    mean = (streams[1] - streams[0])[differs].mean(0)
    assert torch.allclose(laid_out[differs], mean.expand(int(differs.sum()), -1), atol=1e-5)
    assert (laid_out[~prompts.open] == 0).all()
    later = laid_out[prompts.open & ~differs]
    assert torch.equal(later, later[:1].expand_as(later))


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


@pytest.fixture(scope="module")
def bystanders(dense, run: Run) -> Bystanders:
    """An untrained model solves no task, so here every task counts as solved."""
    text = torch.randint(VOCAB, (5, 24), generator=torch.Generator().manual_seed(3))
    prompts = prompts_of(get_task(TASK, run.tokenizer).sample(6, split="evaluation", seed=0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(side_effects, "SOLVED", 0)
        plan = dataclasses.replace(SMALL, task=TASK, where="stream", seed=0)
        return Bystanders(plain_model(dense), run, prompts, 2, plan, text)


def test_a_zero_edit_has_no_side_effects(bystanders: Bystanders) -> None:
    unsteered = bystanders.measure(None)
    assert bystanders.measure(torch.zeros(16)) == unsteered
    assert unsteered.kl == 0
    assert bystanders.measure(torch.randn(16)).kl > 0.01


def test_side_effects_equal_those_written_out(bystanders: Bystanders, run: Run, monkeypatch) -> None:
    vector, prompts = torch.randn(16), bystanders.prompts

    def steered(tokens: torch.Tensor) -> torch.Tensor:
        return suffix(run.dense, 2, residuals(run.dense, tokens)[2] + vector, tokens)

    generated = torch.randint(VOCAB, (6, 3))
    monkeypatch.setattr(bystanders, "_sample", lambda: generated)
    found = bystanders.measure(vector)
    text = torch.cat(bystanders.text)
    p, q = run.dense(text).log_softmax(-1), steered(text).log_softmax(-1)
    assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert found.p_target == pytest.approx(float(p_target(steered(prompts.tokens), prompts).mean()), rel=1e-3)
    assert set(found.pair_accuracy) == set(list_tasks()) - {TASK}
    for name in ("with_open", "while_return_true", "var_swap"):
        batch = get_task(name, run.tokenizer, max_tokens=64).sample(2, split="evaluation", seed=0)
        logits = steered(batch.tokens.flatten(0, 1)).unflatten(0, (-1, 2))
        assert found.pair_accuracy[name] == float(pair_accuracy(logits, batch))
    for tokens, perplexity in (
        (prompts.tokens, found.perplexity),
        (prompts.counterfactual, found.perplexity_counterfactual),
    ):
        losses = []
        for prompt, last, new in zip(tokens, prompts.last, generated, strict=True):
            whole = torch.cat([prompt[: last + 1], new])
            logp = run.dense(whole[None])[0].log_softmax(-1)
            losses += [-float(logp[last + i, token]) for i, token in enumerate(new)]
        assert perplexity == pytest.approx(2.718281828 ** statistics.mean(losses), rel=1e-3)


def test_text_is_sampled_under_the_edit(bystanders: Bystanders) -> None:
    """A vector that makes one token all but certain, generated tokens included."""
    head = bystanders.hf.lm_head.weight
    sure = Bystanders.__new__(Bystanders)
    sure.__dict__ |= bystanders.__dict__ | {"site": 4, "where": "read"}
    with sure._edited(100 * head[17] / head[17].norm()):
        drawn = sure._sample()
    likely = (head @ (head[17] - head[17].mean())).argmax()
    assert (drawn == likely).all()
    assert torch.equal(bystanders._sample(), bystanders._sample())
    assert not (bystanders._sample() == likely).all()


def test_sampling_goes_on_behind_each_prompts_last_token(
    bystanders: Bystanders, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def most_likely(p: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
        return p.argmax(1, keepdim=True)

    monkeypatch.setattr(torch, "multinomial", most_likely)
    drawn = bystanders._sample()
    for prompt, last, new in zip(bystanders.prompts.tokens, bystanders.prompts.last, drawn, strict=True):
        tokens = prompt[: last + 1]
        for token in new:
            assert int(run.dense(tokens[None])[0, -1].argmax()) == int(token)
            tokens = torch.cat([tokens, token[None]])


def test_the_fixed_vector_is_the_mean_over_moved_tokens() -> None:
    edit = torch.zeros(2, 3, 4)
    edit[0, 1], edit[1, 2] = torch.tensor([1.0, 0, 0, 0]), torch.tensor([0, 3.0, 0, 0])
    assert fixed_vector(edit).tolist() == [0.5, 1.5, 0, 0]
    assert fixed_vector(torch.zeros(2, 3, 4)).tolist() == [0, 0, 0, 0]
    effects = [SideEffects(1.0, 0.2, kl, {"with_as": accuracy}, 4.0, 6.0) for kl, accuracy in ((1.0, 0.5), (2.0, 1.0))]
    assert mean_effects(effects) == SideEffects(1.0, 0.2, 1.5, {"with_as": 0.75}, 4.0, 6.0)


def test_strengths_chosen_on_selection_prompts_are_measured(
    dense, result: Steering, monkeypatch: pytest.MonkeyPatch
) -> None:
    selection = {
        "task": TASK,
        "sets": {"1": [3], "2": [3, 11]},
        "doses": {"1": {"strength": 4.0}, "2": {"strength": 0.5}},
        "candidates": [3, 11, 12],
    }
    channel = dataclasses.replace(CHANNEL, selection=selection)
    monkeypatch.setitem(get_bundle(dense).channels, "pair", channel)
    assert list(default_strengths({"1": 4.0, "2": 0.5})) == [*(i / 10 for i in range(11)), 1.25, 1.5, 2, 2.5, 3, 4]
    assert list(default_strengths({"1": 0.75})) == [*(i / 10 for i in range(8)), 0.75, 0.8, 0.9, 1]
    # Another set of the same size has none.
    assert chosen_strengths(channel, [[5], [3, 11]]) == {"2": 0.5}
    found = steer(dense, dataclasses.replace(SMALL, strengths=(0, 0.5), maps=3), progress=False)
    assert "1" not in found.chosen  # 4 was not asked for
    assert found.chosen["2"] == 0.5
    assert {name: len(values) for name, values in found.searched.items()} == {"shuffled": 3, "untrained": 3}
    # Side effects are those at the quiet strength.
    assert (quiet_strength(found, "2"), quiet_strength(result, "2")) == (0.5, 1)
    norm = result.side_effects["2"]["norm"] / 2
    assert found.side_effects["2"]["norm"] == pytest.approx(norm, rel=1e-4)


def test_the_difference_of_means_gets_a_strength_like_any_set(dense, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    selection = {"task": TASK, "sets": {"1": [3]}, "doses": {"1": {"strength": 1.25}}}
    monkeypatch.setitem(get_bundle(dense).channels, "pair", dataclasses.replace(CHANNEL, selection=selection))
    monkeypatch.setattr(doses, "QUIET", 1.0)
    monkeypatch.setattr(doses, "NEARLY", 1.0)
    chosen_on = get_task(TASK, run.tokenizer, max_tokens=run.config.sparse.n_ctx).sample(6, split="selection", seed=1)
    found = steer(dense, dataclasses.replace(SMALL, strengths=(), sets=(), seed=1), progress=False)
    prompts = prompts_of(chosen_on)
    edit = steering_edits.difference_of_means(run.dense, chosen_on, found.site, prompts)
    p = SteeredPrompts(get_bundle(dense).run.dense.hf, prompts, found.site, "read").answers([edit], LADDER).target
    best = LADDER[int(p.mean(2)[:, 0].argmax())]
    assert found.chosen == {"1": 1.25, "difference_of_means": best}
    assert found.strength == list(default_strengths(found.chosen))
    assert quiet_strength(found, "difference_of_means") == max(1.0, best)


def test_the_script_steers_sets_from_the_command_line(dense, tmp_path: Path, capsys) -> None:
    import tyro

    from interventions.cli import steer as script

    run = get_bundle(dense).folder
    counts = [f"--{n}=1" for n in ("pairs", "draws", "maps", "ridge-tokens", "text-tokens", "task-pairs", "new-tokens")]
    sets = ["--sets", "3", "--sets", "3", "7", "--strengths", "0", "1", "--out", str(tmp_path)]
    script.main(tyro.cli(script.Options, args=["--run", str(run), "--channel", "pair", *sets, *counts]))
    found = json.loads((tmp_path / "metrics.json").read_text())
    steering = Steering(**found["steering"][TASK])
    assert steering.sets == {"1": [3], "2": [3, 7]}
    assert set(found["dense_task"][TASK]) == {"pair_accuracy", "p_right", "p_wrong"}
    assert (tmp_path / "steering.png").exists()
    assert not (run / "metrics.json").exists()
    printed = capsys.readouterr().out
    for name, curve in named_curves(steering).items():
        assert re.search(rf"^{name} +{curve[0]:.4f} +{curve[1]:.4f}", printed, re.MULTILINE)
    for name in ("unsteered", "2 channels", "random"):
        assert re.search(rf"^{name} .*\d\.\d\d \(", printed, re.MULTILINE)

"""Controls of a circuit: each against a model or a rule whose answer is known, and the table they end up in."""

import math
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from support.helpers import make_tiny_run
from support.solver import gates_of, solver, solver_batch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from bridges.hybrid import residuals
from bridges.run_folder import Run
from interventions.bundle.channels import Channel
from interventions.circuits.ablation import measure_ablation
from interventions.circuits.circuit import Circuit, make_circuit
from interventions.circuits.controls import Validation, control_results, format_validation, validate
from interventions.circuits.interchange import channel_nodes, interchange
from interventions.circuits.measures import Repruned
from interventions.circuits.node_model import Kept, NodeModel, as_nodes, locations
from interventions.circuits.prune_config import PruneConfig
from interventions.circuits.pruning import prune
from interventions.circuits.rivals import FrozenNorms, by_word, random_nodes, redrawn, scrambled
from interventions.tasks.base import TaskBatch, log_odds
from interventions.tasks.catalogue import get_task, list_tasks
from sparse_model.data.generated_python import generate_document
from sparse_model.data.tokenizer import train_tokenizer
from sparse_model.io.reading import typed


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_tiny_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(params=["sparse", "dense"])
def model(run: Run, request: pytest.FixtureRequest) -> NodeModel:
    return as_nodes(getattr(run, request.param))


@pytest.fixture
def batch(run: Run) -> TaskBatch:
    return get_task("single_double_quote", run.tokenizer).sample(6, split="evaluation", seed=0)


def nodes_of(model: NodeModel, *chosen: tuple[str, int]) -> Kept:
    masks = {at.name: torch.zeros(at.width, dtype=torch.bool) for at in locations(model.shape)}
    for name, channel in chosen:
        masks[name][channel] = True
    return masks


def test_scrambled_answers_carry_no_information_but_keep_the_form() -> None:
    batch = solver_batch(400)
    other = scrambled(batch, seed=1)
    assert torch.equal(other.tokens, batch.tokens)
    swapped = (other.answers == batch.answers.flip(1)).all(1)
    assert ((other.answers == batch.answers).all(1) | swapped).all()
    assert 150 < int(swapped.sum()) < 250


def follows_a_word(splits: list[TaskBatch], exchanged: list[Tensor]) -> bool:
    """Whether at some place from the end every token that occurs there goes with one decision, in all splits."""
    for back in range(min(int(batch.last.min()) for batch in splits)):
        seen: dict[int, set[bool]] = {}
        for batch, flags in zip(splits, exchanged, strict=True):
            words = batch.tokens[torch.arange(len(batch.last)), 0, batch.last - back]
            for word, flag in zip(words.tolist(), flags.tolist(), strict=True):
                seen.setdefault(word, set()).add(flag)
        if all(len(flags) == 1 for flags in seen.values()):
            return True
    return False


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One that can present every task."""
    rng = random.Random(1)
    return train_tokenizer([generate_document(rng) for _ in range(2000)], 512)


@pytest.mark.parametrize("name", list_tasks())
def test_a_nonsense_rule_holds_in_both_splits_and_means_nothing(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    task = get_task(name, tokenizer)
    splits = [task.sample(300, split="train", seed=0), task.sample(64, split="selection", seed=0)]

    def exchanged(batches: tuple[TaskBatch, TaskBatch]) -> list[Tensor]:
        for new, old in zip(batches, splits, strict=True):
            assert torch.equal(new.tokens, old.tokens)
        return [(new.answers != old.answers).all(1) for new, old in zip(batches, splits, strict=True)]

    flags = exchanged(by_word(*splits, seed=0))
    assert follows_a_word(splits, flags)
    assert 0.35 < flags[0].double().mean() < 0.65
    assert 0.1 < flags[1].double().mean() < 0.9
    assert not torch.equal(flags[0], exchanged(by_word(*splits, seed=1))[0])
    coins = (scrambled(splits[0], seed=0), scrambled(splits[1], seed=1))
    assert not follows_a_word(splits, exchanged(coins))


def test_prompts_without_a_varying_word_have_no_nonsense_rule() -> None:
    batch = solver_batch(8)
    batch = batch._replace(tokens=torch.where(batch.tokens > 2, 3, batch.tokens))
    with pytest.raises(ValueError, match="no word of the prompts varies"):
        by_word(batch, batch, seed=0)


def test_redrawn_weights_stay_where_they_were(run: Run) -> None:
    for part in (run.sparse, run.dense):
        fresh = redrawn(as_nodes(part), seed=0)
        before, after = (dict(m.named_parameters()) for m in (as_nodes(part).module, fresh.module))
        for name, old in before.items():
            new = after[name]
            assert torch.equal(old != 0, new != 0), name
            if old.ndim == 2 and old.any():
                assert not torch.equal(old, new)
                assert new.std().item() == pytest.approx(old.std().item(), rel=0.1), name
    assert redrawn(as_nodes(run.sparse), seed=0).module is not run.sparse


def test_random_nodes_match_the_circuit_place_by_place_and_avoid_it(run: Run, batch: TaskBatch) -> None:
    model = as_nodes(run.sparse)
    generator = torch.Generator().manual_seed(4)
    kept = {at.name: torch.rand(at.width, generator=generator) < 0.3 for at in locations(model.shape)}
    draws = list(random_nodes(model, kept, batch, 3, seed=0))
    for drawn in draws:
        assert all(int(drawn[n].sum()) == int(kept[n].sum()) for n in kept)
        assert not any((drawn[n] & kept[n]).any() for n in kept)
    assert any(not torch.equal(draws[0][n], draws[1][n]) for n in kept)


def zeroed(at: str, *channels: int) -> Callable[[str, Tensor], Tensor]:
    def edit(name: str, values: Tensor) -> Tensor:
        if name == at:
            values = values.clone()
            values[..., list(channels)] = 0
        return values

    return edit


def test_frozen_norms_change_nothing_where_nothing_is_edited(model: NodeModel) -> None:
    tokens = torch.randint(384, (3, 12))
    ablation = measure_ablation(model, tokens)
    whole = model.logits(tokens)
    assert torch.equal(FrozenNorms(model).logits(tokens), whole)
    kept = ablation.edit(gates_of(model, 1), ablation.draw(3, 12))
    last = torch.tensor([11, 4, 0])
    assert torch.allclose(FrozenNorms(model).logits(tokens, kept, last), model.logits(tokens, kept, last), atol=1e-5)
    assert torch.equal(model.logits(tokens), whole)  # its hooks are gone


def test_a_frozen_norm_divides_as_in_the_whole_model(run: Run, model: NodeModel) -> None:
    """By hand, where the edited write of the last MLP is read by the last norm only."""
    tokens = torch.randint(384, (3, 12))
    part = run.sparse if model.kind == "sparse" else run.dense
    with torch.no_grad():
        stream, writes = residuals(part, tokens), []
        model.logits(tokens, lambda name, v: (writes.append(v) if name == "blocks.1.hook_mlp_out" else None, v)[1])
        edited = stream[4] - torch.where(torch.arange(part.d_model) < 5, writes[0], 0)
        if model.kind == "sparse":
            normed = edited / stream[4].square().mean(-1, keepdim=True).sqrt() * run.sparse.ln_final.weight
            expected = run.sparse.unembedding(normed) + run.sparse.bigram[tokens]
        else:
            norm, std = run.dense.hf.transformer.ln_f, stream[4].std(-1, correction=0, keepdim=True)
            expected = run.dense.hf.lm_head((edited - edited.mean(-1, keepdim=True)) / std * norm.weight + norm.bias)
        edit = zeroed("blocks.1.hook_mlp_out", *range(5))
        got = FrozenNorms(model).logits(tokens, edit)
    assert torch.allclose(got, expected, atol=1e-3)
    assert not torch.allclose(got, model.logits(tokens, edit), atol=0.05)


def test_a_node_that_nothing_reads_acts_through_live_norms_only() -> None:
    """The hand-built model's attention writes to channels that only its own dead ends read."""
    model, tokens = as_nodes(solver()), solver_batch(8).tokens.flatten(0, 1)
    whole, edit = model.logits(tokens), zeroed("blocks.0.hook_attn_out", *range(8, 16))
    assert not torch.allclose(model.logits(tokens, edit), whole, rtol=0.01)
    assert torch.allclose(FrozenNorms(model).logits(tokens, edit), whole, rtol=1e-4)


def test_frozen_scales_receive_no_gradient_and_nodes_do() -> None:
    model, batch = as_nodes(solver()), solver_batch(8)
    ablation = measure_ablation(model, batch.tokens.flatten(0, 1))
    gates = {name: g.requires_grad_() for name, g in gates_of(model, 1).items()}
    edit = ablation.edit(gates, ablation.draw(16, 3))
    out = FrozenNorms(model).logits(batch.tokens.flatten(0, 1), edit).square().sum()
    names = ("blocks.0.hook_mlp_out", "blocks.0.hook_attn_out")
    useful, useless = torch.autograd.grad(out, [gates[name] for name in names])
    assert useful[7].abs() > 0.1
    assert useless.abs().max() == 0


def test_log_odds_move_with_the_nodes_that_carry_the_answer() -> None:
    """One neuron of the hand-built model writes all there is."""
    quiet, batch = solver(), solver_batch(16)
    with torch.no_grad():
        for block in quiet.blocks:
            block.attn.out.weight.zero_()
            block.mlp.out.weight.zero_()
        quiet.blocks[0].mlp.out.weight[7, 5] = 1
    model = as_nodes(quiet)
    for at, channel in (("blocks.0.mlp.hook_in", 0), ("blocks.0.mlp.hook_post", 5), ("blocks.0.hook_mlp_out", 7)):
        found = interchange(model, nodes_of(model, (at, channel)), batch, 5, seed=0)
        assert found.nodes == 1
        assert found.share == pytest.approx(1, abs=1e-3)
        assert found.random == pytest.approx([0] * 5, abs=1e-4)
    assert interchange(model, nodes_of(model), batch, 1, seed=0).share == 0


def test_interchange_by_hand(run: Run, batch: TaskBatch) -> None:
    """Two channels of one read, patched with TransformerLens' own hooks, member by member."""
    model, hook = as_nodes(run.sparse), "blocks.1.mlp.hook_in"
    nodes = nodes_of(model, (hook, 3), (hook, 11))
    with torch.no_grad():
        own = log_odds(run.sparse(batch.tokens.flatten(0, 1)).unflatten(0, (-1, 2)), batch)
        moved = torch.zeros_like(own)
        for pair in range(len(own)):
            for member in (0, 1):
                _, cache = run.sparse.run_with_cache(batch.tokens[pair, 1 - member][None])

                def patch(value: Tensor, hook: object, new: Tensor = cache[hook]) -> Tensor:
                    return torch.where(nodes["blocks.1.mlp.hook_in"], new, value)

                logits = run.sparse.run_with_hooks(batch.tokens[pair, member][None], fwd_hooks=[(hook, patch)])
                right, wrong = batch.answers[pair, member], batch.answers[pair, 1 - member]
                moved[pair, member] = logits[0, batch.last[pair], right] - logits[0, batch.last[pair], wrong]
    expected = (own - moved).sum() / (own + own.flip(1)).sum()
    assert interchange(model, nodes, batch, 2, seed=0).share == pytest.approx(float(expected), rel=1e-3, abs=1e-6)
    assert abs(float(expected)) > 1e-4


def test_the_nodes_of_a_named_channel(run: Run) -> None:
    channel = Channel(name="c", site=3, indices=(4, 9), weights=(1.0, -0.5))
    found = channel_nodes(channel, run.sparse.cfg)
    assert {(n, int(c)) for n, mask in found.items() for c in mask.nonzero()} == {
        ("blocks.1.mlp.hook_in", 4),
        ("blocks.1.mlp.hook_in", 9),
    }
    with pytest.raises(ValueError, match="'c' is read by the unembedding"):
        channel_nodes(replace(channel, site=4), run.sparse.cfg)


@pytest.fixture(scope="module")
def validated() -> tuple[Circuit, Validation]:
    """The hand-built model's circuit and its controls."""
    model = as_nodes(solver())
    blocks = solver_batch(32, seed=9).tokens.flatten(0, 1)
    config = PruneConfig(steps=60, pairs=8, pool=32, lr=2e-2, k_coef=1e-2)
    train, selection, evaluation = solver_batch(32), solver_batch(16, seed=1), solver_batch(16, seed=2)
    ablation = measure_ablation(model, blocks)
    pruned = prune(model, train, selection, ablation, config)
    circuit = make_circuit(
        model,
        pruned.kept,
        tied_qk=False,
        task="t",
        fingerprint="f",
        loss=pruned.loss,
        unpruned_loss=pruned.unpruned_loss,
        calibration=pruned.calibration,
        ablation=ablation,
    )
    channels = {"idle": nodes_of(model, ("blocks.1.attn.hook_in", 9))}
    result = validate(model, circuit, train, selection, evaluation, blocks, config, channels=channels, draws=5)
    return circuit, result


def test_validation_of_a_known_circuit(validated: tuple[Circuit, Validation]) -> None:
    """The three nodes are sufficient, necessary, minimal and carry the answer; nonsense cannot be pruned to."""
    circuit, result = validated
    assert result.n_nodes == circuit.n_nodes == 3
    assert result.sufficiency.loss < 0.15
    assert result.sufficiency.accuracy == 1
    assert result.necessity.loss > max(result.necessity.random)
    assert len(result.necessity.random) == 5
    assert result.necessity.calibrated == pytest.approx(math.log(2), abs=1e-3)
    assert max(result.necessity.calibrated_random) < 0.15
    assert set(result.node_effects) == {"0.mlp.act_in.0", "0.mlp.post_act.5", "0.mlp.resid_delta.7"}
    assert min(result.node_effects.values()) > 0.3
    assert result.interchange.share > 0.9
    assert abs(result.channels["idle"].share) < 0.2
    assert result.frozen_loss < 0.15
    for found in (result.nonsense, result.nonsense_rule):
        assert found.k is None
        assert found.loss_at_k > 0.5
    lines = {line.control: line.survived for line in control_results(result)}
    assert [name for name, survived in lines.items() if not survived] == ["interchange of idle"]
    assert {"interchange", "frozen norms", "nonsense: a rule", "redrawn, frozen norms"} <= set(lines)


def test_controls_come_back_from_json(validated: tuple[Circuit, Validation]) -> None:
    _, result = validated
    assert typed(Validation, result.to_dict(), "controls", "") == result
    with pytest.raises(ValueError, match="controls is not a valid Validation: key n_nodes is missing"):
        typed(Validation, {"target_loss": 0.15}, "controls", "")


@pytest.mark.parametrize("name", ["nonsense", "nonsense_rule", "redrawn", "redrawn_frozen"])
def test_a_control_that_prunes_as_small_fails(validated: tuple[Circuit, Validation], name: str) -> None:
    _, result = validated
    small = Repruned(whole_loss=0.1, k=2 * result.n_nodes - 1, edges=4, loss_at_k=0.1)
    failed = [line.control for line in control_results(result._replace(**{name: small})) if not line.survived]
    assert len(failed) == 2
    assert format_validation(result._replace(**{name: small})).count("FAILED") == 2
    large = small._replace(k=2 * result.n_nodes)
    assert len([line for line in control_results(result._replace(**{name: large})) if not line.survived]) == 1


def test_no_draws_are_refused(validated: tuple[Circuit, Validation]) -> None:
    batch = solver_batch(4)
    with pytest.raises(ValueError, match="draws=0"):
        validate(solver(), validated[0], batch, batch, batch, batch.tokens[:, 0], PruneConfig(), draws=0)

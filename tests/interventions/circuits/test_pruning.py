"""Node pruning: exact gates, exact masking in both models, bisection and calibration against known answers."""

from dataclasses import replace

import pytest
import torch
from support.helpers import make_tiny_run
from support.solver import CONFIG, gates_of, solver, solver_batch
from torch import Tensor

from bridges.run_folder import Run
from interventions.circuits.ablation import fit_calibration, measure_ablation
from interventions.circuits.gates import GateLayout, answer_logits, at_answer, fit_gates, heaviside, rate
from interventions.circuits.node_model import DenseNodes, NodeModel, as_nodes, edges_between, locations
from interventions.circuits.prune_config import PruneConfig
from interventions.circuits.pruning import prune, score, smallest_k
from interventions.tasks.base import TaskBatch, pair_accuracy, task_loss
from interventions.tasks.catalogue import get_task


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_tiny_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(params=["sparse", "dense"])
def model(run: Run, request: pytest.FixtureRequest) -> NodeModel:
    return as_nodes(getattr(run, request.param))


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(384, (3, 12))


@pytest.fixture
def blocks() -> Tensor:
    return torch.randint(384, (6, 20), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("temp", [0.1, 1])
def test_gate_is_0_or_1_forward_and_a_sigmoid_backward(temp: int | float) -> None:
    tau = torch.tensor([-1.0, -0.3, 0.0, 1e-9, 0.2, 1.0], requires_grad=True)
    gate = heaviside(tau, temp)
    assert gate.tolist() == [0, 0, 0, 1, 1, 1]
    weights = torch.arange(1.0, 7.0)
    (got,) = torch.autograd.grad((gate * weights).sum(), tau)
    (expected,) = torch.autograd.grad((torch.sigmoid(tau / temp) * weights).sum(), tau)
    assert torch.allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize("kind", ["mean", "zero", "resample"])
def test_with_all_nodes_kept_the_masked_model_is_the_model(
    run: Run, model: NodeModel, tokens: Tensor, blocks: Tensor, kind: str
) -> None:
    """Bit for bit, in both models; the dense one against Hugging Face's own forward."""
    ablation = measure_ablation(model, blocks, kind)
    whole = run.sparse(tokens) if model.kind == "sparse" else run.dense.hf(tokens).logits
    assert torch.equal(model.logits(tokens, ablation.edit(gates_of(model, 1), ablation.draw(3, 12))), whole)
    last = torch.tensor([11, 4, 0])
    at_last = model.logits(tokens, None, last)
    assert torch.allclose(at_last[:, 0], whole[torch.arange(3), last], atol=1e-5)


def test_every_location_is_seen_once_in_order_with_its_width(model: NodeModel, tokens: Tensor) -> None:
    seen = []

    def note(name: str, values: Tensor) -> Tensor:
        seen.append((name, values.shape))
        return values

    model.logits(tokens, note)
    assert seen == [(at.name, (3, 12, at.width)) for at in locations(model.shape)]
    seen.clear()
    model.logits(tokens)
    assert not seen  # hooks are gone


def test_means_are_those_of_the_cache_and_ablating_everything_leaves_only_the_stream(
    run: Run, tokens: Tensor, blocks: Tensor
) -> None:
    """With every node at its mean, each sublayer adds a constant to the embedding, whatever it would have read."""
    model = as_nodes(run.sparse)
    ablation = measure_ablation(model, blocks, batch_size=4)
    _, cache = run.sparse.run_with_cache(blocks)
    for at in locations(model.shape):
        assert torch.allclose(ablation.values[at.name][0], cache[at.name].flatten(2).mean((0, 1)), atol=1e-5)
    logits = model.logits(tokens, ablation.edit(gates_of(model, 0), ablation.draw(3, 12)))
    writes = [at.name for at in locations(model.shape) if at.place.endswith("resid_delta")]
    constant = torch.stack([ablation.values[name][0] for name in writes]).sum(0)
    expected = run.sparse.unembed(run.sparse.embed(tokens) + constant, tokens)
    assert torch.allclose(logits, expected, atol=1e-5)
    assert torch.allclose(
        logits[:, -1:],
        model.logits(tokens[:, -1:], ablation.edit(gates_of(model, 0), torch.zeros(1, 1, dtype=torch.long))),
        atol=1e-5,
    )


def test_resampling_takes_whole_tokens_of_the_reference_text(model: NodeModel, tokens: Tensor, blocks: Tensor) -> None:
    ablation = measure_ablation(model, blocks, "resample", resample_tokens=30)
    everywhere = measure_ablation(model, blocks, "resample", resample_tokens=blocks.numel())
    first, second = list(ablation.values)[1:3]
    joint = {
        (*a.tolist(), *b.tolist()) for a, b in zip(everywhere.values[first], everywhere.values[second], strict=True)
    }
    seen = {}

    def note(name: str, values: Tensor) -> Tensor:
        seen[name] = values
        return values

    generator = torch.Generator().manual_seed(0)
    edit = ablation.edit(gates_of(model, 0), ablation.draw(3, 12, generator))
    model.logits(tokens, lambda name, values: note(name, edit(name, values)))
    drawn = torch.cat([seen[first], seen[second]], -1).flatten(0, 1)
    assert len(ablation.values[first]) == 30
    assert len(drawn.unique(dim=0)) > 10
    assert all(tuple(row.tolist()) in joint for row in drawn)


def test_a_gate_s_gradient_is_the_effect_of_its_node(model: NodeModel, tokens: Tensor, blocks: Tensor) -> None:
    """Against finite differences in the gates, the Heaviside set aside."""
    ablation = measure_ablation(model, blocks)
    gates = {name: (0.7 * g).double().requires_grad_() for name, g in gates_of(model, 1).items()}
    model.module.double()
    try:

        def output() -> Tensor:
            return model.logits(tokens, ablation.edit(gates, ablation.draw(3, 12)))[:, -1].square().mean()

        for name in ("blocks.0.mlp.hook_post", "blocks.1.attn.hook_v", "blocks.1.hook_attn_out"):
            (grad,) = torch.autograd.grad(output(), gates[name])
            with torch.no_grad():
                gates[name][1] += 1e-5
                up = output()
                gates[name][1] -= 2e-5
                assert float(grad[1]) == pytest.approx(float((up - output()) / 2e-5), rel=1e-3, abs=1e-9)
    finally:
        model.module.float()


@pytest.mark.parametrize("threshold", [0, 1, 7, 63, 64])
@pytest.mark.parametrize("start", [0, 7, 40, 64])
def test_bisection_finds_the_smallest_k(threshold: int, start: int) -> None:
    def loss(k: int) -> float:
        asked.append(k)
        return 1.0 - k / 64

    asked: list[int] = []
    target = 1.0 - threshold / 64
    linear = next(k for k in range(65) if loss(k) <= target)
    asked.clear()
    assert smallest_k(loss, target, 64, start) == linear == threshold
    assert len(asked) <= 10
    assert smallest_k(loss, -1, 64, start) is None


def test_calibration_recovers_a_known_scale_and_shift() -> None:
    """Answers are drawn with the odds of 0.5 * (logits) + shift; 40,000 pairs leave a few percent of noise."""
    n, generator = 40_000, torch.Generator().manual_seed(1)
    logits = 4 * torch.randn(n, 2, 1, 5, generator=generator)
    shift = torch.tensor([0.0, 0.0, 0.8, -0.8, 0.0])
    odds = 0.5 * (logits[:, 0, 0, 2] - logits[:, 0, 0, 3]) + 1.6
    member = (torch.rand(n, generator=generator) > torch.sigmoid(odds)).long()
    answers = torch.stack([2 + member, 3 - member], 1)
    # Member 1 takes member 0's place with the roles of the answers exchanged, and the same odds.
    logits[:, 1] = logits[:, 0]
    logits[:, 1, :, 2] = logits[:, 0, :, 3] - 2 * 1.6
    logits[:, 1, :, 3] = logits[:, 0, :, 2] + 2 * 1.6
    batch = TaskBatch(torch.zeros(n, 2, 1, dtype=torch.long), answers, torch.zeros(n, dtype=torch.long), [("", "")] * n)
    fitted = fit_calibration(logits, batch)
    before = task_loss(logits, batch)
    assert fitted.scale == pytest.approx(0.5, rel=0.05)
    assert fitted.shift[2] == pytest.approx(0.8, rel=0.06)
    assert fitted.shift[3] == pytest.approx(-0.8, rel=0.06)
    assert task_loss(fitted.apply(logits), batch) < before
    exact = task_loss(0.5 * logits + shift, batch)
    assert task_loss(fitted.apply(logits), batch) <= exact


def test_calibration_cannot_help_logits_that_do_not_tell_members_apart() -> None:
    batch = solver_batch(8)
    same = torch.randn(8, 1, 1, 6).repeat(1, 2, 1, 1)
    fitted = fit_calibration(same, at_answer(batch))
    assert float(task_loss(fitted.apply(same), at_answer(batch))) == pytest.approx(0.693147, abs=1e-3)


def test_learning_rate_rises_then_falls_to_zero() -> None:
    config = PruneConfig(steps=100, warmup=0.1)
    rates = [rate(step, config) for step in range(101)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert max(rates) == rates[10] == 1
    assert rates[100] == 0
    assert rates[55] == pytest.approx(0.5)


@pytest.mark.parametrize(("kind", "eliminate"), [("mean", False), ("resample", False), ("zero", True)])
def test_pruning_keeps_the_nodes_that_matter(kind: str, eliminate: bool) -> None:
    model = as_nodes(solver())
    blocks = solver_batch(32, seed=9).tokens.flatten(0, 1)
    config = replace(CONFIG, ablation=kind, eliminate=eliminate)
    pruned = prune(model, solver_batch(32), solver_batch(16, seed=1), measure_ablation(model, blocks, kind), config)
    found = {(name, int(c)) for name, mask in pruned.kept.items() for c in mask.nonzero().flatten()}
    needed = {("blocks.0.mlp.hook_in", 0), ("blocks.0.mlp.hook_post", 5), ("blocks.0.hook_mlp_out", 7)}
    assert found == needed
    assert pruned.k == 3
    assert pruned.loss <= config.target_loss
    assert pruned.history[0][1] == 224
    assert [e.matrix for e in edges_between(model, pruned.kept)] == ["mlp_in", "mlp_out"]


@pytest.mark.parametrize("tied", [False, True])
def test_masks_of_all_locations_join_to_the_gates_they_came_from(run: Run, tied: bool) -> None:
    layout = GateLayout(locations(run.sparse.cfg), tied_qk=tied)
    gates = torch.rand(layout.n_gates) < 0.5
    assert torch.equal(layout.join(layout.split(gates)), gates)


def test_a_warm_start_begins_with_an_earlier_circuit_and_can_bring_nodes_back() -> None:
    model = as_nodes(solver())
    ablation = measure_ablation(model, solver_batch(32, seed=9).tokens.flatten(0, 1))
    train, selection = solver_batch(32), solver_batch(16, seed=1)
    first = prune(model, train, selection, ablation, CONFIG)
    again = prune(model, train, selection, ablation, replace(CONFIG, steps=1), start=first.kept)
    assert again.history[0][1] == first.k == 3
    assert all(torch.equal(mask, first.kept[name]) for name, mask in again.kept.items())
    wrong = {name: torch.zeros_like(mask) for name, mask in first.kept.items()}
    for mask in wrong.values():
        mask[1] = True  # none of the three that matter
    back = prune(model, train, selection, ablation, replace(CONFIG, steps=300), start=wrong)
    assert all(torch.equal(mask, first.kept[name]) for name, mask in back.kept.items())


def test_pruning_leaves_the_model_as_it_was(run: Run, blocks: Tensor) -> None:
    model = as_nodes(run.sparse)
    before = {name: p.clone() for name, p in run.sparse.named_parameters()}
    batch = get_task("single_double_quote", run.tokenizer).sample(16, split="train", seed=0)
    fitted = fit_gates(model, batch, measure_ablation(model, blocks), replace(CONFIG, steps=3, tied_qk=True))
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in run.sparse.named_parameters())
    assert len(fitted.history) == 3
    assert fitted.tau.abs().max() <= 1


def test_tied_queries_and_keys_share_their_gate(run: Run) -> None:
    places = locations(run.sparse.cfg)
    free, tied = GateLayout(places), GateLayout(places, tied_qk=True)
    assert free.n_gates - tied.n_gates == 2 * 32  # two layers, two heads of 16
    flat = tied.split(torch.arange(tied.n_gates))
    assert torch.equal(flat["blocks.1.attn.hook_q"], flat["blocks.1.attn.hook_k"])
    assert sum(len(v) for v in free.split(torch.arange(free.n_gates)).values()) == free.n_gates


def test_dense_model_is_pruned_by_the_same_code(run: Run, blocks: Tensor) -> None:
    """A random GPT-2 solves no task; asked for a little less than its own loss, pruning still meets the target."""
    model = DenseNodes(run.dense)
    task = get_task("single_double_quote", run.tokenizer)
    train, selection = task.sample(32, split="train", seed=0), task.sample(16, split="selection", seed=0)
    ablation = measure_ablation(model, blocks)
    ones = {name: g.bool() for name, g in gates_of(model, 1).items()}
    own = score(model, ones, ablation, selection, CONFIG).loss
    pruned = prune(model, train, selection, ablation, replace(CONFIG, steps=5, target_loss=own + 1e-4))
    assert pruned.loss <= own + 1e-4
    assert pruned.unpruned_loss == own
    assert pruned.k == sum(int(mask.sum()) for mask in pruned.kept.values())


def test_unreachable_target_is_refused_with_both_numbers(run: Run, blocks: Tensor) -> None:
    task = get_task("single_double_quote", run.tokenizer)
    train, selection = task.sample(16, split="train", seed=0), task.sample(8, split="selection", seed=0)
    with pytest.raises(ValueError, match=r"does not solve the task: .* its task loss is 0\.6\d+, the target 0\.15"):
        prune(run.sparse, train, selection, measure_ablation(run.sparse, blocks), CONFIG)
    with pytest.raises(ValueError, match="16 training pairs are too few for batches of 64"):
        fit_gates(as_nodes(run.sparse), train, measure_ablation(run.sparse, blocks), PruneConfig())


def test_answer_logits_are_those_of_the_last_prompt_token(run: Run, blocks: Tensor) -> None:
    model = as_nodes(run.sparse)
    batch = get_task("single_double_quote", run.tokenizer).sample(8, split="selection", seed=0)
    with torch.no_grad():
        got = answer_logits(model, gates_of(model, 1), measure_ablation(model, blocks), batch)
    with torch.no_grad():
        whole = run.sparse(batch.tokens.flatten(0, 1)).unflatten(0, (8, 2))
    assert float(task_loss(got, at_answer(batch))) == pytest.approx(float(task_loss(whole, batch)), rel=1e-4)
    assert pair_accuracy(got, at_answer(batch)) == pair_accuracy(whole, batch)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps=0: must be at least 1"),
        ({"heaviside_temp": 0.0}, "heaviside_temp=0.0: must be positive"),
        ({"k_coef": -1.0}, "k_coef=-1.0: must not be negative"),
        ({"beta2": 1.0}, "beta2=1.0: must lie in"),
        ({"init_noise_bias": 2.0}, "init_noise_bias=2.0: must lie in"),
        ({"pairs": 999}, "pairs=999: must not exceed the pool of 512"),
    ],
)
def test_bad_settings_are_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PruneConfig(**change)


def test_bad_reference_and_model_are_named(run: Run) -> None:
    with pytest.raises(ValueError, match="no reference tokens"):
        measure_ablation(run.sparse, torch.zeros(0, 8, dtype=torch.long))
    with pytest.raises(TypeError, match="a Linear has no nodes"):
        as_nodes(torch.nn.Linear(2, 2))

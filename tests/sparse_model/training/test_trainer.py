"""The joint trainer: resume, the frozen model, final sparsity, diverging losses, misfits."""

import copy
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from support.helpers import make_tiny_run

from bridges.bridge import load_bridges
from bridges.config import RunConfig
from bridges.dense import DenseModel, check_fit
from bridges.joint_trainer import JointTrainer
from bridges.loading import load_lm
from bridges.run_folder import Run, new_bridges, open_run
from sparse_model.config import OptimConfig, SparsityConfig
from sparse_model.model.transformer import SparseTransformer
from sparse_model.sparsity.projection import budget, prove_sparsity
from sparse_model.sparsity.topk import NotFiniteError
from sparse_model.training.accelerator import make_accelerator
from sparse_model.training.checkpoints import CHECKPOINT
from sparse_model.training.finite import TrainingDiverged
from sparse_model.training.metrics_log import read_metrics


def make_trainer(run: Run, folder: Path, accelerator: Accelerator | None = None, **changes: object) -> JointTrainer:
    config = dataclasses.replace(
        run.config,
        steps=12,
        batch_size=2,
        checkpoint_every=6,
        log_every=3,
        sparsity=SparsityConfig(nonzero_fraction=1 / 8),
        **changes,  # type: ignore[arg-type]
    )
    torch.manual_seed(5)
    blocks = torch.randint(384, (30, 16), dtype=torch.int32)
    sparse, bridges = SparseTransformer(config.sparse), new_bridges(config, run.dense.d_model)
    return JointTrainer(config, run.dense, sparse, bridges, blocks, folder, accelerator)


def weights(trainer: JointTrainer) -> dict[str, torch.Tensor]:
    state = {f"sparse.{n}": p for n, p in trainer.sparse.state_dict().items()}
    state |= {f"bridges.{n}": p for n, p in trainer.bridges.state_dict().items()}
    for name, optimizer in trainer.optimizers.items():
        for key, values in optimizer.state_dict()["state"].items():
            state |= {f"{name}.{key}.{n}": v for n, v in values.items()}
    return {n: t.clone() for n, t in state.items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(torch.nan_to_num(a[name]), torch.nan_to_num(b[name])), name


def test_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    run = make_tiny_run(tmp_path / "run")
    whole = make_trainer(run, tmp_path / "whole")
    whole.train()
    killed = make_trainer(run, tmp_path / "killed")
    while killed.step < 6:
        killed.train_step()
    killed.save_checkpoint()
    for _ in range(2):  # steps after the checkpoint, lost in the kill
        killed.train_step()
    resumed = make_trainer(run, tmp_path / "killed")
    assert resumed.load_checkpoint()
    assert resumed.step == 6
    resumed.train()
    assert_same(weights(whole), weights(resumed))


def test_metrics_lines_after_the_checkpoint_are_dropped_on_resume(tmp_path: Path) -> None:
    run = make_tiny_run(tmp_path / "run")
    trainer = make_trainer(run, tmp_path / "out")
    trainer.train()
    path = tmp_path / "out" / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 13, "ce"')  # cut short by a kill
    resumed = make_trainer(run, tmp_path / "out")
    assert resumed.load_checkpoint()
    resumed.train()
    steps = [r["step"] for r in read_metrics(path)]
    assert steps == [1, 3, 6, 9, 12]
    record = read_metrics(path)[-1]
    assert len(record["nmse_encode"]) == 5
    assert record["tokens"] == 12 * 2 * 16


def test_dense_model_is_bit_identical_after_training_and_sparsity_is_exact(tmp_path: Path) -> None:
    run = make_tiny_run(tmp_path / "run")
    before = copy.deepcopy(run.dense.state_dict())
    trainer = make_trainer(run, tmp_path / "out")
    trainer.train()
    for name, t in run.dense.state_dict().items():
        assert torch.equal(t, before[name]), name
    for p in trainer.projected:
        assert p.tensor.count_nonzero() == budget(p.tensor.numel(), 1 / 8), p.name
    assert trainer.sparse.bigram.count_nonzero() > trainer.sparse.bigram.numel() / 8


def test_training_lowers_the_losses(tmp_path: Path) -> None:
    run = make_tiny_run(tmp_path / "run")
    trainer = make_trainer(run, tmp_path / "out")
    trainer.blocks = trainer.blocks[:2]
    trainer.order.n_blocks = 2
    first = trainer.train_step()
    trainer.train()
    last = read_metrics(tmp_path / "out" / "metrics.jsonl")[-1]
    assert last["ce"] < float(first.ce) - 0.1
    assert sum(last["nmse_decode"]) < float(first.nmse_decode.sum())


def test_nan_stops_the_run_and_names_term_site_and_step(tmp_path: Path) -> None:
    run = make_tiny_run(tmp_path / "run")
    trainer = make_trainer(run, tmp_path / "out")
    trainer.save_checkpoint()
    with torch.no_grad():
        trainer.bridges.decoders[3].weight[0, 0] = torch.nan
    with pytest.raises(TrainingDiverged, match=r"nmse_decode at site 3 is no longer finite in step 1"):
        trainer.train()
    assert make_trainer(run, tmp_path / "out").load_checkpoint()


def test_the_values_of_rates_and_densities_over_a_training(tmp_path: Path) -> None:
    """Warm-up over a quarter of 12 steps, then a fall to zero; annealing from step 3 to step 6, linear."""
    run = make_tiny_run(tmp_path / "run")
    optim = OptimConfig(lr=0.01, warmup=0.25)
    trainer = make_trainer(run, tmp_path / "out", optim=optim)
    sparsity = SparsityConfig(nonzero_fraction=1 / 4, anneal="linear", anneal_start=0.25, anneal_stop=0.5)
    trainer.config = dataclasses.replace(trainer.config, sparsity=sparsity)
    trainer.projected = [p._replace(fraction=1 / 4) for p in trainer.projected]
    factors = [1 / 6, 3 / 6, 5 / 6] + [(12 - step - 0.5) / 9 for step in range(3, 12)]
    kept = [1.0] * 4 + [0.75, 0.5] + [0.25] * 6  # when a step begins
    matrix = next(p for p in trainer.projected if p.neuron_axis).tensor
    for step in range(12):
        trainer.train_step()
        rate = trainer.optimizers["main"].param_groups[0]["lr"]
        assert rate == pytest.approx(0.01 * factors[step] / kept[step] ** 0.5), step
        free = trainer.optimizers["free"].param_groups[0]["lr"]
        assert free == pytest.approx(run.config.bridge.lr * factors[step]), step
        after = [*kept, 0.25][step + 1]
        assert int(matrix.count_nonzero()) == (matrix.numel() if after == 1 else budget(matrix.numel(), after)), step


def test_a_weight_that_is_no_number_is_a_divergence_and_a_users_error_is_not(tmp_path: Path) -> None:
    run = make_tiny_run(tmp_path / "run")
    trainer = make_trainer(run, tmp_path / "out")
    trainer.blocks = torch.randint(384, (30, 65))
    with pytest.raises(ValueError, match="65 tokens") as error:
        trainer.train_step()
    assert not isinstance(error.value, NotFiniteError)
    trainer = make_trainer(run, tmp_path / "out")
    with torch.no_grad():
        trainer.sparse.blocks[0].mlp.fc.weight[0, 0] = torch.nan
    named = r"an activation of mlp\.0 became NaN .* in step 1, where sparse\.blocks\.0\.mlp\.fc\.weight is"
    with pytest.raises(TrainingDiverged, match=named):
        trainer.train_step()
    trainer = make_trainer(run, tmp_path / "out")
    trainer.main[0].register_hook(lambda grad: grad * torch.inf)
    with pytest.raises(TrainingDiverged, match=r"the gradient of sparse\.\S+ is no longer finite in step 1 at"):
        trainer.train_step()


def test_checkpoint_of_other_settings_or_damaged_is_refused(tmp_path: Path) -> None:
    run = make_tiny_run(tmp_path / "run")
    trainer = make_trainer(run, tmp_path / "out")
    trainer.save_checkpoint()
    with pytest.raises(ValueError, match=r"other settings \(seed\)"):
        make_trainer(run, tmp_path / "out", seed=9).load_checkpoint()
    path = tmp_path / "out" / CHECKPOINT / "step-0" / "main_optimizer.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"main_optimizer\.pt is damaged"):
        make_trainer(run, tmp_path / "out").load_checkpoint()
    path = tmp_path / "out" / CHECKPOINT / "step-0" / "sparse.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"sparse\.safetensors is damaged or truncated"):
        make_trainer(run, tmp_path / "out").load_checkpoint()


def test_models_that_do_not_fit_are_named(tmp_path: Path) -> None:
    run = make_tiny_run(tmp_path / "run")
    for change, message in (
        ({"n_layers": 3}, "sparse.n_layers=3: the dense model has 2 layers"),
        ({"d_vocab": 400}, "sparse.d_vocab=400: the dense model's vocabulary has 384"),
        ({"n_ctx": 128}, "sparse.n_ctx=128: the dense model's context holds 64"),
    ):
        with pytest.raises(ValueError, match=message):
            check_fit(run.dense, dataclasses.replace(run.config.sparse, **change))
    with pytest.raises(ValueError, match="min_per_neuron=9"):
        make_trainer_with_j(run, tmp_path, 9)


def make_trainer_with_j(run: Run, folder: Path, j: int) -> JointTrainer:
    config = dataclasses.replace(run.config, sparsity=SparsityConfig(nonzero_fraction=1 / 8, min_per_neuron=j))
    sparse, bridges = SparseTransformer(config.sparse), new_bridges(config, run.dense.d_model)
    return JointTrainer(config, run.dense, sparse, bridges, torch.randint(384, (4, 8)), folder)


def test_broken_run_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no run at .*nowhere"):
        open_run(tmp_path / "nowhere")
    run = make_tiny_run(tmp_path / "run")
    bridges = run.folder / "bridges" / "bridges.safetensors"
    whole = bridges.read_bytes()
    bridges.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"bridges\.safetensors is damaged or truncated"):
        open_run(run.folder)
    bridges.write_bytes(whole)
    shape = run.folder / "bridges" / "config.json"
    shape.write_text(json.dumps({**json.loads(shape.read_text()), "encoder_k": 0}))
    with pytest.raises(ValueError, match="encoder_k=0"):
        load_bridges(run.folder / "bridges")
    config = run.folder / "config.json"
    config.write_text(config.read_text().replace('"corpus":', '"corpsu":'))
    with pytest.raises(ValueError, match="unknown key corpsu"):
        open_run(run.folder)


def test_dense_that_is_no_gpt2_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no model at"):
        load_lm(tmp_path / "missing")
    with pytest.raises(ValueError, match="could not load a language model from 'no-such-model-name'"):
        load_lm("no-such-model-name")
    run = make_tiny_run(tmp_path / "run")
    weights = run.folder / "dense" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"dense/model\.safetensors is damaged or truncated"):
        DenseModel(load_lm(run.folder / "dense"))


def test_config_survives_the_run_folder(tmp_path: Path) -> None:
    run = make_tiny_run(tmp_path / "run")
    assert open_run(run.folder).config == run.config
    assert isinstance(run.config, RunConfig)


@pytest.fixture
def bf16() -> Iterator[Accelerator]:
    """Accelerate in mixed precision; its state is global."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True, mixed_precision="bf16")
    AcceleratorState._reset_state(reset_partial_state=True)


def test_mixed_precision_keeps_fp32_weights_and_an_exact_projection(tmp_path: Path, bf16: Accelerator) -> None:
    run = make_tiny_run(tmp_path / "run")
    seen: set[torch.dtype] = set()
    trainer = make_trainer(run, tmp_path / "mixed", bf16)
    hook = trainer.sparse.blocks[0].mlp.hook_pre
    hook.add_hook(lambda t, hook: seen.add(t.dtype))
    trainer.train()
    assert seen == {torch.bfloat16}
    assert {p.dtype for p in trainer.sparse.parameters()} == {torch.float32}
    assert {v.dtype for s in trainer.optimizers["main"].state.values() for v in s.values()} == {torch.float32}
    prove_sparsity(trainer.projected, trainer.config.sparsity)
    for p in trainer.projected:
        assert int(p.tensor.count_nonzero()) <= budget(p.tensor.numel(), p.fraction)
        exact = p.tensor.detach()[p.tensor != 0]
        assert not torch.equal(exact, exact.bfloat16().float())  # not rounded on the way


def test_mixed_precision_is_near_full_precision(tmp_path: Path, bf16: Accelerator) -> None:
    run = make_tiny_run(tmp_path / "run")
    mixed = make_trainer(run, tmp_path / "mixed", bf16).train_step()
    AcceleratorState._reset_state(reset_partial_state=True)
    full = make_trainer(run, tmp_path / "full").train_step()
    for name, value in full._asdict().items():
        torch.testing.assert_close(getattr(mixed, name), value, rtol=0.05, atol=0.02, equal_nan=True, check_dtype=False)


def test_fp16_on_a_cpu_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for precision, said in (("fp16", 1), ("bf16", 0)):
        AcceleratorState._reset_state(reset_partial_state=True)
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
        caplog.clear()
        make_accelerator(Path("run"))
        assert caplog.text.count("fp16 does nothing on a CPU") == said
    AcceleratorState._reset_state(reset_partial_state=True)

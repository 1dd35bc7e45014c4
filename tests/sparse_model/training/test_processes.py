"""Several processes: equal to one on the doubled batch, stopping and resuming together, dying together."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.helpers import make_tiny_run
from support.processes import BATCH, STEPS, make_trainer, shard_cases, weights

from sparse_model.sparsity.projection import projection_mask

pytestmark = pytest.mark.slow


def two_processes(mode: str, folder: Path) -> subprocess.CompletedProcess:
    """`torchrun` with two processes on the CPU."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = Path(__file__).parents[2] / "support" / "processes.py"
    # The packages before tests/, whose folders bear the same names.
    path = os.pathsep.join(map(str, (script.parents[2], script.parents[1])))
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.run([*command, str(script), mode, str(folder)], env=env, capture_output=True, text=True)


def load(folder: Path) -> list[dict[str, torch.Tensor]]:
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an undisturbed run of two processes."""
    folder = tmp_path_factory.mktemp("processes")
    done = two_processes("whole", folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_two_processes_equal_one_on_the_doubled_batch(whole: Path) -> None:
    ranks = load(whole / "whole")
    trainer = make_trainer(make_tiny_run(whole / "run-one"), whole / "one", 2 * BATCH)
    before = weights(trainer)
    trainer.train(progress=False)
    after = weights(trainer)
    for name, value in after.items():
        assert torch.equal(ranks[0][name], ranks[1][name]), f"{name} differs between the ranks"
        if value.isfinite().all():
            scale = value.abs().max().clamp(min=1e-3)
            assert (ranks[0][name] - value).abs().max() <= 1e-6 * scale, name
    moved = [name for name, value in after.items() if value.isfinite().all() and not torch.equal(value, before[name])]
    assert len(moved) > 20


def test_a_sharded_parameter_gets_the_mask_of_the_whole(whole: Path) -> None:
    parts = [torch.load(whole / f"masks-rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    for case, first, second in zip(shard_cases(), *parts, strict=True):
        weight, k, j, axis = case
        expected = projection_mask(weight, k, min_per_neuron=j, neuron_axis=axis)
        assert torch.equal(torch.cat([first, second]), expected)


def test_a_signal_to_one_rank_stops_all_at_one_step_and_resuming_is_exact(whole: Path) -> None:
    done = two_processes("interrupted", whole)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("stopped at step 10") == 2
    done = two_processes("resumed", whole)
    assert done.returncode == 0, done.stderr[-3000:]
    for uninterrupted, resumed in zip(load(whole / "whole"), load(whole / "cut"), strict=True):
        for name, value in uninterrupted.items():
            assert torch.equal(torch.nan_to_num(value), torch.nan_to_num(resumed[name])), name


def test_a_rank_that_dies_ends_the_run_and_leaves_the_checkpoint(whole: Path) -> None:
    done = two_processes("death", whole)
    assert done.returncode != 0
    assert "exitcode  : 7" in done.stderr.replace("exit code", "exitcode ") or "exitcode: 7" in done.stderr
    trainer = make_trainer(make_tiny_run(whole / "run-after"), whole / "death", BATCH)
    with pytest.raises(ValueError, match="step-5 was begun with 2 processes, not 1: resume with the same"):
        trainer.load_checkpoint()
    trainer.identity = trainer.identity | {"processes": 2}
    assert trainer.load_checkpoint()
    assert trainer.step == 5 < STEPS

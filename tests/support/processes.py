"""What one process of a parallel test does: `torchrun --nproc_per_node 2 tests/support/processes.py MODE FOLDER`.

whole        20 steps; the weights go to FOLDER/whole/rankR.pt. Then the sharded projection, to FOLDER/masks-rankR.pt.
interrupted  the same run, but rank 1 gets SIGTERM at step 7
resumed      goes on from the checkpoint of `interrupted`
death        the same run, but rank 1 dies without a word at step 7
"""

import dataclasses
import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from support.helpers import make_tiny_run

from bridges.joint_trainer import JointTrainer
from bridges.run_folder import Run
from sparse_model.config import SparsityConfig
from sparse_model.sparsity.sharded_projection import sharded_projection_mask
from sparse_model.training.accelerator import ending
from sparse_model.training.interrupts import Interrupted

STEPS, BATCH = 20, 4


class Disturbed(JointTrainer):
    """A trainer to which something happens on rank 1 after the seventh step."""

    disturbance = staticmethod(lambda: None)

    def train_step(self):
        losses = super().train_step()
        if self.step == 7 and self.accelerator.process_index == 1:
            self.disturbance()
        return losses


def make_trainer(run: Run, folder: Path, batch_size: int) -> Disturbed:
    """In float64, so that only the order of sums tells two runs apart, and never a flipped AbsTopK."""
    config = dataclasses.replace(
        run.config,
        steps=STEPS,
        batch_size=batch_size,
        checkpoint_every=5,
        log_every=5,
        sparsity=SparsityConfig(nonzero_fraction=1 / 8),
    )
    generator = torch.Generator().manual_seed(5)
    blocks = torch.randint(384, (64, 16), generator=generator)
    models = run.dense.double(), run.sparse.double(), run.bridges.double()
    return Disturbed(config, *models, blocks, folder)


def weights(trainer: JointTrainer) -> dict[str, torch.Tensor]:
    return {f"{kind}.{name}": t.clone() for kind, m in trainer.modules.items() for name, t in m.state_dict().items()}


def shard_cases() -> list[tuple[torch.Tensor, int, int, str | None]]:
    """(whole parameter, k, j, neuron axis), with ties across the shards' border."""
    generator = torch.Generator().manual_seed(0)
    plain, ties = torch.randn(30, 12, generator=generator), torch.randint(-2, 3, (30, 12), generator=generator).float()
    return [
        (w, k, j, axis) for w in (plain, ties) for k, j in ((130, 0), (130, 3), (90, 3)) for axis in ("row", "column")
    ]


def main() -> None:
    mode, folder = sys.argv[1], Path(sys.argv[2])
    rank = int(os.environ["RANK"])
    run = make_tiny_run(folder / f"run-{mode}-{rank}")
    name = {"interrupted": "cut", "resumed": "cut"}.get(mode, mode)
    trainer = make_trainer(run, folder / name, BATCH)
    assert trainer.accelerator.num_processes == 2
    if mode == "interrupted":
        trainer.disturbance = lambda: os.kill(os.getpid(), signal.SIGTERM)
    if mode == "death":
        trainer.disturbance = lambda: os._exit(7)
    if mode == "resumed":
        assert trainer.load_checkpoint()
        assert trainer.step == 10
    try:
        with ending(trainer.accelerator) if mode == "interrupted" else nullcontext():
            trainer.train(progress=False)
    except Interrupted as stop:
        print(f"rank {rank}: {stop}")
        return
    torch.save(weights(trainer), folder / name / f"rank{rank}.pt")
    if mode == "whole":
        masks = []
        for whole, k, j, axis in shard_cases():
            shard = whole[:13] if rank == 0 else whole[13:]
            masks.append(sharded_projection_mask(shard, k, min_per_neuron=j, neuron_axis=axis))
        torch.save(masks, folder / f"masks-rank{rank}.pt")
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()

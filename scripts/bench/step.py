"""Time one optimizer step of the joint training: CPU seconds, peak memory, and its share of the matmul rate.

Dense and sparse model have random weights; the step is the trainer's own, projection included. The share is the step's
arithmetic (counted by torch, zeros of sparse weights included, although on the CPU they are skipped) over what the same
seconds of large matrix products would do, measured in the same run.

Examples:
    python scripts/bench/step.py --layers 4 --d-dense 128 --d-sparse 512 --vocab 2048 --sites all
    python scripts/bench/step.py --layers 4 --sites 1 --dtype bf16 --json
"""

import json
import resource
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from accelerate import Accelerator
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

from bridges.config import BridgeConfig, RunConfig
from bridges.dense import DenseModel
from bridges.joint_trainer import JointTrainer
from bridges.run_folder import new_bridges
from interventions.cli.options import report_errors
from sparse_model.config import SparseConfig, SparsityConfig
from sparse_model.model.transformer import SparseTransformer


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time one optimizer step of the joint training."""

    layers: int = 4
    """Transformer layers of both models."""
    d_dense: int = 128
    """Width of the dense model (4 MLP neurons per channel)."""
    d_sparse: int = 512
    """Width of the sparse model (4 MLP neurons per channel)."""
    d_head: int = 16
    """Width of the sparse model's heads."""
    vocab: int = 2048
    """Vocabulary."""
    ctx: int = 128
    """Tokens per sequence."""
    batch: int = 8
    """Sequences per step."""
    sites: str = "all"
    """Sites whose hybrids run, per direction: all, or a number."""
    kl_positions: float = 1.0
    """Share of the positions at which the KLs are evaluated."""
    hybrid_batch: int | None = 4
    """Sequences that go through a hybrid pass at a time."""
    logits_at_once: int = BridgeConfig().logits_at_once
    """Tokens x vocabulary whose logits are in memory together."""
    bigram: bool = True
    """Whether the sparse model has a bigram table."""
    checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them."""
    compile: bool = False
    """Run the sparse model's sublayers through torch.compile."""
    skip_zeros: bool = True
    """Skip the zeros of large sparse weights (CPU, fp32)."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """bf16: mixed precision with fp32 master weights."""
    threads: int = 1
    """Threads of torch and of our kernels (CPU)."""
    steps: int = 3
    """Timed steps, after one to warm up."""
    json: bool = False
    """Print only one line of JSON, which otherwise is the last of the output."""


def make_trainer(options: Options, folder: Path) -> JointTrainer:
    """A joint trainer on random models and tokens."""
    sparse = SparseConfig(
        n_layers=options.layers,
        d_model=options.d_sparse,
        d_mlp=4 * options.d_sparse,
        n_heads=options.d_sparse // options.d_head,
        d_head=options.d_head,
        n_ctx=options.ctx,
        d_vocab=options.vocab,
        bigram="learned" if options.bigram else "none",
    )
    config = RunConfig(
        steps=1000,
        batch_size=options.batch,
        compile=options.compile,
        sparse=sparse,
        sparsity=SparsityConfig(nonzero_fraction=1 / 64, anneal_stop=0.0),
        bridge=BridgeConfig(
            sites="all" if options.sites == "all" else int(options.sites),
            kl_positions=options.kl_positions,
            hybrid_batch=options.hybrid_batch,
            logits_at_once=options.logits_at_once,
            checkpointing=options.checkpointing,
        ),
    )
    dense = GPT2Config(
        vocab_size=options.vocab,
        n_positions=options.ctx,
        n_embd=options.d_dense,
        n_layer=options.layers,
        n_head=max(1, options.d_dense // 64),
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    blocks = torch.randint(options.vocab, (16 * options.batch, options.ctx))
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(), mixed_precision="bf16" if options.dtype == "bf16" else "no"
    )
    bridges = new_bridges(config, options.d_dense)
    return JointTrainer(
        config, DenseModel(GPT2LMHeadModel(dense)), SparseTransformer(sparse), bridges, blocks, folder, accelerator
    )


def synchronize() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def matmul_rate(dtype: torch.dtype, device: torch.device, n: int = 1024) -> float:
    """FLOP per CPU second (per second on a GPU) of a large matrix product: the best of several."""
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    best = 0.0
    for _ in range(8):
        synchronize()
        start = clock()
        for _ in range(4):
            a @ b
        synchronize()
        best = max(best, 4 * 2 * n**3 / (clock() - start))
    return best


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(options, Path(folder))
        device = trainer.accelerator.device
        trainer.skips_zeros &= options.skip_zeros
        trainer.train_step()
        synchronize()
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(options.steps):
            trainer.train_step()
        synchronize()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        trainer.step, trainer.skips_zeros = 1, False
        with FlopCounterMode(display=False) as counter:  # the same draws again: counting needs memory of its own
            for _ in range(options.steps):
                trainer.train_step()
    rate = matmul_rate(torch.bfloat16 if options.dtype == "bf16" else torch.float32, device)
    flop = counter.get_total_flops() / options.steps
    seconds = (wall if device.type == "cuda" else cpu) / options.steps
    record = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "cpu_seconds_per_step": round(cpu / options.steps, 3),
        "wall_seconds_per_step": round(wall / options.steps, 3),
        "peak_rss_gib": round(peak, 2),
        "peak_device_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if device.type == "cuda" else None,
        "tflop_per_step": round(flop / 1e12, 4),
        "matmul_gflop_per_second": round(rate / 1e9, 1),
        "share_of_matmul_rate": round(flop / seconds / rate, 3),
        "tokens_per_second": round(options.batch * options.ctx / seconds, 1),
    }
    if not options.json:
        for name, value in record.items():
            print(f"{name:26} {value}")
    print(json.dumps(record))


if __name__ == "__main__":
    with report_errors():
        main(tyro.cli(Options, description=__doc__))

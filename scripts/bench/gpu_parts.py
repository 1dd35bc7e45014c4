"""The parts of `bench/gpu.py`, which starts this file.

Figures are of the device unless they say otherwise.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from gpu import add_record
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

from bridges.config import PRESETS, RunConfig
from bridges.dense import DenseModel
from bridges.dense_training import train_dense
from bridges.halving import halve_run
from bridges.joint_trainer import JointTrainer
from bridges.pipeline import card_figures, train_bridge
from bridges.run_folder import check_parts, new_bridges
from sparse_model.config import SparseConfig, SparsityConfig, from_json
from sparse_model.data.tokenizer import save_tokenizer
from sparse_model.io.atomic import remove_folder
from sparse_model.model.transformer import SparseTransformer
from sparse_model.sparsity.abs_topk import abs_topk
from sparse_model.sparsity.projection import NeuronAxis, project_, project_together_, projection_mask
from sparse_model.sparsity.topk import select_rows
from sparse_model.training.interrupts import Interrupted

SMALL = SparseConfig(d_model=64, d_mlp=128, n_heads=4, n_ctx=32, d_vocab=384)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--part", choices=list(PARTS), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", type=torch.device, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no GPU here; --device cpu --quick is the dry run")
    options.started = time.monotonic()
    torch.manual_seed(0)
    PARTS[options.part](options)


def kernels(options: argparse.Namespace) -> None:
    """Exact against the CPU's on random shapes; timed against torch.topk and against copying the same memory."""
    wrong, shapes = 0, 20 if options.quick else 200
    rng = torch.Generator().manual_seed(0)
    for i in range(shapes):
        wrong += not _exact_on_random_shape(i, rng, options.device)
    add_record(options.out, "kernels", "exact against the CPU's", shapes=shapes, wrong=wrong, device=_name(options))
    tokens, widths, layers = (64, [32], 2) if options.quick else (8192, [1536, 6144], 12)
    for width in widths:
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(tokens, width, device=options.device).to(dtype)
            times = {
                "ms": _milliseconds(lambda x=x: abs_topk(x, x.shape[1] // 4)),
                "torch_topk_ms": _milliseconds(lambda x=x: x.abs().topk(x.shape[1] // 4).indices),
                "copy_ms": _milliseconds(x.clone),
            }
            add_record(options.out, "kernels", f"AbsTopK {tokens} x {width} {str(dtype)[6:]}", **times)
    matrices = [torch.randn(widths[0], 4 * widths[0], device=options.device) for _ in range(layers)]
    k = matrices[0].numel() // (16 if options.quick else 128)
    j = 1 if options.quick else 4
    for axis in (None, "row", "column"):
        times = {
            "ms": _milliseconds(lambda axis=axis: project_together_(matrices, k, j, axis)),
            "torch_topk_ms": _milliseconds(lambda: [m.abs().flatten().topk(k).indices for m in matrices]),
            "copy_ms": _milliseconds(lambda: [m.clone() for m in matrices]),
        }
        name = f"projection of {layers} matrices {tuple(matrices[0].shape)}, minimum per {axis or 'nothing'}"
        add_record(options.out, "kernels", name, **times)


def _exact_on_random_shape(i: int, rng: torch.Generator, device: torch.device) -> bool:
    """AbsTopK's rows and a projection of three matrices, of random shape, type, budget, minimum; every third ties."""

    def below(n: int) -> int:
        return int(torch.randint(n, (), generator=rng))

    rows, width = 1 + below(300), 2 + below(1500)
    dtype = (torch.float32, torch.bfloat16, torch.float16)[below(3)]
    x = torch.randn(rows, width, generator=rng)
    x = (x.mul(2).round() if i % 3 == 0 else x).to(dtype)
    k = 1 + below(width - 1)
    same = torch.equal(select_rows(x.to(device), k)[1].cpu(), select_rows(x, k)[1])
    axes: tuple[NeuronAxis, ...] = (None, "row", "column")
    axis, j = axes[below(3)], below(5)
    neurons, inputs = (rows, width) if axis == "row" else (width, rows)
    least = min(j, inputs) * neurons if axis else 1
    budget = max(1, least) + below(max(1, x.numel() - least))
    several = [x, x.roll(1, 0), x.roll(1, 1)]
    copies = [w.to(device, copy=True) for w in several]
    project_together_(copies, budget, j, axis)
    for ours, w in zip(copies, several, strict=True):
        keep = projection_mask(w, budget, min_per_neuron=j, neuron_axis=axis)
        same = same and torch.equal(ours.cpu(), torch.where(keep, w, 0))
    return same


def step(options: argparse.Namespace) -> None:
    """The gpt2 preset's step: tokens per second, utilisation, memory, projection, and that it never waits."""
    config = PRESETS["gpt2"][1]
    config = dataclasses.replace(config, sparsity=dataclasses.replace(config.sparsity, anneal_stop=0.0))
    dense = GPT2Config(bos_token_id=None, eos_token_id=None)
    if options.quick:
        sparsity = SparsityConfig(nonzero_fraction=1 / 16, anneal_stop=0.0)
        config = dataclasses.replace(config, batch_size=2, sparse=SMALL, sparsity=sparsity, dense_dtype="float32")
        dense = _gpt2_shape(config.sparse, 32)
    peak, flop = _matmul_rate(options), 0.0
    for precision, compile_ in (("bf16", False), ("bf16", True), ("tf32", False), ("fp32", False)):
        if options.quick and (compile_ or precision == "bf16"):
            continue
        _reset_memory(options)
        config = dataclasses.replace(config, tf32=precision == "tf32", compile=compile_)
        trainer = _trainer(config, dense, options, "bf16" if precision == "bf16" else "no")
        for _ in range(1 if options.quick else 5):
            trainer.train_step()
        start, n = trainer.step, 1 if options.quick else 10
        waits = _first_wait(trainer, options)
        seconds = _seconds(options, lambda trainer=trainer: trainer.train_step(), n)
        projection = _seconds(options, lambda t=trainer: project_(t.projected, t.config.sparsity), n)
        if not flop:
            trainer.step = start
            with FlopCounterMode(display=False) as counter:
                for _ in range(n):
                    trainer.train_step()
            flop = counter.get_total_flops() / n
        add_record(
            options.out,
            "step",
            precision + (", compiled" if compile_ else ""),
            device=_name(options),
            tokens_per_second=round(config.batch_size * config.sparse.n_ctx / seconds),
            share_of_bf16_matmul_rate=round(flop / seconds / peak, 3),
            ms=round(1e3 * seconds, 2),
            projection_share=round(projection / seconds, 3),
            memory_gib=_memory(options),
            waits=waits,
        )
        del trainer


def _first_wait(trainer: JointTrainer, options: argparse.Namespace) -> str:
    """What waited for the device in three steps; none, on a GPU, is what is wanted."""
    if options.device.type != "cuda":
        return "not looked for"
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            trainer.train_step()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "none"


def equality(options: argparse.Namespace) -> None:
    """Fifty steps on the device and on the CPU from equal weights, in fp32 without TF32: equal losses to 1e-4."""
    n = 5 if options.quick else 50
    shape = SMALL if options.quick else SparseConfig()
    sparsity = SparsityConfig(nonzero_fraction=1 / 16, min_per_neuron=2, anneal_stop=0.5)
    config = RunConfig(steps=n, batch_size=4, sparse=shape, sparsity=sparsity)
    losses = []
    for device in (torch.device("cpu"), options.device):
        torch.manual_seed(0)
        trainer = _trainer(config, _gpt2_shape(shape, 32), options, "no", device)
        terms = [trainer.train_step() for _ in range(n)]
        losses.append(torch.stack([torch.cat([v.flatten().cpu() for v in step if v is not None]) for step in terms]))
    difference = ((losses[0] - losses[1]).abs() / losses[0].abs().clamp(min=1e-3)).amax(1)
    values = {
        "steps": n,
        "largest_relative_difference": float(difference.max()),
        "in_step": int(difference.argmax()) + 1,
    }
    add_record(options.out, "equality", "losses on the CPU", **values, equal=bool(difference.max() <= 1e-4))


def code(options: argparse.Namespace) -> None:
    """The preset `code` with as many steps as the time allows: its held-out figures, and the run in half precision."""
    folder = options.out / "code"
    path = folder / "config.json"
    config = from_json(RunConfig, path) if path.exists() else _config_for(options)
    try:
        metrics = train_bridge(config, folder, resume=True, progress=False)
    except Interrupted as error:
        add_record(options.out, "code", "to be resumed", reason=str(error))
        return
    figures = {name: round(value, 4) for name, value in card_figures(metrics).items()}
    half = options.out / "code-half"
    remove_folder(half)
    halve_run(folder, half, device=str(options.device), progress=False)
    megabytes = sum(path.stat().st_size for path in half.rglob("*.safetensors")) / 1e6
    add_record(options.out, "code", "held out", steps=config.steps, **figures, half_megabytes=round(megabytes, 1))


def _config_for(options: argparse.Namespace) -> RunConfig:
    """The preset with the steps that fit into what corpus and tokenizer leave: 60 % joint training, 20 % dense model.

    Both are kept where the run will look for them.
    """
    config = dataclasses.replace(PRESETS["code"][1], batch_size=32, steps=10_000)  # what a GPU has room for
    if options.quick:
        config = dataclasses.replace(PRESETS["tiny"][1], corpus_tokens=20_000, steps=5, eval_tokens=256)
        config = dataclasses.replace(config, dense_train=dataclasses.replace(config.dense_train, steps=5))
    folder = options.out / "code"
    save_tokenizer(check_parts(config, folder, options.device, progress=False).tokenizer, folder / "tokenizer")
    n = 2 if options.quick else 30
    trainer = _trainer(config, _gpt2_shape(config.sparse, config.dense_train.d_model), options, "no")
    for _ in range(n):
        trainer.train_step()
    joint = _seconds(options, trainer.train_step, n)
    few = dataclasses.replace(config, dense_train=dataclasses.replace(config.dense_train, steps=n))
    blocks = trainer.blocks

    def train_few() -> None:
        train_dense(few, blocks, _NoTokenizer, options.device, progress=False)  # type: ignore[arg-type]

    train_few()
    dense = _seconds(options, train_few, 1) / n
    left = options.seconds - (time.monotonic() - options.started)
    fits = {"joint": int(0.6 * left / joint), "dense": int(0.2 * left / dense)}
    add_record(options.out, "code", "seconds per step", joint=round(joint, 5), dense=round(dense, 5))
    train = dataclasses.replace(config.dense_train, steps=max(1, min(config.dense_train.steps, fits["dense"])))
    return dataclasses.replace(config, steps=max(1, min(config.steps, fits["joint"])), dense_train=train)


class _NoTokenizer:
    eos_token_id = None


def _trainer(
    config: RunConfig,
    dense: GPT2Config,
    options: argparse.Namespace,
    precision: str,
    device: torch.device | None = None,
) -> JointTrainer:
    """A joint trainer of random weights and tokens."""
    AcceleratorState._reset_state(reset_partial_state=True)  # it refuses a second precision in one process
    accelerator = Accelerator(cpu=(device or options.device).type == "cpu", mixed_precision=precision)
    blocks = torch.randint(config.sparse.d_vocab, (16 * config.batch_size, config.sparse.n_ctx))
    hf = GPT2LMHeadModel(dense).to(getattr(torch, config.dense_dtype))
    bridges = new_bridges(config, dense.n_embd)
    return JointTrainer(
        config, DenseModel(hf), SparseTransformer(config.sparse), bridges, blocks, options.out / "random", accelerator
    )


def _gpt2_shape(shape: SparseConfig, d_model: int) -> GPT2Config:
    return GPT2Config(
        vocab_size=shape.d_vocab,
        n_positions=shape.n_ctx,
        n_embd=d_model,
        n_layer=shape.n_layers,
        n_head=4,
        bos_token_id=None,
        eos_token_id=None,
    )


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _seconds(options: argparse.Namespace, call: Callable[[], object], n: int) -> float:
    """Seconds per call, the device's work included."""
    _synchronize(options.device)
    start = time.perf_counter()
    for _ in range(n):
        call()
    _synchronize(options.device)
    return (time.perf_counter() - start) / n


def _milliseconds(call: Callable[[], object]) -> float:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options = argparse.Namespace(device=device)
    _seconds(options, call, 3)
    return round(1e3 * _seconds(options, call, 10), 4)


def _matmul_rate(options: argparse.Namespace) -> float:
    """FLOP per second of a large matrix product in bf16."""
    n = 256 if options.quick else 8192
    a, b = (torch.randn(n, n, device=options.device).bfloat16() for _ in range(2))

    def product() -> Tensor:
        return a @ b

    _seconds(options, product, 3)
    return 2 * n**3 / _seconds(options, product, 10)


def _reset_memory(options: argparse.Namespace) -> None:
    if options.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _memory(options: argparse.Namespace) -> float | None:
    return round(torch.cuda.max_memory_allocated() / 2**30, 2) if options.device.type == "cuda" else None


def _name(options: argparse.Namespace) -> str:
    return torch.cuda.get_device_name() if options.device.type == "cuda" else "cpu"


PARTS = {"kernels": kernels, "step": step, "equality": equality, "code": code}


if __name__ == "__main__":
    main()

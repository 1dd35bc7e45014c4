"""Time AbsTopK, the weight projection and products with sparse weights against plain torch, in one run.

Examples:
    python scripts/bench/kernels.py --threads 1
    python scripts/bench/kernels.py --device cuda --json
"""

import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import tyro

from interventions.cli.options import report_errors
from sparse_model.sparsity.abs_topk import abs_topk
from sparse_model.sparsity.projection import projection_mask
from sparse_model.sparsity.sparse_linear import multiply, pack_matrix


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time AbsTopK, the weight projection and products with sparse weights against plain torch, in one run."""

    threads: int = 1
    """Threads of torch and of our kernels (CPU)."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to run."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the activations; weights are float32."""
    repeats: int = 30
    """Timed calls of each; the median counts."""
    json: bool = False
    """Print one line of JSON instead of a table."""


def topk_scatter(x: torch.Tensor, k: int) -> torch.Tensor:
    """What a naive implementation does."""
    indices = x.abs().topk(k, dim=-1).indices
    return torch.zeros_like(x).scatter(-1, indices, x.gather(-1, indices))


def topk_mask(weight: torch.Tensor, k: int) -> torch.Tensor:
    """The same for the projection."""
    mask = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
    mask[weight.reshape(-1).abs().topk(k).indices] = True
    return mask.view(weight.shape)


def milliseconds(call: Callable[[], torch.Tensor], options: Options) -> float:
    """Median time of one call."""
    times = []
    for repeat in range(options.repeats + 3):  # the first calls compile and warm up
        start = time.perf_counter()
        call()
        if options.device == "cuda":
            torch.cuda.synchronize()
        if repeat >= 3:
            times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def main(options: Options) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    x = torch.randn(4096, 512, device=options.device, dtype=getattr(torch, options.dtype))
    weight = torch.randn(2048, 512, device=options.device)
    k = weight.numel() // 64
    check = torch.randn_like(x, dtype=torch.float32)  # bfloat16 has ties, which torch.topk breaks as it likes
    if not torch.equal(abs_topk(check, 128), topk_scatter(check, 128)):
        raise ValueError("the kernels disagree: nothing was timed")
    rows = {
        "AbsTopK 4096 x 512, k 128": (lambda: topk_scatter(x, 128), lambda: abs_topk(x, 128)),
        "projection 2048 x 512, 1/64": (lambda: topk_mask(weight, k), lambda: projection_mask(weight, k)),
        "projection with 4 per row": (
            lambda: topk_mask(weight, k),
            lambda: projection_mask(weight, k, min_per_neuron=4, neuron_axis="row"),
        ),
        "projection with 4 per column": (
            lambda: topk_mask(weight, k),
            lambda: projection_mask(weight, k, min_per_neuron=4, neuron_axis="column"),
        ),
    }
    if options.device == "cpu":
        sparse = torch.where(projection_mask(weight, k), weight, 0)
        packed, inputs = pack_matrix(sparse), x[:1024].float()
        assert packed is not None
        rows["1024 x 512 times that matrix"] = (lambda: inputs @ sparse.T, lambda: multiply(inputs, packed[0]))
        rows["the same with packing it"] = (lambda: inputs @ sparse.T, lambda: multiply(inputs, pack_matrix(sparse)[0]))  # type: ignore[index]
    times = {name: [milliseconds(call, options) for call in calls] for name, calls in rows.items()}
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"{platform.machine()} CPU"
    if options.json:
        print(json.dumps({"device": where, "threads": options.threads, "dtype": options.dtype, "milliseconds": times}))
        return
    print(f"{where}, {options.threads} thread(s), {options.dtype}; milliseconds, median of {options.repeats}")
    for name, (theirs, ours) in times.items():
        print(f"{name:30} torch {theirs:8.2f}   ours {ours:8.2f}   {theirs / ours:5.1f}x")


if __name__ == "__main__":
    with report_errors():
        main(tyro.cli(Options))

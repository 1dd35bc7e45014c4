"""Write random weights in the shape of a released checkpoint, load them, run one forward pass; time and memory.

The weights themselves cannot be had offline; shape, format and code path are those of the released folders.

Example:
    python scripts/bench/released.py csp_yolo2
"""

import json
import resource
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from interventions.cli.options import report_errors
from sparse_model.config import SparsityConfig
from sparse_model.model.openai_format import RELEASED, from_openai, to_openai
from sparse_model.model.transformer import SparseTransformer
from sparse_model.sparsity.projection import project_


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write random weights in the shape of a released checkpoint, load them, run one forward pass; time and memory."""

    shape: tyro.conf.Positional[str] = "csp_yolo2"
    """Name of the released model."""
    batch: int = 1
    """Sequences of the model's whole context."""
    threads: int = 1
    """Threads of torch."""


def main(options: Options) -> None:
    if options.shape not in RELEASED:
        raise ValueError(f"shape {options.shape!r} is unknown: use one of {', '.join(RELEASED)}")
    torch.set_num_threads(options.threads)
    cfg, fraction = RELEASED[options.shape]
    torch.manual_seed(0)
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / options.shape
        model = SparseTransformer(cfg)
        parameters = model.sparse_parameters(fraction)
        start = time.perf_counter()
        project_(parameters, SparsityConfig(nonzero_fraction=fraction, min_per_neuron=0))
        seconds["project"] = time.perf_counter() - start
        to_openai(model, folder)
        del model, parameters
        start = time.perf_counter()
        model = from_openai(folder)
        seconds["load"] = time.perf_counter() - start
        size = sum(path.stat().st_size for path in folder.iterdir()) / 2**30
    tokens = torch.randint(cfg.d_vocab, (options.batch, cfg.n_ctx))
    with torch.no_grad():
        start = time.perf_counter()
        logits = model(tokens)
        seconds["forward"] = time.perf_counter() - start
    if not logits.isfinite().all():
        raise ValueError("the logits are not finite")
    record = {
        "shape": options.shape,
        "parameters": sum(p.numel() for p in model.parameters()),
        "nonzeros": sum(int(p.tensor.count_nonzero()) for p in model.sparse_parameters(1.0)),
        "folder_gib": round(size, 2),
        "tokens": tokens.numel(),
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "peak_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }
    print(json.dumps(record))


if __name__ == "__main__":
    with report_errors():
        main(tyro.cli(Options, description=__doc__))

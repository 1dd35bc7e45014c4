"""Train a weight-sparse model alone, with validation; weights, tokenizer and metrics go into the run folder.

Examples:
    sparse-bridges train-sparse --run runs/sparse
    sparse-bridges train-sparse stdlib --sparsity.nonzero-fraction 0.002 --run runs/sparse-real
    sparse-bridges train-sparse --run runs/sparse --resume
    accelerate launch scripts/train_sparse.py --run runs/sparse   # the same in several processes
"""

import dataclasses

from bridges.config import PRESETS
from interventions.cli.options import loss_verdict, parse_run, say_next
from sparse_model.config import TrainConfig

NAMES = [field.name for field in dataclasses.fields(TrainConfig)]


def command(arguments: list[str]) -> None:
    alone = {
        preset: (what, TrainConfig(**{name: getattr(config, name) for name in NAMES}))
        for preset, (what, config) in PRESETS.items()
    }
    options = parse_run("train-sparse", __doc__, arguments, alone, prefix="sparse-")
    from sparse_model.training.pretrain import PretrainConfig, pretrain

    config = PretrainConfig(**{name: getattr(options.config, name) for name in NAMES})
    metrics = pretrain(config, options.folder, **options.how)
    if metrics:  # of the processes, the one that evaluates
        print(
            f"sparse CE on held-out text: {metrics['val_ce']:.4f} nats per token; {metrics['nonzeros']} nonzero "
            f"weights, 1 in {1 / metrics['nonzero_fraction']:.1f}; saved in {options.folder / 'sparse'}"
        )
        print(loss_verdict(metrics["val_ce"], config.sparse.d_vocab))
        say_next("solved-tasks", str(options.folder), device=options.how["device"] or "cpu")

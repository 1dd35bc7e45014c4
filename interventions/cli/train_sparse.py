"""Train a weight-sparse model alone, with validation; weights, tokenizer and metrics go into the run folder.

Examples:
    sparse-bridges train-sparse --run runs/sparse
    sparse-bridges train-sparse stdlib --sparsity.nonzero-fraction 0.002 --run runs/sparse-real
    sparse-bridges train-sparse --run runs/sparse --resume
    accelerate launch scripts/train_sparse.py --run runs/sparse   # the same in several processes
"""

import dataclasses

from bridges.config import PRESETS
from interventions.cli.options import parse_run
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
    print({name: value for name, value in metrics.items() if name != "corpus"})

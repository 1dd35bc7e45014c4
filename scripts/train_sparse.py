"""Train a weight-sparse model alone, with validation; weights, tokenizer and metrics go into the run folder.

Examples:
    accelerate launch scripts/train_sparse.py --run runs/sparse
    accelerate launch scripts/train_sparse.py stdlib --sparsity.nonzero-fraction 0.002 --run runs/sparse-real
    accelerate launch scripts/train_sparse.py --run runs/sparse --resume
"""

import dataclasses

from bridges.config import PRESETS
from interventions.cli.options import parse_run, report_errors
from sparse_model.config import TrainConfig
from sparse_model.training.pretrain import PretrainConfig, pretrain

NAMES = [field.name for field in dataclasses.fields(TrainConfig)]

if __name__ == "__main__":
    with report_errors():
        alone = {
            preset: (what, PretrainConfig(**{name: getattr(config, name) for name in NAMES}))
            for preset, (what, config) in PRESETS.items()
        }
        options = parse_run(__doc__, alone, prefix="sparse-")
        metrics = pretrain(options.config, options.folder, **options.how)
        print({name: value for name, value in metrics.items() if name != "corpus"})

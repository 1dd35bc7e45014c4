"""`sparse-bridges train-sparse` as a file, for `accelerate launch scripts/train_sparse.py`."""

import sys

from interventions.cli.main import main

if __name__ == "__main__":
    main(["train-sparse", *sys.argv[1:]])

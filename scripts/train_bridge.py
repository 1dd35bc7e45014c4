"""`sparse-bridges train-bridge` as a file, for `accelerate launch scripts/train_bridge.py`."""

import sys

from interventions.cli.main import main

if __name__ == "__main__":
    main(["train-bridge", *sys.argv[1:]])

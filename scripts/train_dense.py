"""Train the small dense GPT-2 of a preset and save it, with its tokenizer, in Hugging Face format in RUN/dense.

Examples:
    python scripts/train_dense.py demo --run runs/demo
    accelerate launch scripts/train_bridge.py demo --run runs/demo        # goes on with it
    accelerate launch scripts/train_bridge.py demo --dense runs/demo/dense --run runs/second
"""

from bridges.config import PRESETS
from bridges.pipeline import make_dense
from interventions.cli.options import parse_run, report_errors

if __name__ == "__main__":
    with report_errors():
        options = parse_run(__doc__, PRESETS)
        folder = options.folder
        loss = make_dense(options.config, folder)
        print(f"dense CE on held-out text: {loss:.4f} nats per token; saved in {folder / 'dense'}")

"""Train a sparse model and bridges beside a frozen dense GPT-2, and evaluate them.

Examples:
    accelerate launch scripts/train_bridge.py                    # preset demo: minutes on a laptop
    accelerate launch scripts/train_bridge.py stdlib --run runs/stdlib
    accelerate launch scripts/train_bridge.py gpt2 --dense gpt2 --corpus codeparrot/codeparrot-clean
    accelerate launch scripts/train_bridge.py demo --resume      # after a kill
"""

from bridges.config import PRESETS
from bridges.pipeline import train_run
from interventions.cli.options import parse_run, report_errors

if __name__ == "__main__":
    with report_errors():
        options = parse_run(__doc__, PRESETS)
        train_run(options.config, options.folder, **options.how)

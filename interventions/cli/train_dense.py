"""Train the small dense GPT-2 of a preset and save it, with its tokenizer, in Hugging Face format in RUN/dense.

Examples:
    sparse-bridges train-dense demo --run runs/demo
    sparse-bridges train-dense demo --run runs/demo --resume   # after a kill
    sparse-bridges train-bridge demo --run runs/demo        # goes on with it
    sparse-bridges train-bridge demo --dense runs/demo/dense --run runs/second
"""

from bridges.config import PRESETS
from interventions.cli.options import parse_run


def command(arguments: list[str]) -> None:
    options = parse_run("train-dense", __doc__, arguments, PRESETS)
    from bridges.pipeline import make_dense

    loss = make_dense(options.config, options.folder, resume=options.how["resume"])
    print(f"dense CE on held-out text: {loss:.4f} nats per token; saved in {options.folder / 'dense'}")

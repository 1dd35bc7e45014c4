"""Train the small dense GPT-2 of a preset and save it, with its tokenizer, in Hugging Face format in RUN/dense.

Examples:
    sparse-bridges train-dense demo --run runs/demo
    sparse-bridges train-dense --run runs/demo --resume     # after a kill
    sparse-bridges train-bridge --run runs/demo --resume    # goes on with it
    sparse-bridges train-bridge demo --dense runs/demo/dense --run runs/second
"""

from bridges.config import PRESETS
from interventions.cli.dense_shape import fit, say_shape
from interventions.cli.options import loss_verdict, parse_run, say_next


def command(arguments: list[str]) -> None:
    options = parse_run("train-dense", __doc__, arguments, PRESETS, fit=fit)
    say_shape(options)
    from bridges.pipeline import make_dense

    loss = make_dense(options.config, options.folder, resume=options.how["resume"], device=options.how["device"])
    print(f"dense CE on held-out text: {loss:.4f} nats per token; saved in {options.folder / 'dense'}")
    print(loss_verdict(loss, options.config.sparse.d_vocab))
    # With the options that were given here.
    say_next("train-bridge", "--run", str(options.folder), "--resume", device=options.how["device"] or "cpu")

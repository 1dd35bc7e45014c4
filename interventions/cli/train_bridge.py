"""Train a sparse model and bridges beside a frozen dense model, and evaluate them.

Examples:
    sparse-bridges train-bridge                    # preset demo: minutes on a laptop
    sparse-bridges train-bridge stdlib --run runs/stdlib
    sparse-bridges train-bridge gpt2 --dense gpt2 --corpus codeparrot/codeparrot-clean
    sparse-bridges train-bridge --run runs/demo --resume    # after a kill: the run's own preset and options
    accelerate launch scripts/train_bridge.py demo # the same in several processes
"""

from bridges.config import PRESETS
from interventions.cli.dense_shape import fit, say_shape
from interventions.cli.options import parse_run, say_next


def command(arguments: list[str]) -> None:
    options = parse_run("train-bridge", __doc__, arguments, PRESETS, fit=fit)
    say_shape(options)
    from bridges.pipeline import train_bridge

    if train_bridge(options.config, options.folder, **options.how):  # of the processes, the one that evaluates
        say_next("find-channel", "--run", str(options.folder), device=options.how["device"] or "cpu")

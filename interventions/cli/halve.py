"""Write a finished run anew with its weights rounded to half precision, half as large, and evaluate it.

Example:
    sparse-bridges halve --run runs/bundle --out runs/bundle-half
"""

from dataclasses import dataclass

from interventions.cli.options import parse, say_next


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write a finished run anew with its weights rounded to half precision, half as large, and evaluate it."""

    run: str
    """Run folder, or the name of a packaged bundle."""
    out: str
    """Folder of the new run; channels and circuits are found there anew."""
    device: str = "cpu"
    """Where the models run: cpu, cuda or cuda:N."""


def command(arguments: list[str]) -> None:
    main(parse(Options, "halve", arguments))


def main(options: Options) -> None:
    from bridges.evaluation import evaluation_table
    from bridges.halving import halve_run

    print(evaluation_table(halve_run(options.run, options.out, device=options.device)))
    say_next("find-channel", "--run", options.out, device=options.device)

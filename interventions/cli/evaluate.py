"""Evaluate a run on held-out text: the per-site table, saved in RUN/metrics.json.

Example:
    sparse-bridges evaluate --run runs/demo
"""

from dataclasses import dataclass

from interventions.cli.options import parse, say_next, writing_into


@dataclass(frozen=True, kw_only=True)
class Options:
    """Evaluate a run on held-out text: the per-site table, saved in RUN/metrics.json."""

    run: str = "runs/demo"
    """Run folder."""
    device: str = "cpu"
    """Where the models run: cpu, cuda or cuda:N."""
    tokens: int | None = None
    """Held-out tokens; unset: as many as the run's config says."""


def command(arguments: list[str]) -> None:
    main(parse(Options, "evaluate", arguments))


def main(options: Options) -> None:
    from bridges.evaluation import evaluation_table
    from bridges.pipeline import evaluate_run
    from bridges.run_folder import open_run

    with writing_into(options.run):
        print(evaluation_table(evaluate_run(open_run(options.run, options.device), tokens=options.tokens)))
    say_next("find-channel", "--run", options.run, device=options.device)

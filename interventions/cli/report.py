"""Write a run's report: one HTML file, RUN/report.html, that opens in any browser and needs nothing else.

Example:
    sparse-bridges report --run runs/demo
"""

from dataclasses import dataclass
from pathlib import Path

from interventions.cli.options import parse, writing_into


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write a run's report: one HTML file, RUN/report.html, that opens in any browser and needs nothing else."""

    run: str = "runs/demo"
    """Run folder."""
    device: str = "cpu"
    """Where the models run: cpu, cuda or cuda:N."""


def command(arguments: list[str]) -> None:
    main(parse(Options, "report", arguments))


def main(options: Options) -> None:
    from interventions.report.page import write_report

    with writing_into(options.run):
        print(f"report: {write_report(Path(options.run), options.device)}")

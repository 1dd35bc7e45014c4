"""Write a run's report: one HTML file, RUN/report.html, that opens in any browser and needs nothing else.

Example:
    python scripts/report.py --run runs/demo
"""

from dataclasses import dataclass
from pathlib import Path

import tyro

from interventions.cli.options import report_errors
from interventions.report.page import write_report


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write a run's report: one HTML file, RUN/report.html, that opens in any browser and needs nothing else."""

    run: str = "runs/demo"
    """Run folder."""


def main(options: Options) -> None:
    print(f"report: {write_report(Path(options.run))}")


if __name__ == "__main__":
    with report_errors():
        main(tyro.cli(Options))

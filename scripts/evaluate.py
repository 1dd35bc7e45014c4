"""Evaluate a run on held-out text: the per-site table, saved in RUN/metrics.json.

Example:
    python scripts/evaluate.py --run runs/demo
"""

from dataclasses import dataclass

import tyro

from bridges.evaluation import evaluation_table
from bridges.pipeline import evaluate_run
from bridges.run_folder import open_run
from interventions.cli.options import report_errors
from sparse_model.data.prepare import prepare_corpus


@dataclass(frozen=True, kw_only=True)
class Options:
    """Evaluate a run on held-out text: the per-site table, saved in RUN/metrics.json."""

    run: str = "runs/demo"
    """Run folder."""
    tokens: int | None = None
    """Held-out tokens; unset: as many as the run's config says."""


def main(options: Options) -> None:
    run = open_run(options.run)
    blocks = prepare_corpus(run.config, run.tokenizer)
    print(evaluation_table(evaluate_run(run, blocks.val, options.tokens or run.config.eval_tokens)))


if __name__ == "__main__":
    with report_errors():
        main(tyro.cli(Options))

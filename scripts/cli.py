"""What the scripts share: presets on the command line, and errors as one sentence."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated

import tyro
from transformers.utils import logging as transformers_logging

from bridges.config import PRESETS, RunConfig
from bridges.training import Interrupted, TrainingDiverged

# transformers' bars for loading a few small files would only hide ours.
transformers_logging.disable_progress_bar()


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """A preset with overrides, and where the run goes."""

    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    run: str
    """Run folder."""
    resume: bool = False
    """Go on from the run's last checkpoint (and keep what it has already made)."""
    trackers: tuple[str, ...] = ()
    """Accelerate trackers besides metrics.jsonl: tensorboard, wandb, trackio, ..."""


def parse_run(description: str | None, argv: list[str] | None = None) -> RunOptions:
    """Parse `[PRESET] [--option value ...]`; the preset may also be given as --preset NAME."""
    args = list(sys.argv[1:] if argv is None else argv)
    preset = "demo"
    if "--preset" in args[:-1]:
        at = args.index("--preset")
        preset = args[at + 1]
        del args[at : at + 2]
    elif args and not args[0].startswith("-"):
        preset = args.pop(0)
    if preset not in PRESETS:
        raise ValueError(f"preset {preset!r} is unknown: use one of {', '.join(PRESETS)}")
    presets = "\n".join(f"    {name:8} {what}" for name, (what, _) in PRESETS.items())
    return tyro.cli(
        RunOptions,
        prog=f"{os.path.basename(sys.argv[0])} {preset}",
        description=f"{description}\nPresets (first argument; the defaults below are those of {preset}):\n{presets}",
        default=RunOptions(config=PRESETS[preset][1], run=f"runs/{preset}"),
        args=args,
    )


@contextmanager
def report_errors() -> Iterator[None]:
    """Turn a user's mistake into one sentence and exit code 2; SPARSE_BRIDGES_TRACEBACK=1 shows where it rose."""
    try:
        yield
    except (ValueError, LookupError, OSError, TrainingDiverged, Interrupted) as error:
        if os.environ.get("SPARSE_BRIDGES_TRACEBACK"):
            raise
        message = error.args[0] if isinstance(error, LookupError) and error.args else error
        print(f"error: {message}", file=sys.stderr)
        sys.exit(130 if isinstance(error, Interrupted) else 2)

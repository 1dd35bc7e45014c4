"""What the scripts share: presets on the command line, and errors as one sentence."""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import tyro
from transformers.utils import logging as transformers_logging

from sparse_model.config import TrainConfig
from sparse_model.training.interrupts import Interrupted
from sparse_model.training.trainer import TrainingDiverged

# transformers' bars for loading a few small files would only hide ours.
transformers_logging.disable_progress_bar()


Config = TypeVar("Config", bound=TrainConfig)


@dataclass(frozen=True)
class RunOptions(Generic[Config]):
    """A preset with overrides, where the run goes, and how it is run."""

    config: Config
    folder: Path
    how: dict[str, Any]
    """resume, trackers and processes, as the pipelines take them."""


def parse_run(
    description: str | None, presets: Mapping[str, tuple[str, Config]], *, prefix: str = ""
) -> RunOptions[Config]:
    """Parse `[PRESET] [--option value ...]`; the preset may also be given as --preset NAME, the first is the default.

    The folder is by default runs/PRESET with a prefix, so that two kinds of training do not share one.
    Raises ValueError for an unknown preset.
    """
    args = sys.argv[1:]
    preset = next(iter(presets))
    if "--preset" in args[:-1]:
        at = args.index("--preset")
        preset = args[at + 1]
        del args[at : at + 2]
    elif args and not args[0].startswith("-"):
        preset = args.pop(0)
    if preset not in presets:
        raise ValueError(f"preset {preset!r} is unknown: use one of {', '.join(presets)}")
    chosen = presets[preset][1]

    @dataclass(frozen=True, kw_only=True)
    class Options:
        run: str = f"runs/{prefix}{preset}"
        """Run folder."""
        resume: bool = False
        """Go on from the run's last checkpoint (and keep what it has already made)."""
        trackers: tuple[str, ...] = ()
        """Accelerate trackers besides metrics.jsonl: tensorboard, wandb, trackio, ..."""
        processes: int | None = None
        """Refuse to start unless exactly so many processes take part."""
        config: Annotated[type(chosen), tyro.conf.arg(name="")] = chosen  # type: ignore[valid-type]

    lines = "\n".join(f"    {name:8} {what}" for name, (what, _) in presets.items())
    options = tyro.cli(
        Options,
        prog=f"{os.path.basename(sys.argv[0])} {preset}",
        description=f"{description}\nPresets (first argument; the defaults below are those of {preset}):\n{lines}",
        args=args,
    )
    how = {name: getattr(options, name) for name in ("resume", "trackers", "processes")}
    return RunOptions(options.config, Path(options.run), how)


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

"""What the commands share: presets on the command line, messages, and errors as one sentence that names options."""

import dataclasses
import io
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar, get_type_hints

import tyro

from bridges.config import KEPT
from interventions.tasks.names import TASK_NAMES, PromptKind
from sparse_model.config import InvalidOption, TrainConfig
from sparse_model.io.commands import command_line
from sparse_model.io.lock import one_writer
from sparse_model.io.reading import read_json, typed
from sparse_model.training.interrupts import Interrupted, interruptible

TASK_LIST = f"one of {', '.join(TASK_NAMES)}, or a file of pairs of your own, such as ./my_task.jsonl"
"""For the help of --task."""

PROMPTS_HELP = "Prompts from templates, or places in held-out files of the run's corpus (of stdlib where it has none)."
"""For the help of --prompts."""

SteeredTask = Annotated[
    str | None,
    tyro.conf.arg(help=f"Task whose prompts are steered, {TASK_LIST}; unset: the one that the channel was found for."),
]
SteeredPrompts = Annotated[PromptKind | None, tyro.conf.arg(help=f"{PROMPTS_HELP} Unset: as for the channel's search.")]

DEVICE_HELP = "Where the models run: cpu, cuda or cuda:N; unset: a CUDA device where there is one."
"""For the help of a training's --device."""

Config = TypeVar("Config", bound=TrainConfig)
Options = TypeVar("Options")

_typed: dict[str, str] = {}
"""What stands on the command line for each name that a message may call an option by; filled when it is parsed."""
# Names in messages of library code that was given an option's value under another name.
_OTHER_NAMES = {"spec": "--corpus", "max_tokens": "--corpus-tokens", "vocab_size": "--sparse.d-vocab"}


@dataclass(frozen=True)
class RunOptions(Generic[Config]):
    """A preset with overrides, where the run goes, and how it is run."""

    config: Config
    folder: Path
    how: dict[str, Any]
    """resume, trackers, processes and device, as the pipelines take them."""


def parse(options: type[Options], command: str, arguments: list[str], description: str | None = None) -> Options:
    """The options of a command. A value that they refuse is an `InvalidOption`; what cannot be parsed ends the process.

    From here on errors name them as they are typed, see `as_typed`.
    """
    _typed.clear()
    _typed.update(_OTHER_NAMES | _flags(options))
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return tyro.cli(options, prog=f"sparse-bridges {command}", description=description, args=arguments)
    except SystemExit as end:
        refused: BaseException | None = end
        while refused is not None and not isinstance(refused, InvalidOption):
            refused = refused.__context__
        if refused is not None:  # tyro would frame it, under the name of the field that holds the option's group
            raise refused from None
        print(said.getvalue(), end="", file=sys.stderr)
        raise


def parse_run(
    command: str,
    description: str | None,
    arguments: list[str],
    presets: Mapping[str, tuple[str, Config]],
    *,
    prefix: str = "",
    fit: Callable[[Config, str, Path], Config] | None = None,
) -> RunOptions[Config]:
    """Parse `[PRESET] [--option value ...]`; the preset may also be given as --preset NAME, the first is the default.

    The folder is by default runs/PRESET with a prefix, so that two kinds of training do not share one. --resume without
    a preset takes all from the run's own configuration. Otherwise, where --dense is given, `fit` (preset, dense model,
    folder) gives the defaults that go with it.
    Raises ValueError for an unknown preset, and for a run of another kind of training.
    """
    named, arguments = _preset(arguments)
    preset = named or next(iter(presets))
    if preset not in presets:
        raise ValueError(f"preset {preset!r} is unknown: use one of {', '.join(presets)}")
    chosen, folder, origin = presets[preset][1], f"runs/{prefix}{preset}", preset
    place, dense = Path(_given(arguments, "--run") or folder), _given(arguments, "--dense")
    kept = None if named or "--resume" not in arguments else _kept(type(chosen), command, place)
    if kept is not None:
        chosen, origin = kept, str(place)
    elif fit and dense:
        start = _given(arguments, "--start-from")
        begin: dict[str, Any] = {"start_from": start} if start else {}
        chosen = fit(dataclasses.replace(chosen, **begin), dense, place)

    @dataclass(frozen=True, kw_only=True)
    class Options:
        run: str = folder
        """Run folder."""
        resume: bool = False
        """Go on from the run's last checkpoint (and keep what it has already made); without a preset, with the options
        that the run was begun with."""
        trackers: tuple[str, ...] = ()
        """Accelerate trackers besides metrics.jsonl: tensorboard, wandb, trackio, ..."""
        processes: int | None = None
        """Refuse to start unless exactly so many processes take part."""
        device: Annotated[str | None, tyro.conf.arg(help=DEVICE_HELP)] = None
        config: Annotated[type(chosen), tyro.conf.arg(name="")] = chosen  # type: ignore[valid-type]

    lines = "\n".join(f"    {name:8} {what}" for name, (what, _) in presets.items())
    title = f"{description}\nPresets (first argument; the defaults below are those of {origin}):\n{lines}"
    options = parse(Options, f"{command} {preset}" if kept is None else command, arguments, title)
    how = {name: getattr(options, name) for name in ("resume", "trackers", "processes", "device")}
    return RunOptions(options.config, Path(options.run), how)


def _preset(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The preset that is named, if any, and the other arguments."""
    if "--preset" in arguments[:-1]:
        position = arguments.index("--preset")
        return arguments[position + 1], arguments[:position] + arguments[position + 2 :]
    if arguments and not arguments[0].startswith("-"):
        return arguments[0], arguments[1:]
    return None, arguments


def _kept(kind: type[Config], command: str, folder: Path) -> Config | None:
    """The configuration that a run folder keeps; None where there is none."""
    path = next((folder / name for name in KEPT if (folder / name).is_file()), None)
    if path is None:
        return None
    remedy = "correct it, or copy it again from where the folder came"
    data = read_json(path, remedy)
    bridged = isinstance(data, dict) and "bridge" in data
    if bridged != ("bridge" in get_type_hints(kind)):  # what the other kind of training may lack has defaults
        other = command_line("train-bridge" if bridged else "train-sparse", "--run", folder, "--resume")
        raise ValueError(f"{path} is not of {command}: {other} goes on with it, or name another folder with --run")
    return typed(kind, data, path, remedy)


def _given(arguments: list[str], flag: str) -> str | None:
    """The value that stands behind a flag; None where it does not."""
    for at, argument in enumerate(arguments):
        if argument == flag and at + 1 < len(arguments):
            return arguments[at + 1]
        if argument.startswith(f"{flag}="):
            return argument.removeprefix(f"{flag}=")
    return None


def _flags(options: type, prefix: str = "") -> dict[str, str]:
    """By a field's name, alone and behind its groups', the flag. What two have in common means the outer or first."""
    hints = get_type_hints(options)
    flags: dict[str, str] = {}
    groups = []
    for field in dataclasses.fields(options):
        if dataclasses.is_dataclass(hints[field.name]):
            groups.append(field.name)
            continue
        parts = [*prefix.split(".")[:-1], field.name]
        flags |= {".".join(parts[i:]): f"--{prefix}{field.name}".replace("_", "-") for i in range(len(parts))}
    for name in groups:
        bare = name in ("config", "experiment", "comparison")  # those whose options have no prefix
        outer = "" if bare else f"{prefix}{name}."
        flags = _flags(hints[name], outer) | flags
    return flags


def as_typed(message: str) -> str:
    """A message with the options that it names as one types them: `--text-field x` for `text_field='x'`.

    What a file holds keeps its own names.
    """
    if " is not a valid " in message or " is damaged (" in message:
        return message

    def flag(match: re.Match[str]) -> str:
        name, equals = match.groups()
        if name not in _typed or not (equals or "_" in name):  # a plain word
            return match[0]
        return _typed[name] + " " * bool(equals)

    return re.sub(r"(?<![\w./'\"-])([a-z][\w.]*\w)(=?)(?![\w/'\"]*/)", flag, message)


def loss_verdict(loss: float, d_vocab: int) -> str:
    """A model's loss beside that of a guess at random, in words."""
    guess = math.log(d_vocab)
    words = ": it has learned little so far, raise --steps" if loss > guess / 2 else ""
    return f"a guess among the {d_vocab} tokens would cost {guess:.2f} nats{words}"


def say_next(command: str, *arguments: str, device: str = "cpu") -> None:
    """Print the command that comes next, ready to be typed; on the device of this one."""
    where = [] if device == "cpu" else ["--device", device]
    print(f"next: {command_line(command, *arguments, *where)}")


class _Handler(logging.Handler):
    """Messages as they are to standard output, warnings to standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        warning = record.levelno >= logging.WARNING
        text = f"{record.levelname.lower()}: {record.getMessage()}" if warning else record.getMessage()
        print(text, file=sys.stderr if warning else sys.stdout, flush=True)


@contextmanager
def show_messages() -> Iterator[None]:
    """Print what the three packages log meanwhile."""
    handler, loggers = _Handler(), [logging.getLogger(name) for name in ("sparse_model", "bridges", "interventions")]
    for logger in loggers:
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.setLevel(logging.NOTSET)
            logger.removeHandler(handler)


@contextmanager
def report_errors() -> Iterator[None]:
    """Turn a user's mistake into one sentence and exit code 2; SPARSE_BRIDGES_TRACEBACK=1 shows where it rose.

    Meanwhile what the packages log is printed, and transformers' bars, for loading a few small files, hide no others.
    """
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if "transformers" in sys.modules:  # too late for the variable
        sys.modules["transformers"].utils.logging.disable_progress_bar()
    try:
        with (
            show_messages(),
            interruptible("what this command had not yet saved is lost; the same command starts it again"),
        ):
            yield
    except _mistakes() as error:
        if os.environ.get("SPARSE_BRIDGES_TRACEBACK"):
            raise
        message = error.args[0] if isinstance(error, LookupError) and error.args else error
        print(f"error: {as_typed(str(message))}", file=sys.stderr)
        sys.exit(130 if isinstance(error, KeyboardInterrupt) else 2)


@contextmanager
def writing_into(run: str | Path) -> Iterator[None]:
    """Be the only process that writes into a run; a folder that does not exist is left to what opens it."""
    folder = Path(run).expanduser()
    with one_writer(folder) if folder.is_dir() else nullcontext():
        yield


def _mistakes() -> tuple[type[BaseException], ...]:
    finite: Any = sys.modules.get("sparse_model.training.finite")  # importing it takes seconds
    diverged = (finite.TrainingDiverged,) if finite else ()
    return ValueError, LookupError, OSError, Interrupted, *diverged

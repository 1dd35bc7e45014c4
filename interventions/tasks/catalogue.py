"""Tasks by name: the twenty, and those in files of one's own."""

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import MappingProxyType

from transformers import PreTrainedTokenizerFast

from interventions.tasks.base import DEFAULT_MAX_TOKENS, Task, TaskSpec
from interventions.tasks.files import FileTask, is_task_file, read_task_file
from interventions.tasks.mining import MINERS
from interventions.tasks.names import NATURAL, TASK_NAMES, PromptKind, check_task_name
from interventions.tasks.natural import NaturalTask

TASKS: Mapping[str, TaskSpec] = MappingProxyType(
    {name: import_module(f"interventions.tasks.twenty.{name}").TASK for name in TASK_NAMES}
)

TaskName = str | Path | TaskSpec
"""One of the twenty, also with `-natural` behind it; a file of pairs (`interventions.tasks.files`); or a spec."""


def list_tasks(prompts: PromptKind = "generated") -> list[str]:
    """The names of all tasks, in the paper's order; of those that have natural prompts, as records name them."""
    return list(TASKS) if prompts == "generated" else [name + NATURAL for name in TASKS if name in MINERS]


def task_spec(name: TaskName) -> TaskSpec:
    """A task before it meets a tokenizer.

    Raises KeyError for an unknown name (the message lists close ones), and what `read_task_file` raises.
    """
    if isinstance(name, TaskSpec):
        return name
    if isinstance(name, Path) or is_task_file(name):
        return read_task_file(name).spec
    check_task_name(name)
    return TASKS[name.removesuffix(NATURAL)]


def get_task(
    name: TaskName,
    tokenizer: PreTrainedTokenizerFast,
    *,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    prompts: PromptKind = "generated",
    texts: Sequence[str] = (),
    text: str = "given",
) -> Task:
    """The task `name` for `tokenizer`, with prompts of at most `max_tokens` tokens (end-of-text included).

    Prompts are generated from templates, or natural: found in `texts`, files that the models were not trained on,
    which `text` describes. A task from a file has its own.

    Raises:
        KeyError: an unknown name; the message lists close ones.
        ValueError: natural prompts without texts, or of a task that real text does not contain; what reading a file of
            pairs raises.
    """
    if prompts not in ("generated", "natural"):
        raise ValueError(f"prompts={prompts!r}: use generated or natural")
    if isinstance(name, Path) or (isinstance(name, str) and is_task_file(name)):
        if prompts == "natural":
            raise ValueError(f"task {str(name)!r} has its own prompts: leave out prompts='natural'")
        file = read_task_file(name)
        return FileTask(spec=file.spec, tokenizer=tokenizer, max_tokens=max_tokens, file=file)
    spec = task_spec(name)
    if prompts == "generated" and not (isinstance(name, str) and name.endswith(NATURAL)):
        return Task(spec=spec, tokenizer=tokenizer, max_tokens=max_tokens)
    if spec.name not in MINERS:
        raise ValueError(
            f"task {spec.name!r} has no natural prompts; use generated ones, or one of {', '.join(MINERS)}"
        )
    if not texts:
        raise ValueError("texts is empty: natural prompts are found in held-out files; give their texts")
    return NaturalTask(spec=spec, tokenizer=tokenizer, max_tokens=max_tokens, texts=texts, text=text)

"""The twenty tasks by name."""

import difflib
from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType

from transformers import PreTrainedTokenizerFast

from interventions.tasks.base import DEFAULT_MAX_TOKENS, Task, TaskSpec
from interventions.tasks.names import TASK_NAMES

TASKS: Mapping[str, TaskSpec] = MappingProxyType(
    {name: import_module(f"interventions.tasks.twenty.{name}").TASK for name in TASK_NAMES}
)


def list_tasks() -> list[str]:
    """The names of all tasks, in the paper's order."""
    return list(TASKS)


def get_task(name: str, tokenizer: PreTrainedTokenizerFast, *, max_tokens: int = DEFAULT_MAX_TOKENS) -> Task:
    """The task `name` for `tokenizer`, with prompts of at most `max_tokens` tokens (end-of-text included).

    Raises:
        KeyError: an unknown name; the message lists close ones.
    """
    if name not in TASKS:
        close = difflib.get_close_matches(name, TASKS, n=3, cutoff=0.4) or list(TASKS)
        raise KeyError(f"unknown task {name!r}; did you mean {', '.join(close)}?")
    return Task(spec=TASKS[name], tokenizer=tokenizer, max_tokens=max_tokens)

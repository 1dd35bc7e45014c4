"""The twenty tasks by name."""

import difflib
from collections.abc import Mapping, Sequence
from importlib import import_module
from types import MappingProxyType
from typing import Literal

from transformers import PreTrainedTokenizerFast

from interventions.tasks.base import DEFAULT_MAX_TOKENS, Task, TaskSpec
from interventions.tasks.mining import MINERS
from interventions.tasks.natural import NaturalTask

_NAMES = (
    "single_double_quote",
    "bracket_counting",
    "set_or_string",
    "set_or_string_fixedvarname",
    "final_kwarg",
    "class_init",
    "with_as",
    "bracket_brace",
    "with_open",
    "for_while",
    "else_elif",
    "fstring_brace",
    "if_ternary",
    "var_swap",
    "indent_for",
    "lambda_func",
    "if_equals",
    "enumerate_range",
    "var_if",
    "while_return_true",
)
TASKS: Mapping[str, TaskSpec] = MappingProxyType(
    {name: import_module(f"interventions.tasks.twenty.{name}").TASK for name in _NAMES}
)


def list_tasks() -> list[str]:
    """The names of all tasks, in the paper's order."""
    return list(TASKS)


def get_task(
    name: str,
    tokenizer: PreTrainedTokenizerFast,
    *,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    prompts: Literal["generated", "natural"] = "generated",
    texts: Sequence[str] = (),
) -> Task:
    """The task `name` for `tokenizer`, with prompts of at most `max_tokens` tokens (end-of-text included).

    Prompts are generated from templates, or natural: found in `texts`, files that the models were not trained on.

    Raises:
        KeyError: an unknown name; the message lists close ones.
        ValueError: natural prompts without texts, or of a task that real text does not contain.
    """
    if name not in TASKS:
        close = difflib.get_close_matches(name, TASKS, n=3, cutoff=0.4) or list(TASKS)
        raise KeyError(f"unknown task {name!r}; did you mean {', '.join(close)}?")
    if prompts == "generated":
        return Task(spec=TASKS[name], tokenizer=tokenizer, max_tokens=max_tokens)
    if prompts != "natural":
        raise ValueError(f"prompts={prompts!r}: use generated or natural")
    if name not in MINERS:
        raise ValueError(f"task {name!r} has no natural prompts; use generated ones, or one of {', '.join(MINERS)}")
    if not texts:
        raise ValueError("texts is empty: natural prompts are found in held-out files; give their texts")
    return NaturalTask(spec=TASKS[name], tokenizer=tokenizer, max_tokens=max_tokens, texts=texts)

"""The names of the twenty tasks, in the paper's order; the command line lists them without loading anything else."""

import difflib
from pathlib import Path
from typing import Literal

PromptKind = Literal["generated", "natural"]
"""Prompts from templates, or places in held-out files. A file of one's own pairs has only its own."""

NATURAL = "-natural"
"""Ends a task's name where its prompts are natural, in every table and record."""

TASK_FILES = (".jsonl", ".csv")
"""How the name of a file of pairs ends."""

TASK_NAMES = (
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


def check_task_name(name: str) -> None:
    """Raise KeyError for a name that is no task's, naming close ones, and FileNotFoundError for a file that is not."""
    if Path(name).suffix in TASK_FILES:
        if not Path(name).expanduser().is_file():
            raise FileNotFoundError(f"no task file at {Path(name)}: give one of the twenty tasks, or a file of pairs")
        return
    base = name.removesuffix(NATURAL)
    if base not in TASK_NAMES:
        close = difflib.get_close_matches(base, TASK_NAMES, n=3, cutoff=0.4) or list(TASK_NAMES)
        raise KeyError(f"unknown task {name!r}; did you mean {', '.join(close)}? A task of your own is a .jsonl file")

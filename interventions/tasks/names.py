"""The names of the twenty tasks, in the paper's order; the command line lists them without loading anything else."""

from typing import Literal

PromptKind = Literal["generated", "natural"]
"""Prompts from templates, or places in held-out files. A file of one's own pairs has only its own."""

NATURAL = "-natural"
"""Ends a task's name where its prompts are natural, in every table and record."""

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

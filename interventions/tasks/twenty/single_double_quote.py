"""single_double_quote: close a string with the quote that opened it."""

from collections.abc import Sequence

from interventions.tasks.base import LEADS, TaskSpec, Template
from sparse_model.data.generated_python import indented


def _template(before: str) -> Template:
    """Member 0 opens its last string with `("`, member 1 with `('`; the strings before are equal in both."""
    return Template(
        prompts=(f'{before}("$p0', f"{before}('$p0"),
        completions=('")\n', "')\n"),
        answers=(('")', "')"),),
    )


def _templates(leads: Sequence[str], callee: str) -> tuple[Template, ...]:
    """The string call alone, assigned, and returned, after each lead."""
    return tuple(
        _template(before)
        for lead in leads
        for before in (
            f"{lead}\n{callee}",
            f"{lead}\n$n0 = {callee}",
            f"def $v0($n0):\n    {indented(lead, '    ')}\n    return {callee}",
        )
    )


_EVALUATION_LEADS = (*LEADS["evaluation"], *(f"{lead}\n$s8" for lead in LEADS["evaluation"]))

# The three groups of method callees are disjoint, and no document has those of the evaluation.
TASK = TaskSpec(
    name="single_double_quote",
    channel="quote_type",
    description="Close a string argument with `\")` or `')`, from whether it was opened with `(\"` or `('`.",
    templates={
        "train": _templates(LEADS["train"], "$m0"),
        "selection": _templates(LEADS["selection"], "$x0"),
        "evaluation": _templates(_EVALUATION_LEADS, "$e0"),
    },
)

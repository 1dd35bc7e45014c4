"""if_ternary: `if` as a statement ends in a colon, within a conditional expression in `else`."""

from interventions.tasks.base import TaskSpec, Template, with_leads

_FUNCTION = "def $v0($n0):\n    @\n    "
_ANSWERS = ((":", " else"),)

TASK = TaskSpec(
    name="if_ternary",
    channel="if_type",
    description="After a condition write `:` or ` else`, from whether `if` starts the statement or not.",
    templates=with_leads(
        Template(
            prompts=("@\nif $n0 and not $n1", "@\n$n2 = $n0 if $n1"),
            completions=(":\n    $s7", " else $n3\n"),
            answers=_ANSWERS,
        ),
        Template(
            prompts=(_FUNCTION + "if $n1 and $n2", _FUNCTION + "return $n1 if $n2"),
            completions=(":\n        $s7\n    return $s6", " else $n3\n"),
            answers=_ANSWERS,
        ),
    ),
)

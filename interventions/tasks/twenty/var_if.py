"""var_if: a condition ends in a colon, an assignment in a newline."""

from interventions.tasks.base import TaskSpec, Template, with_leads

_FUNCTION = "def $v0($n4):\n    @\n    "

# `not` and the first target give both members the same number of tokens.
TASK = TaskSpec(
    name="var_if",
    channel="comparison",
    description="After `x == True` in a condition or `x = True` write `:` or a newline.",
    templates=with_leads(
        Template(
            prompts=("@\nif not $n0 == True", "@\n$n1 = $n0 = True"),
            completions=(":\n    $s7", "\n$s7"),
            answers=((":", "\n"),),
        ),
        Template(
            prompts=(_FUNCTION + "if not $n0 == True", _FUNCTION + "$n1 = $n0 = True"),
            completions=(":\n        $s7\n    return $s6", "\n    $s7\n    return $s6"),
            answers=((":", "\n    "), (":", "\n")),
        ),
    ),
)

"""for_while: what follows the name in a loop's head."""

from interventions.tasks.base import TaskSpec, Template, with_leads, within_function

_LOOP = Template(
    prompts=("@\nfor $n0", "@\nwhile $n0"),
    completions=(" in $n1:\n    $s7", ":\n    $s7"),
    answers=((" in", ":"),),
)
TASK = TaskSpec(
    name="for_while",
    channel="loop_type",
    description="After a name write ` in` or `:`, from whether `for` or `while` stands before it.",
    templates=with_leads(_LOOP, within_function(_LOOP)),
)

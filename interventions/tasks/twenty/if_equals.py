"""if_equals: compare in a condition, assign in an assignment."""

from interventions.tasks.base import TaskSpec, Template, with_leads, within_function

_EQUALS = Template(
    # `not` and the first target give both members the same number of tokens.
    prompts=("@\nif not $w0", "@\n$w1, $w0"),
    completions=(" == $n1:\n    $s7", " = $w0, $w1\n"),
    answers=((" ==", " ="),),
)
TASK = TaskSpec(
    name="if_equals",
    channel="equals_type",
    description="After a name write ` ==` or ` =`, from whether it stands in a condition or is assigned.",
    templates=with_leads(_EQUALS, within_function(_EQUALS)),
)

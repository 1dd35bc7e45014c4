"""enumerate_range: two loop variables need `enumerate`."""

from interventions.tasks.base import TaskSpec, Template, with_leads, within_function

_COMPREHENSION = Template(
    # Within a list, so that `+ i` can make up for the second variable's two tokens.
    prompts=("@\n$n0 = [$n1 for i, $n1 in", "@\n$n0 = [$n1 + i for i in"),
    completions=(" enumerate($n2)]\n", " range($d0)]\n"),
    answers=((" enumerate", " range"),),
)
TASK = TaskSpec(
    name="enumerate_range",
    channel="loop_variables",
    description="Loop over ` enumerate` or ` range`, from whether there are two loop variables or one.",
    templates=with_leads(_COMPREHENSION, within_function(_COMPREHENSION)),
)

"""var_swap: the second name of a swap."""

from interventions.tasks.base import TaskSpec, Template, with_leads, within_function

_SWAP = Template(
    prompts=("@\n$w0, $w1 = $w1,", "@\n$w1, $w0 = $w0,"),
    completions=(" $w0\n", " $w1\n"),
    answers=((" $w0", " $w1"),),
)
TASK = TaskSpec(
    name="var_swap",
    channel="swapped_name",
    description="Give the last name of `x, y = y, x`.",
    templates=with_leads(_SWAP, within_function(_SWAP)),
)

"""bracket_brace: what follows the first element of a dict or a list."""

from interventions.tasks.base import TaskSpec, Template, with_leads

TASK = TaskSpec(
    name="bracket_brace",
    channel="bracket_type",
    description="After a first element write `:` or `,`, from whether `{` or `[` opened the literal.",
    templates=with_leads(
        Template(
            prompts=("@\n$n0 = {$n1", "@\n$n0 = [$n1"),
            completions=(": $n2, $n3: $n4}\n", ", $n2, $n3]\n"),
            answers=((":", ","),),
        )
    ),
)

"""bracket_counting: close as many brackets as are open."""

from interventions.tasks.base import TaskSpec, Template, with_leads


def _template(elements: str) -> Template:
    return Template(
        prompts=(f"@\n$n0 = [{elements}", f"@\n$n0 = [[{elements}"),
        completions=("]\n$s7", "]]\n$s7"),
        answers=(("]", "]]"),),
    )


TASK = TaskSpec(
    name="bracket_counting",
    channel="bracket_depth",
    description="Close a list with `]` or `]]`, from its nesting depth.",
    templates=with_leads(_template("$n1, $n2, $n3"), _template("$d1, $d2, $d3")),
)

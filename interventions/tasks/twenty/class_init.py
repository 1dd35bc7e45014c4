"""class_init: assign the parameter of the attribute's name."""

from interventions.tasks.base import TaskSpec, Template, with_leads


def _prompt(name: str) -> str:
    head = "class Item:\n    def __init__(self, $w0, $w1, $w2):"
    return f"@\n\n{head}\n        self.$w2 = $w2\n        self.{name} ="


TASK = TaskSpec(
    name="class_init",
    channel="attribute_name",
    description="In a run of `self.x = x` lines, give the right name after `=`.",
    templates=with_leads(
        Template(
            prompts=(_prompt("$w0"), _prompt("$w1")),
            completions=(" $w0\n        self.$w1 = $w1\n", " $w1\n        self.$w0 = $w0\n"),
            answers=((" $w0", " $w1"),),
        )
    ),
)

"""set_or_string: use a variable as what it was initialised to."""

from interventions.tasks.base import TaskSpec, Template, with_leads


def accumulate(name: str) -> Template:
    """A loop that fills `name`, which is a set in member 0 and a string in member 1.

    The string is `str()`, not `""`, because `set()` and `""` differ in their number of tokens.
    """

    def prompt(kind: str) -> str:
        return f"@\n{name} = {kind}()\nfor $n1 in $n2:\n    {name}"

    return Template(
        prompts=(prompt("set"), prompt("str")),
        completions=(".add($n1)\n", " += $n1\n"),
        answers=((".add", " +="), (".", " +=")),
    )


TASK = TaskSpec(
    name="set_or_string",
    channel="container_type",
    description="Continue with `.add` or ` +=`, from whether the variable began as a set or a string.",
    templates=with_leads(accumulate("$n0")),
)

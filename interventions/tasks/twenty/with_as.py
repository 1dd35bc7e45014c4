"""with_as: a `with` statement names what it opens."""

from interventions.tasks.base import TaskSpec, Template, with_leads


def _prompt(keyword: str) -> str:
    return f"def $v0($n0):\n    @\n    if $n1 == $d0:\n        {keyword} open($n2)"


TASK = TaskSpec(
    name="with_as",
    channel="with_statement",
    description="After `open(...)` write ` as` or a newline, from whether `with` or `return` precedes it.",
    templates=with_leads(
        # `return open(...)` stands for `f = open(...)`, which is a token longer than `with open(...)`.
        Template(
            prompts=(_prompt("with"), _prompt("return")),
            completions=(" as f:\n            $s7\n    return $s6", "\n    return $s6"),
            answers=((" as", "\n    "), (" as", "\n")),
        )
    ),
)

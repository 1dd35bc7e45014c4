"""while_return_true: `while True` opens a block, `return True` ends one."""

from interventions.tasks.base import TaskSpec, Template, with_leads


def _prompt(keyword: str) -> str:
    return f"def $v0($n0):\n    @\n    if $n1 == $d0:\n        {keyword} True"


TASK = TaskSpec(
    name="while_return_true",
    channel="true_keyword",
    description="Write a newline after `return True`, `:` after `while True`.",
    templates=with_leads(
        Template(
            prompts=(_prompt("return"), _prompt("while")),
            completions=("\n    return False", ":\n            $s7\n    return False"),
            answers=(("\n    ", ":"), ("\n", ":")),
        )
    ),
)

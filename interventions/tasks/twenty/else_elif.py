"""else_elif: only `elif` has a condition."""

from interventions.tasks.base import TaskSpec, Template, with_leads, within_function


def _prompt(keyword: str) -> str:
    return f"@\nif $n0 == $d0:\n    $s0\n{keyword}"


_BRANCH = Template(
    prompts=(_prompt("else"), _prompt("elif")),
    # In the corpus `elif` tests the name that `if` tests.
    completions=(":\n    $s7", " $n0 == $d1:\n    $s7"),
    answers=((":", " $n0"),),
)
TASK = TaskSpec(
    name="else_elif",
    channel="branch_type",
    description="Continue with `:` or a condition on the name just tested, after `else` or `elif`.",
    templates=with_leads(_BRANCH, within_function(_BRANCH)),
)

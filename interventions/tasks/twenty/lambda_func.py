"""lambda_func: what follows the name after `lambda` or `def`."""

from interventions.tasks.base import TaskSpec, Template, with_leads


def _prompt(keywords: str) -> str:
    return f"def $v0($n0):\n    @\n    {keywords} $n1"


TASK = TaskSpec(
    name="lambda_func",
    channel="function_type",
    description="After a name write `:` or `(`, from whether `lambda` or `def` stands before it.",
    templates=with_leads(
        # `return` and `async` give both members the same number of tokens.
        Template(
            prompts=(_prompt("return lambda"), _prompt("async def")),
            completions=(": $n1 + $n2\n", "($n2):\n        $s7\n    return $n1\n"),
            answers=((":", "("),),
        )
    ),
)

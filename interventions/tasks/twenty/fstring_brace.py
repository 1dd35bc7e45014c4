"""fstring_brace: only an f-string has `{name}`."""

from interventions.tasks.base import TaskSpec, Template, with_leads


def _prompt(prefix: str) -> str:
    # The plain string is `r"..."`, so that both members have a prefix and the same number of tokens.
    return f"@\n$n0 = $s0\n$n1 = {prefix}$q0$a0"


TASK = TaskSpec(
    name="fstring_brace",
    channel="string_prefix",
    description="Put the name just assigned into a string as ` {` or as a plain word, from the `f` prefix.",
    templates=with_leads(
        Template(
            prompts=(_prompt("f"), _prompt("r")),
            completions=(" {$n0}$q0\n", " $n0$q0\n"),
            answers=((" {", " $n0"),),
        )
    ),
)

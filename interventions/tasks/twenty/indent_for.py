"""indent_for: the line after a `for` line is indented."""

from interventions.tasks.base import TaskSpec, Template, with_leads

# No alternative answers: a tokenizer whose newline is a token apart from the indentation gives both members
# the same next token.
_FUNCTION = "def $v0($n4):\n    @\n    "

TASK = TaskSpec(
    name="indent_for",
    channel="block_header",
    description="Start the next line deeper or at the same depth, after a `for` line or a plain line.",
    templates=with_leads(
        Template(
            prompts=("@\nfor $n0 in $n1:", "@\n$n0 = $n1 + $n2"),
            completions=("\n    $s7", "\n$s7"),
            answers=(("\n    ", "\n"),),
        ),
        Template(
            prompts=(_FUNCTION + "for $n0 in $n1:", _FUNCTION + "$n0 = $n1 + $n2"),
            completions=("\n        $s7\n    return $s6", "\n    $s7\n    return $s6"),
            answers=(("\n        ", "\n    "),),
        ),
    ),
)

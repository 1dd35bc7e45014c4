"""final_kwarg: after a parameter with a default only parameters with defaults may follow."""

from interventions.tasks.base import TaskSpec, Template, with_leads

_ANSWERS = (("=None", "):"), ("=", "):"))

TASK = TaskSpec(
    name="final_kwarg",
    channel="has_defaults",
    description="Continue a parameter with `=None` or `):`, from whether earlier parameters had defaults.",
    templates=with_leads(
        # A default takes two tokens, as one more parameter does.
        Template(
            prompts=("@\n\ndef $v0($n0=None, $n1", "@\n\ndef $v0($n2, $n0, $n1"),
            completions=("=None):\n    $s7", "):\n    $s7"),
            answers=_ANSWERS,
        )
    ),
)

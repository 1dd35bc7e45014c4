"""with_open: the mode that fits the file's role."""

from interventions.tasks.base import TaskSpec, Template, with_leads

TASK = TaskSpec(
    name="with_open",
    channel="file_role",
    description="Open a file in mode `r` or `w`, from whether it is called `src` or `dst`.",
    templates=with_leads(
        Template(
            prompts=("@\nwith open(src, $q0", "@\nwith open(dst, $q0"),
            completions=("r$q0) as f:\n    $s7", "w$q0) as f:\n    $s7"),
            answers=(("r", "w"),),
        )
    ),
)

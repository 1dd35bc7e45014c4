"""set_or_string_fixedvarname: set_or_string with one name for the variable."""

from interventions.tasks.base import TaskSpec, with_leads
from interventions.tasks.twenty.set_or_string import accumulate

TASK = TaskSpec(
    name="set_or_string_fixedvarname",
    channel="current_type",
    description="As set_or_string, the variable always called `current`.",
    templates=with_leads(accumulate("current")),
)

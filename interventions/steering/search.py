"""The search for one channel, made again through other decoders: a control of channels that were found by steering."""

from collections.abc import Iterable, Sequence

import torch

from bridges.run_folder import Run
from interventions.steering.edits import Columns
from interventions.steering.strengths import LADDER, Dosing, choose_dose
from interventions.tasks.base import TaskBatch

SEARCH_DRAWS = 25
"""Random directions of a dose while sets are compared, the same for all."""


@torch.no_grad()
def searched_again(
    run: Run, candidates: Sequence[int], site: int, selection: TaskBatch, evaluation: TaskBatch, maps: Iterable[Columns]
) -> list[float]:
    """What the search for one channel would have found through other decoders: P on evaluation prompts, by decoder.

    As `interventions.finding.by_steering` does it at one site: every candidate at its own quiet strength on selection
    prompts, with the norm of its true edit at every token; the one with the largest effect is steered with on
    evaluation prompts, at the largest strength that is quiet there and not above 1 or the one chosen.
    """
    choosing, steering = Dosing(run, selection, site), Dosing(run, evaluation, site)
    alone = [[c] for c in candidates]
    quiet, measured = choosing.quiet(alone, SEARCH_DRAWS), steering.quiet(alone, SEARCH_DRAWS)
    effects_found = []
    for columns in maps:
        effects = choosing.effects(alone, columns).T.tolist()
        doses = [choose_dose(p, p95, choosing.base) for p, p95 in zip(effects, quiet, strict=True)]
        best = max(range(len(doses)), key=lambda i: doses[i].p)
        allowed = [s for s in LADDER[: len(measured[best])] if s <= max(1.0, doses[best].strength)]
        effects_found.append(float(steering.effects([alone[best]], columns, allowed[-1:] or [0.0])[0, 0]))
    return effects_found

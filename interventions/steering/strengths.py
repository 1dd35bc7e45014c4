"""How strong an edit may be: the strength is chosen on selection prompts, by what random directions of its norm do.

1. A set of channels of the sparse read moves by strength times its per-token difference between the two prompts of a
   pair, as in a steering experiment (paper A.4). Strengths beyond 1 are tried, too: of all that the sparse model moves
   between the two prompts, a few channels are a short edit.
2. A strength is quiet if there and at all smaller ones 95 % of random directions of the edit's own norm, token by
   token, take P(counterfactual answer) at most 5 % of the way from the prompts' own to that of their counterfactuals.
   What is quiet here may not be on other prompts: an experiment keeps the strength, and says what random directions do
   there.
3. Of the quiet strengths the smallest is taken that reaches 90 % of the largest P(counterfactual answer) among them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from bridges.run_folder import Run
from interventions.editing.hooks import Where
from interventions.steering.edits import channel_edit, sparse_changes
from interventions.steering.rivals import along, random_directions
from interventions.steering.steered_prompts import SteeredPrompts, Vectors, prompts_of, steerable
from interventions.tasks.base import TaskBatch

LADDER = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0)
"""Strengths that are tried."""
QUIET = 0.05
"""Share of the way to the counterfactual prompts' own P that 95 % of random directions must not pass."""
NEAR_LARGEST = 0.9
"""Share of the largest effect from which one is nearly as large."""

DRAWS = 100
"""Random directions that a strength is chosen by."""
SEARCH_DRAWS = 25
"""The same while sets are compared."""


class Dose(NamedTuple):
    """A strength, and mean P(counterfactual answer) there."""

    strength: float
    """0 where none of the ladder is quiet."""
    p: float
    """Of the set of channels."""
    random_p95: float
    """95th percentile of random directions as long."""


def quiet_count(random: Sequence[float], limit: float) -> int:
    """How many strengths, from the first on, leave P at or below a limit."""
    return next((i for i, p in enumerate(random) if p > limit), len(random))


def near_largest(p: float, largest: float) -> bool:
    """Whether an effect is nearly as large as the largest."""
    return p >= NEAR_LARGEST * largest


def choose_dose(p: Sequence[float], quiet: Sequence[float], base: float) -> Dose:
    """The smallest quiet strength of the ladder that reaches nearly the largest quiet effect.

    `p` is the effect at every strength, `quiet` that of random directions at the quiet ones, `base` P without an edit.
    """
    if not quiet:
        return Dose(0.0, base, base)
    largest = max(p[: len(quiet)])
    chosen = next(i for i in range(len(quiet)) if near_largest(p[i], largest))
    return Dose(float(LADDER[chosen]), float(p[chosen]), float(quiet[chosen]))


class Dosing:
    """Steers prompts of a task, member 0 towards member 1, through sets of channels of one site."""

    @torch.no_grad()
    def __init__(self, run: Run, batch: TaskBatch, site: int, where: Where = "read") -> None:
        prompts = prompts_of(batch)
        self.changes = sparse_changes(run, site, prompts)
        self._steered = SteeredPrompts(steerable(run), prompts, site, where)
        self._columns = run.bridges.directions(site)
        self._random = random_directions(DRAWS, self._columns.shape[1], torch.Generator().manual_seed(0))
        self.base = float(self._steered.base.target.mean())
        """P(counterfactual answer) of the unsteered model."""

    def edit(self, channels: Sequence[int]) -> Vectors:
        """The edit of a set at strength 1."""
        return channel_edit(self.changes, self._columns, channels)

    def effects(
        self, sets: Sequence[Sequence[int]], strengths: Sequence[float] = LADDER
    ) -> Float[Tensor, "strength set"]:
        """Mean P(counterfactual answer) of every set at every strength."""
        return self._steered.answers((self.edit(channels) for channels in sets), strengths).target.mean(2)

    def quiet(self, sets: Sequence[Sequence[int]], draws: int = DRAWS) -> list[list[float]]:
        """95th percentile, over random directions as long as a set's edit, at each of its quiet strengths."""
        return self._quiet([self.edit(channels) for channels in sets], draws, [len(LADDER)] * len(sets))

    def _quiet(self, edits: Sequence[Vectors], draws: int, most: Sequence[int]) -> list[list[float]]:
        """At the first strengths, at most so many of each edit."""
        norms = [edit.norm(dim=-1, keepdim=True) for edit in edits]
        percentiles: list[list[float]] = [[] for _ in edits]
        left, limit = list(range(len(edits))), self._steered.p_at(QUIET)
        # One after the other: most of the time goes into those that are not quiet.
        for tried, strength in enumerate(LADDER, 1):
            drawn = (edit for i in left for edit in along(self._random[:draws], norms[i]))
            random = self._steered.answers(drawn, [strength]).target.mean(2).view(len(left), -1)
            at_strength = random.quantile(0.95, dim=1).tolist()
            for i, p in zip(left, at_strength, strict=True):
                percentiles[i].append(p)
            left = [i for i in left if percentiles[i][-1] <= limit and tried < most[i]]
            if not left:
                break
        return [p[: quiet_count(p, limit)] for p in percentiles]

    def doses(self, sets: Sequence[Sequence[int]], draws: int = DRAWS) -> list[Dose]:
        """The strength of each set."""
        return self.edit_doses([self.edit(channels) for channels in sets], draws)

    def edit_doses(self, edits: Sequence[Vectors], draws: int = DRAWS) -> list[Dose]:
        """The strength of each edit, whatever it was made from."""
        effects = self._steered.answers(edits, LADDER).target.mean(2).T.tolist()
        peaks = [1 + p.index(max(p)) for p in effects]  # a larger strength is never chosen
        return [choose_dose(p, q, self.base) for p, q in zip(effects, self._quiet(edits, draws, peaks), strict=True)]

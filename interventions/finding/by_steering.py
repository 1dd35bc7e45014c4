"""Finding the channels that steer the dense model best: a search that looks at both models (the choices are ours).

The search of `interventions.finding.by_patching` asks the sparse model alone which channels carry a feature. The dense
model may read another mixture: of two channels that the sparse model moves together, the decoder's columns can point
for and against. So here the dense model is steered, on *selection* prompts; evaluation prompts stay unseen.

1. Sites: those before a sublayer whose read decides the dense model's answer, as in
   `interventions.finding.by_patching`, and whose read the sparse model's answer hangs on.
2. Candidates: the channels that the sparse model uses for the task, those with the largest effects of patching one
   alone.
3. Each candidate steers at the strength that `interventions.steering.strengths` chooses. Of those that reach nearly
   the largest effect the ones at the last site are taken (early reads are of words rather than of what the model has
   made of them), and of those the one that carries most of the whole read's effect in the sparse model.
4. Sets grow from there by a beam search. They are ranked by their mean effect at several strengths about 1, where each
   channel has the value that it has on the other prompt. The first of each size get doses of their own, and of those
   that do nearly equally well the one is taken that carries most in the sparse model.
5. The channel is the smallest set, at most 4 indices, with 95 % of the largest effect of those: a name should work on
   nearly every prompt.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from bridges.run_folder import Run
from bridges.sites import Site
from interventions.bundle.channels import Channel, Rule, residual_reads
from interventions.finding.by_patching import ChannelSearch, nameable, named_channel, size_rule
from interventions.finding.patching import eligibility_rule, eligible_sites, mean_difference, site_effects
from interventions.finding.read_patch import ReadPatch
from interventions.steering.strengths import SEARCH_DRAWS, Dose, Dosing, near_largest
from interventions.tasks.base import TaskBatch
from sparse_model.io.progress import progress_bar

LEAST_READ_EFFECT = 0.5
"""Effect of patching a whole read in the sparse model, nats, below which its answer does not hang on that read."""
EFFECT_SHARE = 0.95
"""Share of the largest effect that the channel must have."""

_BEAM = 4
_DOSED = 8  # candidates of a site that get a dose
_STRENGTHS = (0.5, 0.75, 1.0, 1.25, 1.5)  # at which sets are compared


class Dosed(NamedTuple):
    """A set of channels of a site, at the strength that is right for it."""

    site: int
    channels: list[int]
    dose: Dose
    share: float
    """Share of the whole read's effect that patching the set has in the sparse model."""


def best_of(sets: Sequence[Dosed]) -> Dosed:
    """Of the sets that steer nearly as well as any, at the last site, the one that carries most in the sparse model."""
    largest = max(dosed.dose.p for dosed in sets)
    near = [dosed for dosed in sets if near_largest(dosed.dose.p, largest)]
    return max(near, key=lambda dosed: (dosed.site, dosed.share))


def read_matters(whole_effect: float) -> bool:
    """Whether the sparse model's answer hangs on a read; `whole_effect` is that of patching all of it, nats."""
    return whole_effect >= LEAST_READ_EFFECT


class SteeringSite:
    """Both models at one site, and the channels that come into question there."""

    def __init__(self, run: Run, batch: TaskBatch, site: int, candidates: int) -> None:
        self.site, self.patch, self.dosing = site, ReadPatch(run, batch, site), Dosing(run, batch, site)
        moved = self.dosing.changes.abs().sum((0, 1)) > 0
        if not moved.any():
            raise ValueError(f"site {site}: no channel of the sparse read differs between the task's prompts")
        self.single = self.patch.singles(moved.nonzero().flatten().tolist())
        self.pool = [c for c in self.single.argsort(descending=True)[:candidates].tolist() if moved[c]]

    def alone(self) -> list[Dosed]:
        """The candidates that move the dense model most, the best first."""
        sets = [[c] for c in self.pool]
        ranked = self.dosing.effects(sets).amax(0).argsort(descending=True)
        return self._dosed([sets[i] for i in ranked[:_DOSED]])

    def grow(self, first: Dosed, alone: list[Dosed], largest: int, *, progress: bool = False) -> dict[int, Dosed]:
        """The best set found of each size (step 4), of size 1 the `first`."""
        beams, best = [first, *(dosed for dosed in alone if dosed is not first)][:_BEAM], {1: first}
        sizes = range(2, min(largest, len(self.pool)) + 1)
        for count in progress_bar(sizes, f"site {self.site}: sets", leave=False, unit="size", disable=not progress):
            grown = [[*b.channels, c] for b in beams for c in self.pool if c not in b.channels]
            sets = list({tuple(sorted(channels)): channels for channels in grown}.values())
            ranked = self.dosing.effects(sets, _STRENGTHS).mean(0).argsort(descending=True)
            beams = self._dosed([sets[i] for i in ranked[:_BEAM]])
            best[count] = best_of(beams)
        return best

    def _dosed(self, sets: list[list[int]]) -> list[Dosed]:
        whole = self.patch.whole or 1.0
        dosed = [
            Dosed(self.site, channels, dose, self.patch.effect(channels) / whole)
            for channels, dose in zip(sets, self.dosing.doses(sets, SEARCH_DRAWS), strict=True)
        ]
        return sorted(dosed, key=lambda one_set: -one_set.dose.p)


@torch.no_grad()
def channel_by_steering(
    run: Run,
    name: str,
    task: str,
    batch: TaskBatch,
    *,
    site: int | None = None,
    largest: int = 8,
    candidates: int = 16,
    progress: bool = False,
) -> Channel:
    """The named channel that steers the dense model; `batch` holds selection prompts. See the module's docstring.

    `site` skips the choice of one. Raises ValueError for a site out of range or without differing channels.
    """
    effects = site_effects(run.dense, batch)
    sites = eligible_sites(effects) if site is None else [Site(site, run.dense.n_layers).index]
    bar = progress_bar(sites, "sites", leave=False, unit="site", disable=not progress)
    searched = {i: SteeringSite(run, batch, i, candidates) for i in bar}
    read = [i for i, there in searched.items() if read_matters(there.patch.whole)] or sites
    alone = {i: searched[i].alone() for i in read}
    best = best_of([dosed for candidates_there in alone.values() for dosed in candidates_there])
    chosen = searched[best.site]
    sets = chosen.grow(best, alone[best.site], largest, progress=progress)
    doses = chosen.dosing.doses([dosed.channels for dosed in sets.values()])
    sets = {n: dosed._replace(dose=dose) for (n, dosed), dose in zip(sets.items(), doses, strict=True)}
    least_p = EFFECT_SHARE * max(dosed.dose.p for n, dosed in sets.items() if nameable(n))
    size = next(n for n, dosed in sets.items() if dosed.dose.p >= least_p)
    site_rule = [eligibility_rule(effects, chosen.site)] if site is None else []
    return named_channel(
        run,
        name,
        task,
        batch,
        chosen.site,
        ChannelSearch(
            {n: dosed.channels for n, dosed in sets.items()},
            {n: dosed.share for n, dosed in sets.items()},
            chosen.single,
            chosen.patch.whole,
            mean_difference(*(residual_reads(run.sparse, batch.tokens[:, member], chosen.site) for member in (0, 1))),
        ),
        size=size,
        rules=[*site_rule, *set_rules(chosen.patch.whole, least_p, sets[size])],
        site_effects=[e._asdict() for e in effects],
        criterion="steering the dense model",
        doses={str(n): dosed.dose._asdict() for n, dosed in sets.items()},
        candidates=chosen.pool,
        site_whole_effect_nats={str(i): round(there.patch.whole, 4) for i, there in searched.items()},
        site_single_p={str(i): round(ranked[0].dose.p, 4) for i, ranked in alone.items()},
    )


def set_rules(whole_effect: float, least_p: float, chosen: Dosed) -> list[Rule]:
    """What was asked of the read and of the set, its indices included."""
    return [
        Rule(
            quantity="effect of patching the whole read in the sparse model, nats of log P(counterfactual answer)",
            bound="at least",
            threshold=LEAST_READ_EFFECT,
            reached=whole_effect,
        ),
        Rule(
            quantity="P(counterfactual answer) in the dense model, steered at its strength, of which "
            f"{EFFECT_SHARE:.0%} of the best set's is asked for",
            bound="at least",
            threshold=least_p,
            reached=chosen.dose.p,
        ),
        size_rule(len(chosen.channels)),
    ]

"""Finding the channel that carries a task's feature (paper 3.3 and A.4; the choices are ours).

Only *selection* prompts are looked at, and steering not at all:

1. Sites, in the dense model. Its own activations are patched with the counterfactual's: the stream at all tokens but
   the last (where does the feature still wait to be read?), and what the next sublayer reads, at all tokens (does that
   read alone decide the answer?). Sites before a sublayer whose read decides it are eligible; where several sublayers
   share the work no read does, and the last site where the stream still flips the answer is taken.
2. Candidates, in the sparse model. Each channel of its read at a site (of more than 128 those with the largest effects
   to first order) is set alone to its counterfactual value at every token; its effect is the gain in log
   P(counterfactual answer). The strongest by effect, and by activation difference times decoder norm, go on.
3. Sets. A beam search adds channels one at a time, by the joint effect of patching the whole set.
4. Of the eligible sites those are kept whose read the sparse model, too, hangs on (a large share of next to nothing is
   nothing), and of those the ones whose read decides the dense model's answer about as surely as any does. Of what is
   left the site whose smallest sufficient set is smallest is taken, of equal ones the last: early reads are of words
   rather than of what the model has made of them. Sufficient means 90 % of the effect of patching the whole read.
5. The channel is that set, at most 4 indices. Its weights are the mean activation differences, largest magnitude 1,
   positive for member 0 of the task's pairs.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from bridges.run_folder import Run
from bridges.sites import Site
from interventions.bundle.channels import Channel, Rule, residual_reads
from interventions.finding.patching import (
    SiteEffect,
    eligibility_rule,
    eligible_sites,
    mean_difference,
    site_effects,
)
from interventions.finding.read_patch import ReadPatch
from interventions.tasks.base import TaskBatch
from sparse_model.io.progress import progress_bar

SET_SHARE = 0.9
"""Share of the whole read's effect that a named channel must carry."""
SUREST_SHARE = 0.9
"""Share of the surest site's P(counterfactual answer), its read patched, that a site's must reach."""
READ_SHARE = 0.5
"""Share of the largest effect of a whole read in the sparse model that a site's must reach."""
MOST_INDICES = 4
"""Most indices of a named channel."""


class ChannelSearch(NamedTuple):
    """Result of `search_channels`."""

    sets: dict[int, list[int]]
    """Best set found of each size."""
    share: dict[int, float]
    """Share of the whole read's effect that it carries."""
    single: Float[Tensor, " d_sparse"]
    """Effect of each channel alone, nats of log P."""
    whole: float
    """Effect of patching the whole read, nats of log P."""
    difference: Float[Tensor, " d_sparse"]
    """Mean activation difference, member 0 minus member 1, over tokens where the two differ."""


@torch.no_grad()
def search_channels(
    run: Run,
    batch: TaskBatch,
    site: int,
    *,
    largest: int = 8,
    beam: int = 4,
    candidates: int = 12,
    progress: bool = False,
) -> ChannelSearch:
    """Best sets of 1 .. `largest` channels of the sparse read at a site, by joint patching on selection prompts.

    `candidates` are kept by each of the two rankings, `beam` sets go on from each size to the next.
    """
    patch = ReadPatch(run, batch, site)
    nodes = [residual_reads(run.sparse, batch.tokens[:, member], site) for member in (0, 1)]
    size = (nodes[0] - nodes[1]).abs().sum((0, 1)) * run.bridges.directions(site).norm(dim=1)
    # A channel that never differs has no effect to measure.
    single = patch.singles(size.nonzero().flatten().tolist(), progress=progress)
    ranked = [single.argsort(descending=True)[:candidates], size.argsort(descending=True)[:candidates]]
    pool = sorted({int(c) for ranking in ranked for c in ranking if size[int(c)] > 0})
    if not pool:
        raise ValueError(f"site {site}: no channel of the sparse read differs between the task's prompts")
    sets: dict[int, list[int]] = {}
    share: dict[int, float] = {}
    beams: list[list[int]] = [[]]
    sizes = range(1, min(largest, len(pool)) + 1)
    for count in progress_bar(sizes, desc=f"site {site}: sets", unit="size", leave=False, disable=not progress):
        grown = {tuple(sorted([*b, c])): [*b, c] for b in beams for c in pool if c not in b}
        scored = sorted(((patch.effect(s), s) for s in grown.values()), reverse=True)
        beams = [s for _, s in scored[:beam]]
        sets[count], share[count] = scored[0][1], scored[0][0] / patch.whole
    return ChannelSearch(sets, share, single, patch.whole, mean_difference(*nodes))


def nameable(size: int) -> bool:
    """Whether a named channel may have so many indices."""
    return size <= MOST_INDICES


def carries_enough(share: float) -> bool:
    """Whether a set with this share of the whole read's effect is sufficient."""
    return share >= SET_SHARE


def sufficient(search: ChannelSearch) -> tuple[int, float]:
    """(size, share) of the smallest set with enough of the whole read's effect; of at most 4 channels."""
    sizes = [n for n in search.sets if nameable(n)]
    size = next((n for n in sizes if carries_enough(search.share[n])), sizes[-1])
    return size, search.share[size]


def choose_site(effects: list[SiteEffect], searches: dict[int, ChannelSearch]) -> int:
    """The site of those searched that both models hang on and whose smallest sufficient set is smallest (step 4)."""
    limits = _site_limits(effects, searches)
    sites = _read_sites(searches, limits.whole)

    def merit(i: int) -> tuple[bool, int, int]:
        size, share = sufficient(searches[i])
        return carries_enough(share), -size, i

    return max((i for i in sites if effects[i].p_read >= limits.p_read), key=merit)


class _SiteLimits(NamedTuple):
    """What a site must reach, given what others do."""

    whole: float
    """Effect of patching its whole read in the sparse model, nats."""
    p_read: float
    """P(counterfactual answer) in the dense model, its read patched."""


def _site_limits(effects: list[SiteEffect], searches: dict[int, ChannelSearch]) -> _SiteLimits:
    whole = READ_SHARE * max(search.whole for search in searches.values())
    return _SiteLimits(whole, SUREST_SHARE * max(effects[i].p_read for i in _read_sites(searches, whole)))


def _read_sites(searches: dict[int, ChannelSearch], least: float) -> list[int]:
    """Sites whose read the sparse model hangs on; all where there is none."""
    return [i for i, search in searches.items() if search.whole >= least] or list(searches)


def site_rules(effects: list[SiteEffect], searches: dict[int, ChannelSearch], site: int) -> list[Rule]:
    """What `choose_site` asked of the site, beyond its being eligible."""
    limits = _site_limits(effects, searches)
    return [
        Rule(
            quantity="effect of patching the whole read in the sparse model, nats of log P(counterfactual answer), "
            f"of which {READ_SHARE:.0%} of the largest of any site are asked for",
            bound="at least",
            threshold=limits.whole,
            reached=searches[site].whole,
        ),
        Rule(
            quantity="P(counterfactual answer) in the dense model with what is read at the site patched, of which "
            f"{SUREST_SHARE:.0%} of the surest site's is asked for",
            bound="at least",
            threshold=limits.p_read,
            reached=effects[site].p_read,
        ),
    ]


def size_rule(size: int) -> Rule:
    """How many indices a named channel may have."""
    return Rule(quantity="number of indices", bound="at most", threshold=MOST_INDICES, reached=size)


def share_rules(search: ChannelSearch) -> list[Rule]:
    """What `sufficient` asked of a set."""
    size, share = sufficient(search)
    words = "share of the whole read's effect on log P(counterfactual answer) in the sparse model"
    return [Rule(quantity=words, bound="at least", threshold=SET_SHARE, reached=share), size_rule(size)]


@torch.no_grad()
def channel_by_patching(
    run: Run, name: str, task: str, batch: TaskBatch, *, site: int | None = None, progress: bool = False
) -> Channel:
    """The named channel of a task's feature; `batch` holds selection prompts. See the module's docstring.

    `site` skips the choice of one. Raises ValueError for a site out of range or without differing channels.
    """
    effects = site_effects(run.dense, batch)
    sites = eligible_sites(effects) if site is None else [Site(site, run.dense.n_layers).index]
    quick: dict[int, ChannelSearch] = {}
    if len(sites) > 1:
        quick = {i: search_channels(run, batch, i, largest=MOST_INDICES, beam=2, progress=progress) for i in sites}
    chosen = choose_site(effects, quick) if quick else sites[0]
    search = search_channels(run, batch, chosen, progress=progress)
    rules = [eligibility_rule(effects, chosen)] if site is None else []
    rules += site_rules(effects, quick, chosen) if quick else []
    return named_channel(
        run,
        name,
        task,
        batch,
        chosen,
        search,
        rules=[*rules, *share_rules(search)],
        site_effects=[e._asdict() for e in effects],
        criterion="joint patching of the sparse read",
        site_whole_effect_nats={str(i): round(q.whole, 4) for i, q in quick.items()},
        site_shares={str(i): [round(s, 4) for s in q.share.values()] for i, q in quick.items()},
    )


@torch.no_grad()
def named_channel(
    run: Run,
    name: str,
    task: str,
    batch: TaskBatch,
    site: int,
    search: ChannelSearch,
    *,
    rules: Sequence[Rule],
    size: int | None = None,
    **how: Any,
) -> Channel:
    """The channel of a search, one of its sets at a site, with its rules and statistics; `how` is kept beside them.

    `size` is that of the set; unset: of the smallest sufficient one.
    """
    indices = search.sets[size or sufficient(search)[0]]
    weights = search.difference[indices] / search.difference[indices].abs().max().clamp(min=1e-12)
    nodes = [residual_reads(run.sparse, batch.tokens[:, m], site)[..., indices] for m in (0, 1)]
    differs = (nodes[0] != nodes[1]).any(-1)
    return Channel(
        name=name,
        site=site,
        indices=tuple(indices),
        weights=tuple(round(float(w), 6) for w in weights),
        description=f"positive where the prompt is the first of a pair of {task}",
        statistics={
            "mean_member_0": [float(x) for x in nodes[0][differs].mean(0)],
            "mean_member_1": [float(x) for x in nodes[1][differs].mean(0)],
        },
        rules=tuple(rules),
        selection={
            "task": task,
            "split": "selection",
            "pairs": len(batch.last),
            **how,
            "whole_effect_nats": search.whole,
            "sets": {str(n): s for n, s in search.sets.items()},
            "share": {str(n): round(s, 4) for n, s in search.share.items()},
            "single_effect_nats": {int(c): round(float(search.single[c]), 4) for c in search.sets[max(search.sets)]},
        },
    )

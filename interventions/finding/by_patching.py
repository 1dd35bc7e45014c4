"""Finding the channel that carries a task's feature (paper 3.3 and A.4; the choices are ours).

Only *selection* prompts are looked at, and steering not at all:

1. Sites, in the dense model. Its own activations are patched with the counterfactual's: the stream at all tokens but
   the last (where does the feature still wait to be read?), and what the next sublayer reads, at all tokens (does that
   read alone decide the answer?). Sites before a sublayer whose read decides it are eligible; where several sublayers
   share the work no read does, and the last site where the stream still flips the answer is taken.
2. Candidates, in the sparse model. Each channel of its read at a site is set alone to its counterfactual value at every
   token; its effect is the gain in log P(counterfactual answer). The strongest by effect, and by activation difference
   times decoder norm, go on.
3. Sets. A beam search adds channels one at a time, by the joint effect of patching the whole set.
4. Of the eligible sites those are kept whose read the sparse model, too, hangs on (a large share of next to nothing is
   nothing), and of those the ones whose read decides the dense model's answer about as surely as any does. Of what is
   left the site whose smallest sufficient set is smallest is taken, of equal ones the last: early reads are of words
   rather than of what the model has made of them. Sufficient means 90 % of the effect of patching the whole read.
5. The channel is that set, at most 4 indices. Its weights are the mean activation differences, largest magnitude 1,
   positive for member 0 of the task's pairs.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from bridges.dense import Sublayered
from bridges.hybrid import advance, residuals, suffix
from bridges.run_folder import Run
from bridges.sites import Site, all_sites
from interventions.bundle.channels import Channel, read_nodes
from interventions.tasks.base import TaskBatch

ENOUGH = 0.9
"""Share that a named channel must carry of the whole read's effect, and a site must reach of the surest one's P."""
HANGS = 0.5
"""Share of the largest effect of a whole read in the sparse model that a site's must reach."""
MOST = 4
"""Most indices of a named channel."""


class SiteEffect(NamedTuple):
    """Mean P(the counterfactual's answer) in the dense model after patching it at one site."""

    site: int
    label: str
    p_stream: float
    """The stream patched at all tokens but the last."""
    p_read: float
    """Only what the next sublayer reads patched, at all tokens."""


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


def flipped(batch: TaskBatch) -> tuple[Int[Tensor, "prompt pos"], Int[Tensor, "prompt pos"], Tensor, Tensor]:
    """(tokens, counterfactual tokens, counterfactual answers, last positions), both directions of every pair."""
    tokens = torch.cat([batch.tokens[:, 0], batch.tokens[:, 1]])
    other = torch.cat([batch.tokens[:, 1], batch.tokens[:, 0]])
    answers = torch.cat([batch.answers[:, 1], batch.answers[:, 0]])
    return tokens, other, answers, batch.last.repeat(2)


def log_p(
    logits: Float[Tensor, "prompt pos vocab"], answers: Int[Tensor, " prompt"], last: Int[Tensor, " prompt"]
) -> Float[Tensor, " prompt"]:
    """log P(answer) over the full vocabulary at each prompt's last token, nats."""
    at_last = logits[torch.arange(len(last)), last].log_softmax(-1)
    return at_last[torch.arange(len(last)), answers]


@torch.no_grad()
def site_effects(dense: Sublayered, batch: TaskBatch) -> list[SiteEffect]:
    """P(counterfactual answer) after patching the dense stream, or the next read alone, at each site."""
    tokens, other, answers, last = flipped(batch)
    here, there = residuals(dense, tokens), residuals(dense, other)
    before_last = (torch.arange(tokens.shape[1]) < last[:, None])[..., None]

    def p(site: int, resid: Tensor) -> float:
        return float(log_p(suffix(dense, site, resid, tokens), answers, last).exp().mean())

    effects = []
    for site in all_sites(dense.n_layers):
        i = site.index
        p_stream = p(i, torch.where(before_last, there[i], here[i]))
        p_read = p(i, there[i])  # the unembedding reads all there is
        if not site.is_final:
            p_read = p(i + 1, here[i] + dense.sublayer(i, there[i]) - there[i])
        effects.append(SiteEffect(i, site.label, p_stream, p_read))
    return effects


def eligible_sites(effects: list[SiteEffect]) -> list[int]:
    """Sites before a sublayer whose read alone gives the counterfactual answer more than half of the probability.

    Where there is none, the last whose stream does; failing that, the one with the largest effect.
    """
    reads = [e.site for e in effects[:-1] if e.p_read > 0.5]
    streams = [e.site for e in effects[:-1] if e.p_stream > 0.5]
    return reads or streams[-1:] or [max(effects[:-1], key=lambda e: e.p_stream).site]


class ReadPatch:
    """Runs the sparse model from a site with some channels of its read set to their counterfactual values."""

    @torch.no_grad()
    def __init__(self, run: Run, batch: TaskBatch, site: int) -> None:
        self.sparse, self.site = run.sparse, site
        self.hook = Site(site, run.sparse.n_layers).read_hook
        self.tokens, other, self.answers, self.last = flipped(batch)
        _, cache = run.sparse.run_with_cache(other, names_filter=self.hook)
        self.counterfactual = cache[self.hook]
        self.resid = residuals(run.sparse, self.tokens)[site]
        self.base = self._score(torch.zeros(self.counterfactual.shape[-1], dtype=torch.bool))
        self.whole = self.effect(torch.ones(self.counterfactual.shape[-1], dtype=torch.bool))

    def effect(self, channels: Bool[Tensor, " width"] | list[int]) -> float:
        """Gain in mean log P(counterfactual answer) from patching a set of channels, nats."""
        if isinstance(channels, list):
            mask = torch.zeros(self.counterfactual.shape[-1], dtype=torch.bool)
            mask[channels] = True
            channels = mask
        return self._score(channels) - self.base

    @torch.no_grad()
    def _score(self, mask: Bool[Tensor, " width"]) -> float:
        def patch(value: Tensor, hook: object) -> Tensor:
            return torch.where(mask, self.counterfactual, value)

        with self.sparse.hooks(fwd_hooks=[(self.hook, patch)]):
            end = advance(self.sparse, self.site, self.resid)
        # Only the last position's logits count, and unembedding all of them would cost as much as the rest.
        row = torch.arange(len(self.last))
        logits = self.sparse.unembed(end[row, self.last][:, None], self.tokens[row, self.last][:, None])
        return float(log_p(logits, self.answers, torch.zeros_like(self.last)).mean())


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
    nodes = [read_nodes(run.sparse, batch.tokens[:, member], site) for member in (0, 1)]
    size = (nodes[0] - nodes[1]).abs().sum((0, 1)) * run.bridges.directions(site).norm(dim=1)
    single = torch.zeros(run.sparse.d_model)
    # A channel that never differs has no effect to measure.
    for c in tqdm(
        size.nonzero().flatten().tolist(), desc=f"site {site}", unit="channel", leave=False, disable=not progress
    ):
        single[c] = patch.effect([c])
    ranked = [single.argsort(descending=True)[:candidates], size.argsort(descending=True)[:candidates]]
    pool = sorted({int(c) for ranking in ranked for c in ranking if size[int(c)] > 0})
    if not pool:
        raise ValueError(f"site {site}: no channel of the sparse read differs between the task's prompts")
    sets: dict[int, list[int]] = {}
    share: dict[int, float] = {}
    beams: list[list[int]] = [[]]
    sizes = range(1, min(largest, len(pool)) + 1)
    for count in tqdm(sizes, desc=f"site {site}: sets", unit="size", leave=False, disable=not progress):
        grown = {tuple(sorted([*b, c])): [*b, c] for b in beams for c in pool if c not in b}
        scored = sorted(((patch.effect(s), s) for s in grown.values()), reverse=True)
        beams = [s for _, s in scored[:beam]]
        sets[count], share[count] = scored[0][1], scored[0][0] / patch.whole
    return ChannelSearch(sets, share, single, patch.whole, mean_difference(*nodes))


def mean_difference(
    first: Float[Tensor, "pair pos d_sparse"], second: Float[Tensor, "pair pos d_sparse"]
) -> Float[Tensor, " d_sparse"]:
    """Mean activation difference of two members' reads over the tokens where they differ; zeros where none does."""
    differs = (first != second).any(-1)
    return (first - second)[differs].mean(0) if differs.any() else torch.zeros(first.shape[-1])


def sufficient(search: ChannelSearch) -> tuple[int, float]:
    """(size, share) of the smallest set with enough of the whole read's effect; of at most 4 channels."""
    sizes = [n for n in search.sets if n <= MOST]
    size = next((n for n in sizes if search.share[n] >= ENOUGH), sizes[-1])
    return size, search.share[size]


def choose_site(effects: list[SiteEffect], searches: dict[int, ChannelSearch]) -> int:
    """The site of those searched that both models hang on and whose smallest sufficient set is smallest (step 4)."""
    largest = max(search.whole for search in searches.values())
    sites = [i for i, search in searches.items() if search.whole >= HANGS * largest] or list(searches)
    surest = max(effects[i].p_read for i in sites)

    def merit(i: int) -> tuple[bool, int, int]:
        size, share = sufficient(searches[i])
        return share >= ENOUGH, -size, i

    return max((i for i in sites if effects[i].p_read >= ENOUGH * surest), key=merit)


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
        quick = {i: search_channels(run, batch, i, largest=MOST, beam=2, progress=progress) for i in sites}

    chosen = choose_site(effects, quick) if quick else sites[0]
    search = search_channels(run, batch, chosen, progress=progress)
    how: dict[str, Any] = {
        "criterion": f"joint patching of the sparse read, at least {ENOUGH:.0%} of the whole read's effect",
        "site_whole_effect_nats": {str(i): round(q.whole, 4) for i, q in quick.items()},
        "site_shares": {str(i): [round(s, 4) for s in q.share.values()] for i, q in quick.items()},
    }
    return named_channel(run, name, task, batch, chosen, search, site_effects=[e._asdict() for e in effects], **how)


@torch.no_grad()
def named_channel(
    run: Run,
    name: str,
    task: str,
    batch: TaskBatch,
    site: int,
    search: ChannelSearch,
    *,
    size: int | None = None,
    **how: Any,
) -> Channel:
    """The channel of a search, one of its sets at a site, with statistics; `how` is kept beside them.

    `size` is that of the set; unset: of the smallest sufficient one.
    """
    indices = search.sets[size or sufficient(search)[0]]
    weights = search.difference[indices] / search.difference[indices].abs().max().clamp(min=1e-12)
    nodes = [read_nodes(run.sparse, batch.tokens[:, m], site)[..., indices] for m in (0, 1)]
    differs = (nodes[0] != nodes[1]).any(-1)
    return Channel(
        name=name,
        site=site,
        indices=tuple(indices),
        weights=tuple(round(float(w), 6) for w in weights),
        description=f"positive where the prompt is member 0 of {task}",
        statistics={
            "mean_member_0": [float(x) for x in nodes[0][differs].mean(0)],
            "mean_member_1": [float(x) for x in nodes[1][differs].mean(0)],
        },
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

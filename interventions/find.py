"""Finding the channel that carries a task's feature (paper 3.3 and A.4; the choices are ours).

Only *selection* prompts and, for the choice of channels, only the sparse model are looked at:

1. Site. At every residual site the dense model's stream is replaced by its counterfactual's at all tokens but the
   last; the last site where that still flips the answer is where the feature still waits to be read. (An attention
   that comes later has already moved it to the last token.) Sites where patching the next sublayer's read alone also
   flips it go first: elsewhere several sublayers read the feature, and a read-only edit cannot move it.
2. Candidates. Each channel of the sparse model's read at that site alone is set to its counterfactual value at every
   token; its effect is the gain in log P(counterfactual answer). The strongest by effect, and by activation difference
   times decoder norm, go on.
3. Sets. A beam search adds channels one at a time, by the joint effect of patching the whole set.
4. The channel is the smallest set (at most 4) with 90 % of the effect of patching the whole read. Its weights are the
   mean activation differences, largest magnitude 1, positive for member 0 of the task's pairs.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bridges.dense import Sublayered
from bridges.hybrid import residuals, suffix
from bridges.run import Run
from bridges.sites import Site
from interventions.channels import Channel, read_nodes
from interventions.tasks.base import TaskBatch

ENOUGH = 0.9
"""Share of the whole read's effect that a named channel must carry."""


class SiteEffect(NamedTuple):
    """What patching the dense model at one site, at all tokens but the last, does."""

    site: int
    label: str
    p_counterfactual: float
    """Mean P(the counterfactual's answer) after patching the stream."""
    p_read: float
    """The same after patching only what the next sublayer reads."""


class ChannelSearch(NamedTuple):
    """Result of `search_channels`."""

    order: list[int]
    """Channels in the order in which the best nested sets grow (the best set of each size is `sets[size]`)."""
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
    before_last = torch.arange(tokens.shape[1]) < last[:, None]
    effects = []
    for site in range(2 * dense.n_layers + 1):
        patched = torch.where(before_last[..., None], there[site], here[site])
        label = Site(site, dense.n_layers).label
        p_stream = p_read = float(log_p(suffix(dense, site, patched, tokens), answers, last).exp().mean())
        if site < 2 * dense.n_layers:
            after = here[site] + dense.sublayer(site, patched) - patched
            p_read = float(log_p(suffix(dense, site + 1, after, tokens), answers, last).exp().mean())
        effects.append(SiteEffect(site, label, p_stream, p_read))
    return effects


def choose_site(effects: list[SiteEffect]) -> int:
    """The last site where both patches give the counterfactual answer more than half of the probability.

    Where no site does, the last where the stream's patch does; failing that, the one with the largest effect.
    """
    both = [e.site for e in effects if min(e.p_counterfactual, e.p_read) > 0.5]
    stream = [e.site for e in effects if e.p_counterfactual > 0.5]
    return (both or stream or [max(effects, key=lambda e: e.p_counterfactual).site])[-1]


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
            logits = suffix(self.sparse, self.site, self.resid, self.tokens)
        return float(log_p(logits, self.answers, self.last).mean())


@torch.no_grad()
def search_channels(
    run: Run, batch: TaskBatch, site: int, *, largest: int = 8, beam: int = 4, candidates: int = 16
) -> ChannelSearch:
    """Best sets of 1 .. `largest` channels of the sparse read at a site, by joint patching on selection prompts.

    `candidates` are kept by each of the two rankings, `beam` sets go on from each size to the next.
    """
    patch = ReadPatch(run, batch, site)
    nodes = [read_nodes(run.sparse, batch.tokens[:, member], site) for member in (0, 1)]
    differs = (nodes[0] != nodes[1]).any(-1)
    difference = (nodes[0] - nodes[1])[differs].mean(0) if differs.any() else torch.zeros(run.sparse.d_model)
    size = (nodes[0] - nodes[1]).abs().sum((0, 1)) * run.bridges.directions(site).norm(dim=1)
    single = torch.tensor([patch.effect([c]) for c in range(run.sparse.d_model)])
    ranked = [single.argsort(descending=True)[:candidates], size.argsort(descending=True)[:candidates]]
    pool = sorted({int(c) for ranking in ranked for c in ranking if size[int(c)] > 0})
    if not pool:
        raise ValueError(f"site {site}: no channel of the sparse read differs between the task's prompts")
    sets: dict[int, list[int]] = {}
    share: dict[int, float] = {}
    beams: list[list[int]] = [[]]
    for count in range(1, min(largest, len(pool)) + 1):
        grown = {tuple(sorted([*b, c])): [*b, c] for b in beams for c in pool if c not in b}
        scored = sorted(((patch.effect(s), s) for s in grown.values()), reverse=True)
        beams = [s for _, s in scored[:beam]]
        sets[count], share[count] = scored[0][1], scored[0][0] / patch.whole
    return ChannelSearch(sets[max(sets)], sets, share, single, patch.whole, difference)


@torch.no_grad()
def find_channel(run: Run, name: str, task: str, batch: TaskBatch, *, site: int | None = None) -> Channel:
    """The named channel of a task's feature; `batch` holds selection prompts. See the module's docstring."""
    effects = site_effects(run.dense, batch)
    chosen = choose_site(effects) if site is None else Site(site, run.dense.n_layers).index
    search = search_channels(run, batch, chosen)
    count = next((n for n in range(1, 5) if search.share.get(n, 0) >= ENOUGH), max(n for n in search.sets if n <= 4))
    indices = search.sets[count]
    weights = search.difference[indices] / search.difference[indices].abs().max().clamp(min=1e-12)
    nodes = [read_nodes(run.sparse, batch.tokens[:, m], chosen)[..., indices] for m in (0, 1)]
    differs = (nodes[0] != nodes[1]).any(-1)
    return Channel(
        name=name,
        site=chosen,
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
            "site_effects": [e._asdict() for e in effects],
            "criterion": f"joint patching of the sparse read, at least {ENOUGH:.0%} of the whole read's effect",
            "whole_effect_nats": search.whole,
            "sets": {str(n): s for n, s in search.sets.items()},
            "share": {str(n): round(s, 4) for n, s in search.share.items()},
            "single_effect_nats": {int(c): round(float(search.single[c]), 4) for c in search.order},
        },
    )

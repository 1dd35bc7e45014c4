"""Patching: what one site's stream or read, set to its counterfactual value, does to a model's answer."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bridges.dense import Sublayered
from bridges.hybrid import residuals, suffix
from bridges.run_folder import Run
from bridges.sites import Site, all_sites
from interventions.bundle.channels import Rule
from interventions.tasks.base import TaskBatch, since_difference
from sparse_model.model.transformer import KVCache

FLIPPED = 0.5
"""Share of the way, from P(counterfactual answer) on the prompts to that on their counterfactuals, beyond which the
answer has changed."""


class SiteEffect(NamedTuple):
    """Mean P(the counterfactual's answer) in the dense model after patching it at one site."""

    site: int
    label: str
    p_stream: float
    """The stream patched at all tokens but the last."""
    p_read: float
    """Only what the next sublayer reads patched, at all tokens."""


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
    before_last = (torch.arange(tokens.shape[1], device=tokens.device) < last[:, None])[..., None]

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
    """Sites before a sublayer whose read alone takes P(counterfactual answer) more than half of the way.

    The way is from the prompts' own P to that of their counterfactuals. Where there is none, the last whose stream does; failing that, the one with the largest effect.
    """
    flipped_p = _flipped_p(effects)
    reads = [e.site for e in effects[:-1] if e.p_read > flipped_p]
    streams = [e.site for e in effects[:-1] if e.p_stream > flipped_p]
    return reads or streams[-1:] or [max(effects[:-1], key=lambda e: e.p_stream).site]


def _flipped_p(effects: list[SiteEffect]) -> float:
    """P(counterfactual answer) from which the answer has changed; patched at the end nothing has, or everything."""
    here, there = effects[-1].p_stream, effects[-1].p_read
    return here + FLIPPED * max(there - here, 0.0)


def eligibility_rule(effects: list[SiteEffect], site: int) -> Rule:
    """What made a site eligible: its read, else the stream there, decides the dense model's answer."""
    effect, flipped_p = effects[site], _flipped_p(effects)
    if effect.p_read <= flipped_p < effect.p_stream:
        part, reached = "the stream there at all tokens but the last", effect.p_stream
    else:
        part, reached = "what is read at the site", effect.p_read
    words = (
        f"P(counterfactual answer) in the dense model with {part} patched, of which {FLIPPED:.0%} of the way to the "
        "counterfactual prompts' own is asked for"
    )
    return Rule(quantity=words, bound="more than", threshold=flipped_p, reached=reached)


class _Group(NamedTuple):
    """Prompts whose first differing tokens are near each other, from the earliest of them on."""

    tokens: Int[Tensor, "row pos"]
    resid: Float[Tensor, "row pos d_sparse"]
    """The stream at the site."""
    counterfactual: Float[Tensor, "row pos d_sparse"]
    """The read there on the other prompts."""
    before: KVCache
    """Keys and values of the tokens before."""
    answers: Int[Tensor, " row"]
    last: Int[Tensor, " row"]


class ReadPatch:
    """Runs the sparse model from a site with some channels of its read set to their counterfactual values.

    Tokens before the first in which a prompt differs from its counterfactual are the same under every patch: only those
    from there on run.
    """

    @torch.no_grad()
    def __init__(self, run: Run, batch: TaskBatch, site: int) -> None:
        self.sparse, self.site = run.sparse, Site(site, run.sparse.n_layers)
        self.hook = self.site.read_hook
        tokens, other, answers, last = flipped(batch)
        starts = since_difference(tokens, other, last).to(torch.uint8).argmax(1)
        self._groups = []
        for rows in _near(starts):
            first, end = int(starts[rows].min()), int(last[rows].max()) + 1
            here, there, before = self._unpatched(tokens[rows, :end], other[rows, :end], first)
            shown = tokens[rows, first:end]
            self._groups.append(_Group(shown, here, there, before, answers[rows], last[rows] - first))
        self._width = self._groups[0].counterfactual.shape[-1]
        self.base = self._score(torch.zeros(self._width, dtype=torch.bool))
        self.whole = self.effect(torch.ones(self._width, dtype=torch.bool))

    def _unpatched(
        self, tokens: Int[Tensor, "row pos"], other: Int[Tensor, "row pos"], first: int
    ) -> tuple[Tensor, Tensor, KVCache]:
        """The stream at the site from `first` on, the read there on the other prompts, and the cache of what is before.

        Prompts that begin alike, as the members of a pair do, are run once up to there.
        """
        before = KVCache()
        if first:
            beginnings, back = tokens[:, :first].unique(dim=0, return_inverse=True)
            self.sparse(beginnings, before)
            before = before.copy(back)
        read: dict[str, Tensor] = {}
        with self.sparse.hooks(fwd_hooks=[(self.hook, lambda value, hook: read.update({hook.name: value}))]):
            self.sparse(other[:, first:], before.copy())
        cache = before.copy()
        resid = self.sparse.embed(tokens[:, first:], cache)
        for i in range(self.site.index):
            resid = self.sparse.sublayer(i, resid, cache)
        return resid, read[self.hook], before

    def effect(self, channels: Bool[Tensor, " width"] | list[int]) -> float:
        """Gain in mean log P(counterfactual answer) from patching a set of channels, nats."""
        if isinstance(channels, list):
            mask = torch.zeros(self._width, dtype=torch.bool)
            mask[channels] = True
            channels = mask
        return self._score(channels) - self.base

    @torch.no_grad()
    def _score(self, mask: Bool[Tensor, " width"]) -> float:
        return float(torch.cat([self._log_p(group, mask.to(group.resid.device)) for group in self._groups]).mean())

    def _log_p(self, group: _Group, mask: Bool[Tensor, " width"]) -> Float[Tensor, " row"]:
        # Only the last position's logits count, and unembedding all of them would cost as much as the rest.
        at_last = torch.arange(len(group.last))[:, None], group.last[:, None]
        there = group.counterfactual[at_last] if self.site.is_final else group.counterfactual

        def patch(value: Tensor, hook: object) -> Tensor:
            return torch.where(mask, there, value)

        end, cache = group.resid, group.before.copy()
        with self.sparse.hooks(fwd_hooks=[(self.hook, patch)]):
            for i in range(self.site.index, 2 * self.sparse.n_layers):
                end = self.sparse.sublayer(i, end, cache)
            logits = self.sparse.unembed(end[at_last], group.tokens[at_last])
        return log_p(logits, group.answers, torch.zeros_like(group.last))


def _near(starts: Int[Tensor, " prompt"]) -> list[Int[Tensor, " row"]]:
    """The prompts in groups whose first differing tokens are less than 16 apart."""
    groups: list[list[int]] = []
    for row in starts.argsort(stable=True).tolist():
        if not groups or starts[row] - starts[groups[-1][0]] >= 16:
            groups.append([])
        groups[-1].append(row)
    return [torch.tensor(rows, device=starts.device) for rows in groups]


def mean_difference(
    first: Float[Tensor, "pair pos d_sparse"], second: Float[Tensor, "pair pos d_sparse"]
) -> Float[Tensor, " d_sparse"]:
    """Mean activation difference of two members' reads over the tokens where they differ; zeros where none does."""
    differs = (first != second).any(-1)
    return (first - second)[differs].mean(0) if differs.any() else torch.zeros(first.shape[-1])

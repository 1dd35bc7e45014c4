"""Patching channels of a read of the sparse model, of the tokens that can change alone."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bridges.run_folder import Run
from bridges.sites import Site
from interventions.finding.patching import flipped, log_p
from interventions.tasks.base import TaskBatch, since_difference
from sparse_model.io.progress import progress_bar
from sparse_model.model.transformer import KVCache

_APART = 16  # tokens from one group of prompts to the next
_MOST_SINGLES = 128


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
        self.base = self._patched([])
        self.whole = self.effect(list(range(self._width)))

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

    def effect(self, channels: list[int]) -> float:
        """Gain in mean log P(counterfactual answer) from patching a set of channels, nats."""
        return self._patched(channels) - self.base

    @torch.no_grad()
    def _patched(self, channels: list[int]) -> float:
        share = torch.zeros(self._width)
        share[channels] = 1
        return float(self._score(share))

    def first_order(self) -> Float[Tensor, " width"]:
        """What patching each channel alone gives to first order, nats: gradient times change, summed over tokens."""
        with torch.enable_grad():
            share = torch.zeros(self._width, requires_grad=True)
            return torch.autograd.grad(self._score(share), share)[0]

    def singles(self, channels: Sequence[int], *, progress: bool = False) -> Float[Tensor, " d_sparse"]:
        """The effect of patching each of these channels of the stream alone, zero for the others.

        Of many only those are patched that have the largest effects to first order; the others' are left at zero.
        """
        first_order, effects = self.first_order(), torch.zeros(self.sparse.d_model)
        largest = sorted(channels, key=lambda c: -float(first_order[c]))[:_MOST_SINGLES]
        words = f"site {self.site.index}"
        for c in progress_bar(largest, desc=words, unit="channel", leave=False, disable=not progress):
            effects[c] = self.effect([c])
        return effects

    def _score(self, share: Float[Tensor, " width"]) -> Float[Tensor, ""]:
        """Mean log P(counterfactual answer) with each channel moved by a share of its change."""
        return torch.cat([self._log_p(group, share.to(group.resid.device)) for group in self._groups]).mean()

    def _log_p(self, group: _Group, share: Float[Tensor, " width"]) -> Float[Tensor, " row"]:
        # Only the last position's logits count, and unembedding all of them would cost as much as the rest.
        at_last = torch.arange(len(group.last))[:, None], group.last[:, None]
        there = group.counterfactual[at_last] if self.site.is_final else group.counterfactual

        def patch(value: Tensor, hook: object) -> Tensor:
            return torch.lerp(value, there, share)

        end, cache = group.resid, group.before.copy()
        with self.sparse.hooks(fwd_hooks=[(self.hook, patch)]):
            for i in range(self.site.index, 2 * self.sparse.n_layers):
                end = self.sparse.sublayer(i, end, cache)
            logits = self.sparse.unembed(end[at_last], group.tokens[at_last])
        return log_p(logits, group.answers, torch.zeros_like(group.last))


def _near(starts: Int[Tensor, " prompt"]) -> list[Int[Tensor, " row"]]:
    """The prompts in groups whose first differing tokens are near each other."""
    groups: list[list[int]] = []
    first = starts.tolist()
    for row in sorted(range(len(first)), key=first.__getitem__):
        if not groups or first[row] - first[groups[-1][0]] >= _APART:
            groups.append([])
        groups[-1].append(row)
    return [torch.tensor(rows, device=starts.device) for rows in groups]

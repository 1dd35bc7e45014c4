"""Patching: what one site's stream or read, set to its counterfactual value, does to the dense model's answer."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bridges.dense import Sublayered
from bridges.hybrid import advance, residuals
from bridges.sites import all_sites
from interventions.bundle.channels import Rule
from interventions.tasks.base import TaskBatch

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
    row, column = torch.arange(len(last))[:, None], last[:, None]
    before_last = (torch.arange(tokens.shape[1], device=tokens.device) < last[:, None])[..., None]

    def p(site: int, resid: Tensor) -> float:
        end = advance(dense, site, resid)
        # Only the last position's logits count.
        logits = dense.unembed(end[row, column], tokens[row, column])
        return float(log_p(logits, answers, torch.zeros_like(last)).exp().mean())

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

    The way is from the prompts' own P to that of their counterfactuals. Where there is none, the last whose stream
    does; failing that, the one with the largest effect.
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


def mean_difference(
    first: Float[Tensor, "pair pos d_sparse"], second: Float[Tensor, "pair pos d_sparse"]
) -> Float[Tensor, " d_sparse"]:
    """Mean activation difference of two members' reads over the tokens where they differ; zeros where none does."""
    differs = (first != second).any(-1)
    return (first - second)[differs].mean(0) if differs.any() else torch.zeros(first.shape[-1])

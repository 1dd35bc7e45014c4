"""The edits of a steering experiment: the channels' own, and what they are compared with.

An edit is the change of the dense stream at every token of the prompts, at full strength. A set of channels adds

    v = rms_s * sum_c (counterfactual - presented activation of c) * W[:, c]

with W the decoder (paper A.4). Every control goes to the same tokens of the same prompts through `intervene_vector`:

- random directions: one Gaussian direction per draw, at every token as long as the channels' edit there;
- random channels: as many columns of W as the set has channels, drawn from all others, with random signs; as long;
- shuffled decoder: the same channels and activations, W's columns permuted among the channels;
- untrained bridge: the same, W being the decoder of freshly initialised bridges;
- ridge: the same, W being a ridge regression from the sparse to the dense stream at the site;
- difference of means of the dense stream on selection prompts: what steering needs no sparse model for;
- exact patch: the dense model's own read (or stream) moved to its counterfactual: all that the site knows, the ceiling
  at full strength. (On the way there one strong direction may be faster.)

The shuffled and the untrained decoder are scaled at every token to the length of the channels' edit: columns of unused
channels and of fresh decoders are shorter, and a control must not fail for being small. The ridge regression, the
difference of means and the exact patch keep their own length: they are complete methods.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GPT2LMHeadModel

from bridges.bridge import BridgeSet
from bridges.dense import Sublayered
from bridges.hybrid import residuals
from bridges.losses import nmse
from bridges.run_folder import Run
from interventions.bundle.channels import read_nodes
from interventions.editing.hooks import Where
from interventions.steering.steered_prompts import Prompts, Vectors, prompts_of
from interventions.tasks.base import TaskBatch

Columns = Float[Tensor, "d_sparse d_dense"]
"""What one unit of each sparse stream channel adds to the dense stream."""

PENALTIES = tuple(10.0**power for power in range(-8, 3))


@torch.no_grad()
def activation_changes(run: Run, site: int, prompts: Prompts) -> Float[Tensor, "prompt pos d_sparse"]:
    """Counterfactual minus presented activation of every channel of the sparse read; zero behind the last token."""
    reads = [read_nodes(run.sparse, tokens, site) for tokens in (prompts.counterfactual, prompts.tokens)]
    return (reads[0] - reads[1]) * prompts.open[..., None]


def channel_edit(
    changes: Float[Tensor, "prompt pos d_sparse"], columns: Columns, rms: Float[Tensor, ""], channels: Sequence[int]
) -> Vectors:
    """The edit of a set of channels through the columns of some map; `rms` is that of the sparse stream."""
    return rms * changes[..., list(channels)] @ columns[list(channels)]


def scaled(edit: Vectors, norm: Float[Tensor, "prompt pos 1"]) -> Vectors:
    """An edit with its direction at every token and the norm given; zero where it is zero."""
    return edit * (norm / edit.norm(dim=-1, keepdim=True).clamp(min=1e-30))


def mean_norm(edit: Vectors) -> float:
    """Mean length of an edit over the tokens that it moves; 0 where it moves none."""
    norms = edit.norm(dim=-1)
    return float(norms.sum() / (norms > 0).sum().clamp(min=1))


def random_directions(draws: int, d_dense: int, generator: torch.Generator) -> Float[Tensor, "draw d_dense"]:
    """Unit vectors, uniform on the sphere."""
    drawn = torch.randn(draws, d_dense, generator=generator)
    return drawn / drawn.norm(dim=1, keepdim=True)


def random_channels(
    columns: Columns, used: set[int], count: int, draws: int, generator: torch.Generator
) -> Float[Tensor, "draw d_dense"]:
    """Unit vectors along signed sums of `count` columns of channels that are not used (of all, where none is left)."""
    free = torch.tensor([c for c in range(len(columns)) if c not in used] or range(len(columns)))
    sums = []
    for _ in range(draws):
        drawn = free[torch.randperm(len(free), generator=generator)[:count]]
        signs = torch.randint(0, 2, (len(drawn), 1), generator=generator) * 2 - 1
        sums.append((signs.to(columns) * columns[drawn.to(columns.device)]).sum(0))
    stacked = torch.stack(sums).cpu()
    return stacked / stacked.norm(dim=1, keepdim=True).clamp(min=1e-30)


def along(directions: Float[Tensor, "draw d_dense"], norm: Float[Tensor, "prompt pos 1"]) -> Iterator[Vectors]:
    """One edit for each direction."""
    return (norm * direction for direction in directions.to(norm))


def shuffled_columns(columns: Columns, maps: int, generator: torch.Generator) -> Iterator[Columns]:
    """The columns permuted among all channels, uniformly at random."""
    return (columns[torch.randperm(len(columns), generator=generator).to(columns.device)] for _ in range(maps))


def untrained_columns(bridges: BridgeSet, maps: int, seed: int) -> Iterator[Columns]:
    """Decoders of freshly initialised bridges of the same widths, one seed after the other."""
    for number in range(maps):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + number)
            fresh = BridgeSet(1, bridges.d_dense, bridges.d_sparse, bridges.encoder_k)
        yield fresh.directions(0).to(bridges.rms_sparse.device)


class Ridge(NamedTuple):
    """A ridge regression from the sparse to the dense stream at a site, y ~ x @ columns + bias."""

    columns: Columns
    bias: Float[Tensor, " d_dense"]
    penalty: float
    """In units of the sparse channels' mean variance."""


def fit_ridge(
    x: Float[Tensor, "token d_sparse"], y: Float[Tensor, "token d_dense"], penalties: Sequence[float] = PENALTIES
) -> Ridge:
    """The regression on all tokens, with the penalty that predicts the last fifth best from the others."""
    kept = len(x) - max(1, len(x) // 5)
    chosen_on, moments = slice(kept, None), _moments(x[:kept], y[:kept])

    def error(penalty: float) -> float:
        ridge = _solve(moments, penalty)
        return float((x[chosen_on] @ ridge.columns + ridge.bias - y[chosen_on]).square().sum())

    return _solve(_moments(x, y), min(penalties, key=error))


class _Moments(NamedTuple):
    """In float64: the penalty of an exact relation is far below float32's resolution of the covariance."""

    mean_x: Tensor
    mean_y: Tensor
    covariance: Tensor
    cross: Tensor


def _moments(x: Tensor, y: Tensor) -> _Moments:
    x, y = x.double(), y.double()
    mean_x, mean_y = x.mean(0), y.mean(0)
    return _Moments(mean_x, mean_y, (x - mean_x).T @ (x - mean_x) / len(x), (x - mean_x).T @ (y - mean_y) / len(x))


def _solve(moments: _Moments, penalty: float) -> Ridge:
    mean_x, mean_y, covariance, cross = moments
    scale = penalty * covariance.diagonal().mean().clamp(min=1e-30)
    columns = torch.linalg.solve(covariance + scale * torch.eye(len(covariance)).to(covariance), cross)
    return Ridge(columns.float(), (mean_y - mean_x @ columns).float(), penalty)


@torch.no_grad()
def stream_at(model: Sublayered, blocks: Int[Tensor, "block pos"], site: int) -> Float[Tensor, "token d"]:
    """A model's residual stream at a site, token by token, over blocks of text."""
    return torch.cat([residuals(model, part)[site].flatten(0, 1) for part in blocks.split(32)])


@torch.no_grad()
def ridge_report(run: Run, site: int, ridge: Ridge, held_out: Int[Tensor, "block pos"]) -> dict[str, float]:
    """The penalty, and the NMSE of the regression and of the trained decoder on held-out text."""
    x, y = (stream_at(model, held_out, site) for model in (run.sparse, run.dense))
    return {
        "penalty": ridge.penalty,
        "nmse": float(nmse(x @ ridge.columns + ridge.bias, y)),
        "decoder_nmse": float(nmse(run.bridges.decode(site, x[None])[0], y)),
    }


@torch.no_grad()
def difference_of_means(dense: Sublayered, selection: TaskBatch, site: int, prompts: Prompts) -> Vectors:
    """Mean dense stream of counterfactual minus presented selection prompts, laid out over the prompts to steer.

    One vector where the two prompts' tokens differ, one for every later token up to the last.
    """
    streams = [residuals(dense, selection.tokens[:, m])[site] for m in (0, 1)]
    change = streams[1] - streams[0]
    kinds, own = _token_kinds(prompts), change.new_zeros(2, change.shape[-1])
    for at, kind in enumerate(_token_kinds(prompts_of(selection))):
        if kind.any():
            own[at] = change[kind].mean(0)
    return kinds[0][..., None] * own[0] + kinds[1][..., None] * own[1]


def _token_kinds(prompts: Prompts) -> tuple[Tensor, Tensor]:
    """Masks: tokens that differ, and later tokens up to the last."""
    return prompts.differ, prompts.open & ~prompts.differ


@torch.no_grad()
def exact_patch(hf: GPT2LMHeadModel, dense: Sublayered, site: int, prompts: Prompts, where: Where) -> Vectors:
    """The edit that at full strength gives the dense model its own counterfactual read, or stream, at the site.

    A read edit adds gain * (v - mean(v)) / std, with std that of the presented stream; the v for which this is the
    difference of the two normalised streams is std times that difference, without the gain.
    """
    here, there = (residuals(dense, tokens)[site] for tokens in (prompts.tokens, prompts.counterfactual))
    change = there - here
    if where == "read":
        eps = hf.config.layer_norm_epsilon

        def std(stream: Tensor) -> Tensor:
            return (stream.var(-1, correction=0, keepdim=True) + eps).sqrt()

        centred = [stream - stream.mean(-1, keepdim=True) for stream in (here, there)]
        change = std(here) * (centred[1] / std(there) - centred[0] / std(here))
    return change * prompts.open[..., None]

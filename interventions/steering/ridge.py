"""A ridge regression from the sparse to the dense stream: a map that needs no trained bridge."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bridges.dense import Sublayered
from bridges.hybrid import residuals
from bridges.losses import nmse
from bridges.run_folder import Run
from interventions.steering.edits import Columns

PENALTIES = tuple(10.0**power for power in range(-8, 3))


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

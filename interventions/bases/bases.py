"""The bases of one dense site that are compared: by how much each latent moves on a prompt, and what it adds.

A basis says of prompts how far each of its latents moves to its counterfactual value, in the dense stream's scale at
that token, and what one unit of it adds to the stream. What is moved is what the next sublayer reads:

- sparse channels: the sparse model's read there, through the trained bridge (paper A.4);
- ridge regression: the same channels, through a regression that needs no bridge;
- TopK autoencoders of the dense read, as wide as the sparse model and trained on as much text;
- a transcoder of the next sublayer, where that is an MLP: it is the sublayer's output that its latents move;
- principal components, and randomly rotated axes, of the dense read; all of them together are the exact patch.

Beside them stand edits of one direction that no search picks from: the difference of means over all tokens or at the
last alone, and the weights of a logistic probe.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from bridges.dense import DenseModel
from bridges.hybrid import residuals
from bridges.run_folder import Run
from interventions.bases.coders import Coder, Trained, sample_site
from interventions.bases.result import OURS
from interventions.editing.where import Where
from interventions.steering.edits import Changes, Columns, sparse_changes
from interventions.steering.logistic import logistic
from interventions.steering.ridge import fit_ridge, stream_at
from interventions.steering.rivals import difference_of_means
from interventions.steering.steered_prompts import Prompts, Vectors, prompts_of
from interventions.tasks.base import TaskBatch

TRANSCODER = "transcoder"
_STEPS = 200  # of a logistic regression


class Place(NamedTuple):
    """Where the dense model is edited."""

    site: int
    where: Where


class Basis(NamedTuple):
    """Latents of one place."""

    changes: Callable[[Prompts], Changes]
    """How far each latent moves on prompts; zero behind their last tokens."""
    columns: Columns
    place: Place


def _read(dense: DenseModel, site: int, tokens: Tensor) -> tuple[Tensor, Float[Tensor, "prompt pos 1"]]:
    """What the next sublayer reads before the norm's gain, at mean square 1, and the stream's scale."""
    stream, norm = residuals(dense, tokens)[site], dense.anatomy.read_norm(site)
    return norm.centre(stream) / norm.scale(stream), norm.scale(stream)


@torch.no_grad()
def read_changes(dense: DenseModel, site: int, prompts: Prompts, latents: Callable[[Tensor], Tensor]) -> Changes:
    """How far latents of the dense read move on the way to its counterfactual."""
    here, scale = _read(dense, site, prompts.tokens)
    there, _ = _read(dense, site, prompts.counterfactual)
    return scale * (latents(there) - latents(here)) * prompts.open[..., None]


@torch.no_grad()
def write_changes(dense: DenseModel, site: int, prompts: Prompts, coder: Coder) -> Changes:
    """How far a transcoder's latents move; its output is in the stream's own units."""
    (here, _), (there, _) = (_read(dense, site, tokens) for tokens in (prompts.tokens, prompts.counterfactual))
    return (coder.latents(there) - coder.latents(here)) * prompts.open[..., None]


def axes(dense: DenseModel, site: int, directions: Float[Tensor, "latent d_dense"]) -> Basis:
    """The basis of orthonormal directions of the dense read."""
    return Basis(lambda p: read_changes(dense, site, p, lambda x: x @ directions.T), directions, Place(site, "read"))


@torch.no_grad()
def make_bases(
    run: Run, site: int, train: Int[Tensor, "train_block pos"], trained: dict[str, Trained], seed: int
) -> dict[str, Basis]:
    """Every basis by name; the principal components and the regression are fitted on the training text given."""
    dense, place = run.dense, Place(site, "read")
    ridge = fit_ridge(stream_at(run.sparse, train, site), stream_at(dense, train, site))

    def channels(prompts: Prompts) -> Changes:
        return sparse_changes(run, site, prompts)

    bases = {
        OURS: Basis(channels, run.bridges.directions(site), place),
        "ridge regression": Basis(channels, ridge.columns, place),
    }
    for name, one in trained.items():
        bases[name] = _coder_basis(dense, site, name, one.coder)
    read = sample_site(run, site, train).read
    components = torch.linalg.eigh(torch.cov(read.double().T)).eigenvectors.flip(1).T.to(read)
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(dense.d_model, dense.d_model, generator=generator))[0].to(read)
    return bases | {
        "principal components": axes(dense, site, components),
        "rotated axes": axes(dense, site, rotation),
    }


def _coder_basis(dense: DenseModel, site: int, name: str, coder: Coder) -> Basis:
    columns = coder.directions()
    if name.startswith(TRANSCODER):
        return Basis(lambda p: write_changes(dense, site, p, coder), columns, Place(site + 1, "stream"))
    return Basis(lambda p: read_changes(dense, site, p, coder.latents), columns, Place(site, "read"))


@torch.no_grad()
def directions(dense: DenseModel, site: int, selection: TaskBatch) -> dict[str, Callable[[Prompts], Vectors]]:
    """The edits of one direction, all made from selection prompts."""
    probe = fit_probe(dense, site, prompts_of(selection))

    def means(prompts: Prompts) -> Vectors:
        return difference_of_means(dense, selection, site, prompts)

    def last(prompts: Prompts) -> Vectors:
        return means(prompts) * _is_last(prompts)[..., None]

    return {
        "difference of means": means,
        "difference of means, last token": last,
        "logistic probe": lambda prompts: prompts.open[..., None] * probe,
    }


def _is_last(prompts: Prompts) -> Tensor:
    return torch.arange(prompts.tokens.shape[1], device=prompts.tokens.device) == prompts.last[:, None]


def fit_probe(dense: DenseModel, site: int, prompts: Prompts) -> Float[Tensor, " d_dense"]:
    """The unit direction of a logistic regression that tells the counterfactual reads from those presented.

    At the tokens from the first that differs to the last; the penalty is the one of a decade's steps that predicts the
    last fifth of the pairs best from the others.
    """
    open_ = prompts.open
    pair = torch.arange(len(open_), device=open_.device)[:, None].expand_as(open_)[open_].repeat(2)
    reads = [_read(dense, site, tokens)[0][open_] for tokens in (prompts.tokens, prompts.counterfactual)]
    x = torch.cat(reads).double()
    y = torch.cat([torch.full((len(read),), float(member)) for member, read in enumerate(reads)]).to(x)
    fitted_on = pair < max(1, len(open_) * 4 // 5) if len(open_) > 1 else pair >= 0

    rest = ~fitted_on if bool((~fitted_on).any()) else fitted_on

    def error(penalty: float) -> float:
        weights, intercept = logistic(x[fitted_on], y[fitted_on], penalty, steps=_STEPS)
        return float(binary_cross_entropy_with_logits(x[rest] @ weights + intercept, y[rest]))

    weights, _ = logistic(x, y, min((10.0**power for power in range(-5, 2)), key=error), steps=_STEPS)
    return (weights / weights.norm().clamp(min=1e-30)).float()

"""What the channels of a steering experiment are compared with: edits that do without their meaning or the bridge.

Every control goes to the same tokens of the same prompts through `intervene_vector`:

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

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from bridges.bridge import BridgeSet
from bridges.dense import DenseModel, Sublayered
from bridges.hybrid import residuals
from interventions.editing.hooks import Where
from interventions.steering.edits import Columns
from interventions.steering.steered_prompts import Prompts, Vectors, prompts_of
from interventions.tasks.base import TaskBatch


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


@torch.no_grad()
def difference_of_means(dense: Sublayered, selection: TaskBatch, site: int, prompts: Prompts) -> Vectors:
    """Mean dense stream of counterfactual minus presented selection prompts, laid out over the prompts to steer.

    One vector where the two prompts' tokens differ, one for every later token up to the last.
    """
    streams = [residuals(dense, selection.tokens[:, m])[site] for m in (0, 1)]
    change = streams[1] - streams[0]
    kinds, means = _token_kinds(prompts), change.new_zeros(2, change.shape[-1])
    for number, kind in enumerate(_token_kinds(prompts_of(selection))):
        if kind.any():
            means[number] = change[kind].mean(0)
    return kinds[0][..., None] * means[0] + kinds[1][..., None] * means[1]


def _token_kinds(prompts: Prompts) -> tuple[Tensor, Tensor]:
    """Masks: tokens that differ, and later tokens up to the last."""
    return prompts.differ, prompts.open & ~prompts.differ


@torch.no_grad()
def exact_patch(dense: DenseModel, site: int, prompts: Prompts, where: Where) -> Vectors:
    """The edit that at full strength gives the dense model its own counterfactual read, or stream, at the site.

    A read edit adds gain * (v - mean(v)) / std, with std that of the presented stream; the v for which this is the
    difference of the two normalised streams is std times that difference, without the gain. For an RMSNorm likewise.
    """
    here, there = (residuals(dense, tokens)[site] for tokens in (prompts.tokens, prompts.counterfactual))
    change = there - here
    if where == "read":
        norm = dense.anatomy.read_norm(site)
        units = [norm.centre(stream) / norm.scale(stream) for stream in (here, there)]
        change = norm.scale(here) * (units[1] - units[0])
    return change * prompts.open[..., None]

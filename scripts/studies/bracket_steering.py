"""The depth channel moved in the dense model through the bridge, on lists that are too long and on lists of three.

Two amounts, both from the sparse model on selection prompts. `undilute`: for each opener what dilution took, its mean
with three names less its mean with the longer list. `deepen`: behind both openers the mean behind `[[` less that behind
`[`, with three names. On lists of three names the same amounts are taken away. The edit is in the stream, at the last
token, at the site behind the head.
"""

from typing import Any, NamedTuple

import torch
from bracket_prompts import SHORT, margins_of
from jaxtyping import Float
from torch import Tensor

from bridges.hybrid import residuals
from bridges.run_folder import Run
from interventions import intervene_vector, load_dense
from interventions.tasks.base import TaskBatch

STRENGTHS = (1.0, 2.0, 4.0)
Vectors = Float[Tensor, "2 d_dense"]
"""What is added behind `[` and behind `[[`."""


class Ends(NamedTuple):
    """Mean streams at a site at the last token, behind `[` and behind `[[`."""

    sparse: Float[Tensor, "2 d_sparse"]
    dense: Vectors


def steer(
    run: Run, roles: dict[str, Any], prompts: dict[str, dict[int, TaskBatch]], measured: dict[str, Any], options: Any
) -> dict[str, Any]:
    """Mean margins of the dense model on evaluation prompts, by move, arm and strength."""
    numbers = sorted(prompts["selection"])
    long = failing(numbers, measured["selection"]["margins"])
    site, depth = 2 * roles["head"][0] + 1, roles["depth"]["channel"]
    short_ends, long_ends = (ends(run, prompts["selection"][number], site) for number in (SHORT, long))
    dense = load_dense(run.folder)
    moves = {
        "undilute": Ends(*(a - b for a, b in zip(short_ends, long_ends, strict=True))),
        "deepen": Ends(*(a.diff(dim=0).expand_as(a) for a in short_ends)),
    }
    found: dict[str, Any] = {"names": long, "site": site, "channel": depth, "unsteered": {}, "moves": {}}
    for number in (SHORT, long):
        found["unsteered"][str(number)] = _steered(dense, site, torch.zeros_like(short_ends.dense), prompts, number)
    for name, move in moves.items():
        of_move: dict[str, Any] = {}
        for arm, draws in arms(run, site, depth, move, options).items():
            norm = float(draws[0].norm(dim=1).mean())
            of_move[arm] = {"norm": norm, "repair": _by_strength(dense, site, draws, prompts, long, 1.0)}
            of_move[arm]["cause"] = _by_strength(dense, site, draws, prompts, SHORT, -1.0)
        found["moves"][name] = of_move
    return found


def failing(numbers: list[int], margins: list[list[float]]) -> int:
    """The fewest names, over three, with which the dense model's mean margin behind `[[` is negative; else the most."""
    failed = [n for n, (_, double) in zip(numbers, margins, strict=True) if n > SHORT and double < 0]
    return failed[0] if failed else numbers[-1]


def ends(run: Run, batch: TaskBatch, site: int) -> Ends:
    tokens, rows = batch.tokens.flatten(0, 1), torch.arange(2 * len(batch.last))
    last = batch.last.repeat_interleave(2)
    means = [
        residuals(model, tokens)[site][rows, last].unflatten(0, (-1, 2)).mean(0) for model in (run.sparse, run.dense)
    ]
    return Ends(*means)


def arms(run: Run, site: int, depth: int, move: Ends, options: Any) -> dict[str, list[Vectors]]:
    """The dense vectors of each arm, draw by draw."""
    directions = run.bridges.directions(site)
    channel, everything = move.sparse[:, [depth]] * directions[depth], move.sparse @ directions
    generator = torch.Generator().manual_seed(options.seed)
    drawn = [torch.randn(channel.shape, generator=generator) for _ in range(options.draws)]
    return {
        "depth channel": [channel],
        "all channels": [everything],
        "difference of means": [move.dense],
        "difference of means, as long as the channel": [as_long(move.dense, channel)],
        "random, as long as the channel": [as_long(one, channel) for one in drawn],
        "random, as long as all channels": [as_long(one, everything) for one in drawn],
    }


def as_long(vectors: Vectors, others: Vectors) -> Vectors:
    """The vectors at the norms of the others."""
    return vectors / vectors.norm(dim=1, keepdim=True).clamp(min=1e-12) * others.norm(dim=1, keepdim=True)


def _by_strength(
    dense: Any, site: int, draws: list[Vectors], prompts: Any, number: int, sign: float
) -> dict[str, dict[str, Any]]:
    """Mean margins by strength, over all draws; of several the smallest and the largest margin behind `[[` too."""
    found = {}
    for strength in STRENGTHS:
        steered = [_steered(dense, site, sign * strength * vectors, prompts, number) for vectors in draws]
        double = [of[1] for of in steered]
        mean = torch.tensor(steered).mean(0).tolist()
        found[f"{strength:g}"] = {"margins": mean, "least": min(double), "most": max(double)}
    return found


def _steered(dense: Any, site: int, vectors: Vectors, prompts: Any, number: int) -> list[float]:
    """Mean margins behind `[` and `[[` on evaluation prompts with vectors added at the last token."""
    batch = prompts["evaluation"][number]
    tokens, last = batch.tokens.flatten(0, 1), batch.last.repeat_interleave(2)
    rows, at_last = torch.arange(len(tokens)), torch.zeros(tokens.shape, dtype=torch.bool)
    at_last[rows, last] = True
    added = vectors.repeat(len(batch.last), 1)[:, None].expand(-1, tokens.shape[1], -1)
    with intervene_vector(dense, site, added, positions=at_last, where="stream"):
        logits = dense(tokens)[rows, last]
    return margins_of(logits, batch).mean(0).tolist()

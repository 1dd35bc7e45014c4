"""Hybrid passes: start in one model, cross through bridges, end in either (paper 3.3).

A path names the model, dense or sparse, that runs each of 2L + 2 parts: the embedding, the 2L sublayers and the
unembedding. Between parts i and i + 1 lies site i; where their sides differ, the residual stream crosses through the
site's encoder (dense to sparse) or decoder (sparse to dense). The paper trains on the paths with a single crossing, and
calls them the first-order part of what it wants: all 2^(2L+2) paths.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bridges.bridge import BridgeSet
from bridges.dense import Resid, Sublayered

Side = Literal["dense", "sparse"]
HybridPath = tuple[Side, ...]


def residuals(model: Sublayered, tokens: Int[Tensor, "batch pos"], *, recompute: bool = False) -> list[Resid]:
    """The residual stream at sites 0 .. 2L; with `recompute`, sublayers keep no activations for the backward pass."""
    stream, sublayer = [model.embed(tokens)], sublayers(model, recompute)
    for i in range(2 * model.n_layers):
        stream.append(sublayer(i, stream[-1]))
    return stream


def sublayers(model: Sublayered, recompute: bool) -> Callable[[int, Resid], Resid]:
    """The model's sublayers, with activation checkpointing where asked for."""
    if not recompute:
        return model.sublayer
    return partial(checkpoint, model.sublayer, use_reentrant=False, preserve_rng_state=False)


def suffix(
    model: Sublayered, site: int, resid: Resid, tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos d_vocab"]:
    """Logits of a model whose residual stream at `site` is `resid`."""
    return model.unembed(advance(model, site, resid), tokens)


def advance(model: Sublayered, site: int, resid: Resid) -> Resid:
    """The residual stream at site 2L of a model whose stream at `site` is `resid`."""
    for i in range(site, 2 * model.n_layers):
        resid = model.sublayer(i, resid)
    return resid


def follow(
    dense: Sublayered,
    sparse: Sublayered,
    bridges: BridgeSet,
    path: Sequence[Side],
    site: int,
    resid: Tensor,
    *,
    recompute: bool = False,
) -> Tensor:
    """The residual stream before the unembedding, from that of part `site`'s side at `site` on."""
    run = {"dense": sublayers(dense, recompute), "sparse": sublayers(sparse, recompute)}
    for i in range(site, 2 * dense.n_layers + 1):
        if path[i] != path[i + 1]:
            resid = bridges.encode(i, resid) if path[i + 1] == "sparse" else bridges.decode(i, resid)
        if i < 2 * dense.n_layers:
            resid = run[path[i + 1]](i, resid)
    return resid


def mixed_path(
    dense: Sublayered,
    sparse: Sublayered,
    bridges: BridgeSet,
    tokens: Int[Tensor, "batch pos"],
    path: Sequence[Side],
) -> Float[Tensor, "batch pos d_vocab"]:
    """Logits of the pass along a path. Raises ValueError unless it names one side for each of the 2L + 2 parts."""
    parts = 2 * dense.n_layers + 2
    if len(path) != parts or not set(path) <= {"dense", "sparse"}:
        raise ValueError(f"path={tuple(path)}: name 'dense' or 'sparse' for each of {parts} parts")
    models: dict[Side, Sublayered] = {"dense": dense, "sparse": sparse}
    resid = follow(dense, sparse, bridges, path, 0, models[path[0]].embed(tokens))
    return models[path[-1]].unembed(resid, tokens)


def single_crossing(n_sites: int, site: int, start: Side) -> HybridPath:
    """The path that begins in `start` and crosses once, at `site`."""
    other: Side = "sparse" if start == "dense" else "dense"
    return (start,) * (site + 1) + (other,) * (n_sites - site)


def first_crossing(path: HybridPath) -> int:
    """The first site at which a path crosses; 2L where it never does."""
    return next((i for i in range(len(path) - 1) if path[i] != path[i + 1]), len(path) - 2)


def kind(path: HybridPath) -> Literal["dense_to_sparse", "sparse_to_dense", "mixed"]:
    """The direction of a path with one crossing, `mixed` for every other."""
    crossings = sum(path[i] != path[i + 1] for i in range(len(path) - 1))
    if crossings != 1:
        return "mixed"
    return "dense_to_sparse" if path[0] == "dense" else "sparse_to_dense"


def random_path(n_sites: int, rng: np.random.Generator) -> HybridPath:
    """A path drawn uniformly from all but the purely dense one, which is the target itself."""
    bits = int(rng.integers(1, 2 ** (n_sites + 1)))
    return tuple("sparse" if bits >> part & 1 else "dense" for part in range(n_sites + 1))

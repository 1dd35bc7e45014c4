"""Hybrid passes: start in one model, cross through bridges, end in either (paper 3.3).

A path names, for each of the 2L sublayers, which model runs it. The residual stream crosses through the encoder (dense
to sparse) or decoder (sparse to dense) of the site where the path changes sides; the side of the first sublayer
embeds, `end` unembeds. The two KL sums of bridge training use the paths with a single crossing.
"""

from collections.abc import Sequence
from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor

from bridges.bridge import BridgeSet
from bridges.dense import Resid, Sublayered

Side = Literal["dense", "sparse"]


def residuals(model: Sublayered, tokens: Int[Tensor, "batch pos"]) -> list[Resid]:
    """The residual stream at sites 0 .. 2L."""
    stream = [model.embed(tokens)]
    for i in range(2 * model.n_layers):
        stream.append(model.sublayer(i, stream[-1]))
    return stream


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


def mixed_path(
    dense: Sublayered,
    sparse: Sublayered,
    bridges: BridgeSet,
    tokens: Int[Tensor, "batch pos"],
    path: Sequence[Side],
    end: Side | None = None,
) -> Float[Tensor, "batch pos d_vocab"]:
    """Logits of the pass that runs sublayer i in model path[i] and unembeds in `end` (default: the last side).

    Raises ValueError unless the path names one side for each of the 2L sublayers.
    """
    if len(path) != 2 * dense.n_layers or not set(path) <= {"dense", "sparse"}:
        raise ValueError(f"path={tuple(path)}: name 'dense' or 'sparse' for each of {2 * dense.n_layers} sublayers")
    models: dict[Side, Sublayered] = {"dense": dense, "sparse": sparse}
    side = path[0]
    resid = models[side].embed(tokens)
    for site, following in enumerate([*path, end or path[-1]]):
        if following != side:
            resid = bridges.encode(site, resid) if following == "sparse" else bridges.decode(site, resid)
            side = following
        if site < len(path):
            resid = models[side].sublayer(site, resid)
    return models[side].unembed(resid, tokens)

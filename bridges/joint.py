"""One step of the joint loss, with at most one hybrid graph alive at a time (paper 3.3).

    L = CE_sparse + sum_i NMSE(f_i(h^d_i), h^s_i) + sum_i NMSE(g_i(h^s_i), h^d_i)
      + sum_i KL(y^d || sparse suffix of f_i(h^d_i)) + sum_i KL(y^d || dense suffix of g_i(h^s_i))

with a weight on each term. The algorithm:

1. Run the dense model without a graph; keep h^d_0 .. h^d_2L and its logits y^d.
2. Run the sparse model with a graph; at every site put a leaf in the place of h^s_i.
3. For each site: NMSE terms, and where the site was drawn its two hybrids; each term's backward runs at once and frees
   its graph. Gradients gather in the parameters and in the leaves.
4. One backward through the sparse model's own graph, from the cross-entropy and the leaves' gradients.

The gradient is that of the summed loss. Sites not drawn contribute nothing and the drawn ones are scaled by
(2L + 1) / k, so that the expectation over draws is the full sum.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from bridges.bridge import BridgeSet
from bridges.config import BridgeConfig, LossWeights
from bridges.dense import Sublayered
from bridges.hybrid import advance, residuals
from bridges.losses import kl, nmse
from sparse_model.losses import next_token_loss
from sparse_model.transformer import SparseTransformer


class Draw(NamedTuple):
    """What one step samples."""

    to_sparse: Sequence[int]
    """Sites whose dense-to-sparse hybrid runs."""
    to_dense: Sequence[int]
    """Sites whose sparse-to-dense hybrid runs."""
    positions: Int[Tensor, " kl_pos"]
    """Positions at which the KLs are evaluated."""


class JointLosses(NamedTuple):
    """The unweighted loss terms of one step, detached, on the device."""

    ce: Float[Tensor, ""]
    """Sparse cross-entropy, nats."""
    nmse_encode: Float[Tensor, " site"]
    """Encoder NMSE per site."""
    nmse_decode: Float[Tensor, " site"]
    """Decoder NMSE per site."""
    kl_dense_to_sparse: Float[Tensor, ""]
    """KL of the drawn dense-to-sparse hybrids, nats, mean over them."""
    kl_sparse_to_dense: Float[Tensor, ""]
    """KL of the drawn sparse-to-dense hybrids, nats, mean over them."""


def draw(config: BridgeConfig, n_sites: int, n_positions: int, seed: int, step: int) -> Draw:
    """Sites and positions of a step: a pure function of seed and step, equal on every process."""
    rng = np.random.default_rng([seed, step])
    k = n_sites if config.sites == "all" else min(config.sites, n_sites)
    count = max(1, round(config.kl_positions * n_positions))
    return Draw(
        sorted(rng.choice(n_sites, k, replace=False).tolist()),
        sorted(rng.choice(n_sites, k, replace=False).tolist()),
        torch.from_numpy(np.sort(rng.choice(n_positions, count, replace=False))),
    )


def joint_backward(
    dense: Sublayered,
    sparse: SparseTransformer,
    bridges: BridgeSet,
    tokens: Int[Tensor, "batch pos"],
    drawn: Draw,
    weights: LossWeights,
) -> JointLosses:
    """Accumulate the joint loss' gradient into the sparse model's and the bridges' parameters."""
    positions = drawn.positions.to(tokens.device)
    with torch.no_grad():
        h_dense = residuals(dense, tokens)
        target = dense.unembed(h_dense[-1][:, positions], tokens[:, positions])
    h_sparse = residuals(sparse, tokens)
    ce = next_token_loss(sparse.unembed(h_sparse[-1], tokens), tokens)
    leaves = [h.detach().requires_grad_() for h in h_sparse]

    def hybrid_kl(model: Sublayered, site: int, resid: Tensor) -> Tensor:
        end = advance(model, site, resid)[:, positions]
        return kl(target, model.unembed(end, tokens[:, positions]))

    scale_to_sparse = weights.kl_dense_to_sparse * bridges.n_sites / max(1, len(drawn.to_sparse))
    scale_to_dense = weights.kl_sparse_to_dense * bridges.n_sites / max(1, len(drawn.to_dense))
    nmse_encode, nmse_decode, kl_to_sparse, kl_to_dense = [], [], [], []
    for site, (dense_resid, leaf) in enumerate(zip(h_dense, leaves, strict=True)):
        encoded = bridges.encode(site, dense_resid)
        loss = nmse(encoded, leaf, through_target=weights.nmse_through_target)
        nmse_encode.append(loss.detach())
        total = weights.nmse_encode * loss
        if site in drawn.to_sparse:
            loss = hybrid_kl(sparse, site, encoded)
            kl_to_sparse.append(loss.detach())
            total = total + scale_to_sparse * loss
        total.backward()

        decoded = bridges.decode(site, leaf)
        loss = nmse(decoded, dense_resid)
        nmse_decode.append(loss.detach())
        total = weights.nmse_decode * loss
        if site in drawn.to_dense:
            loss = hybrid_kl(dense, site, decoded)
            kl_to_dense.append(loss.detach())
            total = total + scale_to_dense * loss
        total.backward()
    torch.autograd.backward([weights.ce * ce, *h_sparse], [torch.ones_like(ce), *(leaf.grad for leaf in leaves)])
    nothing = torch.full_like(ce, torch.nan)
    return JointLosses(
        ce.detach(),
        torch.stack(nmse_encode),
        torch.stack(nmse_decode),
        torch.stack(kl_to_sparse).mean() if kl_to_sparse else nothing,
        torch.stack(kl_to_dense).mean() if kl_to_dense else nothing,
    )

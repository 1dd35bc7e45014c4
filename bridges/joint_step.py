"""One step of the joint loss, with at most one hybrid graph and one chunk of logits alive at a time (paper 3.3).

    L = CE_sparse + sum_i NMSE(f_i(h^d_i), h^s_i) + sum_i NMSE(g_i(h^s_i), h^d_i)
      + sum_i KL(y^d || sparse suffix of f_i(h^d_i)) + sum_i KL(y^d || dense suffix of g_i(h^s_i))

with a weight on each term. The algorithm:

1. Run the dense model without a graph; keep h^d_0 .. h^d_2L.
2. Run the sparse model with a graph; at every site put a leaf in the place of h^s_i.
3. The cross-entropy, then each hybrid that was drawn: its backward pass runs at once and frees its graph, the logits'
   part of it chunk by chunk (`bridges.chunked_logits`). Gradients gather in the parameters and in the leaves.
4. The NMSE terms, site by site; over several processes their sums of squares are those of the whole batch.
5. One backward through the sparse model's own graph, from the leaves' gradients.

The gradient is that of the summed loss. What is not drawn contributes nothing and what is drawn is scaled up, so that
the expectation over draws is the full sum: by (2L + 1) / k for k of the sites; with n random paths instead, the
mean over all paths takes the place of the mean over the 2 (2L + 1) single crossings.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from bridges.bridge import BridgeSet, DenseResid, SparseResid
from bridges.chunked_logits import Target, head_backward, rows_at_once
from bridges.config import BridgeConfig
from bridges.dense import Resid, Sublayered
from bridges.hybrid import HybridPath, first_crossing, follow, kind, random_path, residuals, single_crossing
from bridges.losses import kl, nmse_backward, nmse_backward_together
from sparse_model.io.tensors import to_device
from sparse_model.model.transformer import SparseTransformer
from sparse_model.training.losses import token_loss

Reduce = Callable[[Tensor], Tensor]


class Draw(NamedTuple):
    """What one step samples."""

    hybrids: Sequence[tuple[HybridPath, float]]
    """The hybrid passes that run, each with the weight of its KL."""
    positions: Int[Tensor, " kl_pos"]
    """Positions at which the KLs are evaluated."""


class JointLosses(NamedTuple):
    """The unweighted loss terms of one step, detached, on the device; None where no such hybrid was drawn."""

    ce: Float[Tensor, ""]
    """Sparse cross-entropy, nats."""
    nmse_encode: Float[Tensor, " site"]
    """Encoder NMSE per site."""
    nmse_decode: Float[Tensor, " site"]
    """Decoder NMSE per site."""
    kl_dense_to_sparse: Float[Tensor, ""] | None
    """KL of the drawn dense-to-sparse hybrids, nats, mean over them."""
    kl_sparse_to_dense: Float[Tensor, ""] | None
    """KL of the drawn sparse-to-dense hybrids, nats, mean over them."""
    kl_mixed: Float[Tensor, ""] | None
    """KL of the drawn paths with any other number of crossings, nats, mean over them."""


def draw(config: BridgeConfig, n_sites: int, n_positions: int, seed: int, step: int) -> Draw:
    """Hybrids and positions of a step: a pure function of seed and step, equal on every process."""
    rng = np.random.default_rng([seed, step])
    weights = config.weights
    hybrids: list[tuple[HybridPath, float]] = []
    if config.paths:
        weight = (weights.kl_dense_to_sparse + weights.kl_sparse_to_dense) * n_sites / config.paths
        hybrids = [(random_path(n_sites, rng), weight) for _ in range(config.paths)]
    else:
        k = n_sites if config.sites == "all" else min(config.sites, n_sites)
        for start, weight in (("dense", weights.kl_dense_to_sparse), ("sparse", weights.kl_sparse_to_dense)):
            for site in sorted(rng.choice(n_sites, k, replace=False).tolist()):
                hybrids.append((single_crossing(n_sites, site, start), weight * n_sites / k))  # type: ignore[arg-type]
    count = max(1, round(config.kl_positions * n_positions))
    positions = torch.from_numpy(np.sort(rng.choice(n_positions, count, replace=False)))
    return Draw(hybrids, positions)


def joint_backward(
    dense: Sublayered,
    sparse: SparseTransformer,
    bridges: BridgeSet,
    tokens: Int[Tensor, "batch pos"],
    drawn: Draw,
    config: BridgeConfig,
    *,
    scale: float | Tensor = 1.0,
    total: Reduce | None = None,
    together: bool = False,
) -> JointLosses:
    """Accumulate `scale` times the joint loss' gradient into the sparse model's and the bridges' parameters.

    `total` sums a tensor over the processes of a parallel run whose gradients are then averaged. `together` takes the
    NMSE of all sites at once: fewer launches and more memory, as a GPU wants it.
    """
    weights = config.weights
    rows = rows_at_once(sparse.d_vocab, config.logits_at_once)
    # Beside as many hybrids a second forward pass of the sparse model costs little, and its activations much.
    many = len(drawn.hybrids) > bridges.n_sites
    with torch.no_grad():
        h_dense = residuals(dense, tokens)
    h_sparse = residuals(sparse, tokens, recompute=config.checkpointing or many)
    leaves = [h.detach().requires_grad_() for h in h_sparse]
    ce = _cross_entropy(sparse, leaves[-1], tokens, scale * weights.ce, rows)
    kls = defaultdict[str, list[Tensor]](list)
    drawn = drawn._replace(positions=to_device(drawn.positions, tokens.device))
    size = config.hybrid_batch or len(tokens)
    for start in range(0, len(tokens), size):
        here = slice(start, start + size)
        streams = [h[here] for h in h_dense], [leaf[here] for leaf in leaves]
        share = len(tokens[here]) / len(tokens)
        for path, loss in _hybrids(dense, sparse, bridges, streams, tokens[here], drawn, config, scale * share):
            kls[kind(path)].append(share * loss)
    encode_rule: dict[str, Any] = {
        "scale": scale * weights.nmse_encode,
        "through_target": weights.nmse_through_target,
        "total": total,
    }
    decode_rule: dict[str, Any] = {"scale": scale * weights.nmse_decode, "total": total}
    if together:
        nmse_encode = nmse_backward_together(bridges.encode_sites(h_dense), leaves, **encode_rule)
        nmse_decode = nmse_backward_together(bridges.decode_sites(leaves), h_dense, **decode_rule)
    else:
        nmse_encode = nmse_backward(lambda i: bridges.encode(i, h_dense[i]), leaves, **encode_rule)
        nmse_decode = nmse_backward(lambda i: bridges.decode(i, leaves[i]), h_dense, **decode_rule)
    torch.autograd.backward(h_sparse, [leaf.grad for leaf in leaves])
    drawn_of = Counter[str](kind(path) for path, _ in drawn.hybrids)
    means = {name: torch.stack(values).sum() / drawn_of[name] for name, values in kls.items()}
    names = ("dense_to_sparse", "sparse_to_dense", "mixed")
    return JointLosses(ce, nmse_encode, nmse_decode, *(means.get(name) for name in names))


def _hybrids(
    dense: Sublayered,
    sparse: SparseTransformer,
    bridges: BridgeSet,
    streams: tuple[list[DenseResid], list[SparseResid]],
    tokens: Int[Tensor, "batch pos"],
    drawn: Draw,
    config: BridgeConfig,
    scale: float | Tensor,
) -> Iterator[tuple[HybridPath, Float[Tensor, ""]]]:
    """Run every hybrid that was drawn from these dense residuals and sparse leaves, forward and backward; its KL."""
    rows = rows_at_once(sparse.d_vocab, config.logits_at_once)
    h_dense, leaves = streams
    positions = drawn.positions
    seen = tokens.index_select(1, positions).reshape(-1)
    target = Target(dense, h_dense[-1].index_select(1, positions).flatten(0, 1), seen, rows)
    for path, weight in drawn.hybrids:
        site = first_crossing(path)
        start = h_dense[site] if path[site] == "dense" else leaves[site]
        end = follow(dense, sparse, bridges, path, site, start, recompute=config.checkpointing)
        end = end.index_select(1, positions).flatten(0, 1)
        head = dense if path[-1] == "dense" else sparse
        result = head_backward(head, end, seen, partial(_kl_of_part, target), scale=scale * weight, rows=rows)
        end.backward(result.grad)
        yield path, result.loss
        del end, result


def _kl_of_part(target: Target, logits: Tensor, part: slice) -> Tensor:
    return kl(target(part), logits)


def _cross_entropy(
    sparse: SparseTransformer, resid: Resid, tokens: Int[Tensor, "batch pos"], scale: float | Tensor, rows: int
) -> Float[Tensor, ""]:
    """The sparse model's cross-entropy from its last residual stream, which gets the gradient."""
    last, following = resid[:, :-1].flatten(0, 1), tokens[:, 1:].reshape(-1)
    head = head_backward(
        sparse,
        last,
        tokens[:, :-1].reshape(-1),
        lambda logits, part: token_loss(logits, following[part]),
        scale=scale,
        rows=rows,
    )
    last.backward(head.grad)
    return head.loss

"""The scales of the residual streams over held-out text, with which interventions convert units (paper A.4).

They are measured once, when training ends, and saved with the bridges. Evaluation on other text leaves them alone: an
edit that was found with one scale would otherwise be another edit afterwards.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bridges.bridge import BridgeSet
from bridges.dense import Sublayered
from bridges.hybrid import residuals


@torch.no_grad()
def measure_scales(
    dense: Sublayered,
    sparse: Sublayered,
    bridges: BridgeSet,
    blocks: Int[Tensor, "block pos"],
    *,
    batch_size: int = 32,
) -> None:
    """Set the bridges' scales (`BridgeSet.set_scales`) to those of both models' streams on blocks of tokens."""
    scales = torch.zeros(3, bridges.n_sites, dtype=torch.float64)
    for batch in blocks.split(batch_size):
        tokens = batch.long().to(bridges.rms_dense.device)
        for site, streams in enumerate(zip(residuals(dense, tokens), residuals(sparse, tokens), strict=True)):
            for row, value in enumerate(stream_scales(*streams)):
                scales[row, site] += float(value) * len(tokens)
    bridges.set_scales(*(scales / len(blocks)))


def stream_scales(
    h_dense: Float[Tensor, "batch pos d_dense"], h_sparse: Float[Tensor, "batch pos d_sparse"]
) -> tuple[Tensor, Tensor, Tensor]:
    """Means over tokens of the dense RMS, the dense standard deviation about its own mean, and the sparse RMS."""
    rms_dense = h_dense.square().mean(-1).sqrt().mean()
    std_dense = h_dense.std(-1, correction=0).mean()
    return rms_dense, std_dense, h_sparse.square().mean(-1).sqrt().mean()

"""The edits of a steering experiment that move sparse channels: the change of the dense stream at every token.

At strength 1 a set of channels adds, at every token of a prompt,

    v = rms_s * sum_c (counterfactual - presented activation of c) * W[:, c]

with W the decoder (paper A.4), or a map that stands in for it as a control.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from bridges.run_folder import Run
from interventions.bundle.channels import residual_reads
from interventions.editing.vectors import stream_change
from interventions.steering.steered_prompts import Prompts, Vectors

Columns = Float[Tensor, "d_sparse d_dense"]
"""What one unit of each sparse stream channel adds to the dense stream."""


@torch.no_grad()
def activation_changes(run: Run, site: int, prompts: Prompts) -> Float[Tensor, "prompt pos d_sparse"]:
    """Counterfactual minus presented activation of every channel of the sparse read; zero behind the last token."""
    reads = [residual_reads(run.sparse, tokens, site) for tokens in (prompts.counterfactual, prompts.tokens)]
    return (reads[0] - reads[1]) * prompts.open[..., None]


def channel_edit(
    changes: Float[Tensor, "prompt pos d_sparse"], columns: Columns, rms: Float[Tensor, ""], channels: Sequence[int]
) -> Vectors:
    """The edit of a set of channels through the columns of some map; `rms` is that of the sparse stream."""
    return stream_change(rms, changes[..., list(channels)], columns[list(channels)])


def scaled(edit: Vectors, norm: Float[Tensor, "prompt pos 1"]) -> Vectors:
    """An edit with its direction at every token and the norm given; zero where it is zero."""
    return edit * (norm / edit.norm(dim=-1, keepdim=True).clamp(min=1e-30))


def mean_norm(edit: Vectors) -> float:
    """Mean length of an edit over the tokens that it moves; 0 where it moves none."""
    norms = edit.norm(dim=-1)
    return float(norms.sum() / (norms > 0).sum().clamp(min=1))

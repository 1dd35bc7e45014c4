"""The edits of a steering experiment that move sparse channels: the change of the dense stream at every token.

At strength 1 a set of channels adds, at every token of a prompt,

    v = rms_s * sum_c (counterfactual - presented read of c) * W[:, c]

with rms_s that of the sparse stream there, and W the decoder (paper A.4), or a map that stands in for it as a control.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from bridges.hybrid import residuals
from bridges.run_folder import Run
from interventions.bundle.channels import reads_and_rms
from interventions.editing.units import Units
from interventions.editing.where import Where
from interventions.steering.steered_prompts import Prompts, Vectors

Columns = Float[Tensor, "d_sparse d_dense"]
"""What one unit of each sparse stream channel adds to the dense stream."""
Changes = Float[Tensor, "prompt pos d_sparse"]
"""How far every channel moves in the sparse stream."""


@torch.no_grad()
def sparse_changes(run: Run, site: int, prompts: Prompts, units: Units = "exact", where: Where = "read") -> Changes:
    """Counterfactual minus presented reads in the sparse stream's scale; zero behind the last token.

    In the paper's units a read edit goes by the dense norm's mean scale as well: `where` says whether it is one.
    """
    there, (here, rms) = (
        reads_and_rms(run.sparse, prompts.counterfactual, site)[0],
        reads_and_rms(run.sparse, prompts.tokens, site),
    )
    if units == "paper":
        rms = run.bridges.rms_sparse[site]
        if where == "read":
            norm = run.dense.anatomy.read_norm(site)
            rms = rms * norm.scale(residuals(run.dense, prompts.tokens)[site]) / run.bridges.norm_scale(site, norm)
    return rms * (there - here) * prompts.open[..., None]


def channel_edit(changes: Changes, columns: Columns, channels: Sequence[int]) -> Vectors:
    """The edit of a set of channels through the columns of some map."""
    return changes[..., list(channels)] @ columns[list(channels)]


def scaled(edit: Vectors, norm: Float[Tensor, "prompt pos 1"]) -> Vectors:
    """An edit with its direction at every token and the norm given; zero where it is zero."""
    return edit * (norm / edit.norm(dim=-1, keepdim=True).clamp(min=1e-30))


def mean_norm(edit: Vectors) -> float:
    """Mean length of an edit over the tokens that it moves; 0 where it moves none."""
    norms = edit.norm(dim=-1)
    return float(norms.sum() / (norms > 0).sum().clamp(min=1))

"""The joint trainer: sparse model and bridges beside a frozen dense model."""

from functools import cached_property
from pathlib import Path

import torch
from accelerate import Accelerator
from jaxtyping import Int
from torch import Tensor

from bridges.bridge import BridgeSet, kept_by_encoders
from bridges.config import RunConfig
from bridges.dense import DenseModel, check_fit
from bridges.hybrid import residuals
from bridges.joint_step import JointLosses, draw, joint_backward
from sparse_model.model.transformer import SparseTransformer
from sparse_model.sparsity.projection import annealed_topk
from sparse_model.sparsity.topk import NotFiniteError
from sparse_model.training.identity import Identity, digest_of
from sparse_model.training.trainer import FreeRule, SparseTrainer, sublayer_not_finite


class JointTrainer(SparseTrainer):
    """Trains a sparse model and bridges in a run folder; the loop is that of `sparse_model.training.trainer`.

    Raises ValueError where the two models do not fit each other.
    """

    title = "joint"

    def __init__(
        self,
        config: RunConfig,
        dense: DenseModel,
        sparse: SparseTransformer,
        bridges: BridgeSet,
        blocks: Int[Tensor, "block pos"],
        folder: Path,
        accelerator: Accelerator | None = None,
    ) -> None:
        check_fit(dense, sparse.cfg)
        rule = FreeRule(config.bridge.lr, config.bridge.eps, config.bridge.clip)
        super().__init__(config, sparse, blocks, folder, accelerator, free_rule=rule, beside={"bridges": bridges})
        self.bridge_config, self.bridges = config.bridge, bridges
        self.dense = dense.to(self.device)

    def set_topk(self, progress: float) -> None:
        """Set what AbsTopK keeps in the sparse model, and in the encoders, at this share of all steps."""
        super().set_topk(progress)
        share = annealed_topk(self.bridge_config.encoder_topk, self.config.sparsity, progress)
        self.bridges.encoder_k = kept_by_encoders(share, self.bridges.d_sparse)

    def backward(self, tokens: Int[Tensor, "batch pos"], batch: int, scale: float | Tensor) -> JointLosses:
        """The joint loss of this batch's draw of hybrids and positions."""
        config = self.bridge_config
        drawn = draw(config, self.bridges.n_sites, tokens.shape[1], self.config.seed, batch)
        total = self.total if self.accelerator.num_processes > 1 else None
        models = self.dense, self.sparse, self.bridges
        together = self.device.type != "cpu"
        return joint_backward(*models, tokens, drawn, config, scale=scale, total=total, together=together)

    @cached_property
    def identity(self) -> Identity:
        """What decides the weights besides the settings."""
        return super().identity | {"dense": digest_of(self.dense.parameters())}

    @torch.no_grad()
    def where_not_finite(self, tokens: Int[Tensor, "batch pos"]) -> str:
        """What, on the CPU, is not finite first in the passes over a batch."""
        sublayer = sublayer_not_finite(self.sparse, tokens)
        if sublayer:
            return sublayer
        for site, resid in enumerate(residuals(self.dense, tokens)):
            try:
                self.bridges.encode(site, resid)
            except NotFiniteError:
                return f"the encoder's output at site {site}"
        return "an activation of a hybrid"

    def progress_text(self, record: dict) -> str:
        """The progress bar's text."""
        nmse = "/".join(f"{sum(record[n]) / len(record[n]):.2f}" for n in ("nmse_encode", "nmse_decode"))
        kl = "/".join(f"{value:.2f}" for name, value in record.items() if name.startswith("kl_"))
        return f"ce {record['ce']:.2f} nmse {nmse} kl {kl}"

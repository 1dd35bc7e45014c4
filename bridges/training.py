"""The joint trainer: sparse model and bridges beside a frozen dense model."""

from pathlib import Path

from accelerate import Accelerator
from jaxtyping import Int
from torch import Tensor

from bridges.bridge import BridgeSet
from bridges.config import RunConfig
from bridges.dense import DenseModel
from bridges.joint import JointLosses, draw, joint_backward
from sparse_model.config import require
from sparse_model.training import FreeRule, SparseTrainer
from sparse_model.transformer import SparseTransformer


class JointTrainer(SparseTrainer):
    """Trains a sparse model and bridges in a run folder; the loop is that of `sparse_model.training`.

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
        check_fit(dense, sparse)
        rule = FreeRule(config.bridge.lr, config.bridge.eps, config.bridge.clip)
        super().__init__(config, sparse, blocks, folder, accelerator, free_rule=rule, beside={"bridges": bridges})
        self.bridge_config, self.bridges = config.bridge, bridges
        self.dense = dense.to(self.accelerator.device)

    def backward(self, tokens: Int[Tensor, "batch pos"]) -> JointLosses:
        """The joint loss of this step's draw of sites and positions."""
        drawn = draw(self.bridge_config, self.bridges.n_sites, tokens.shape[1], self.config.seed, self.step)
        return joint_backward(self.dense, self.sparse, self.bridges, tokens, drawn, self.bridge_config.weights)

    def summary(self, record: dict) -> str:
        """The progress bar's text."""
        mean = {n: sum(record[n]) / len(record[n]) for n in ("nmse_encode", "nmse_decode")}
        return (
            f"ce {record['ce']:.2f} nmse {mean['nmse_encode']:.2f}/{mean['nmse_decode']:.2f} "
            f"kl {record['kl_dense_to_sparse']:.2f}/{record['kl_sparse_to_dense']:.2f}"
        )


def check_fit(dense: DenseModel, sparse: SparseTransformer) -> None:
    """Raise ValueError unless the two models have the same depth and vocabulary and a context that fits."""
    require(
        dense.n_layers == sparse.n_layers,
        "sparse.n_layers",
        sparse.n_layers,
        f"the dense model has {dense.n_layers} layers and each sublayer needs its partner: use {dense.n_layers}",
    )
    require(
        dense.d_vocab == sparse.d_vocab,
        "sparse.d_vocab",
        sparse.d_vocab,
        f"the dense model's vocabulary has {dense.d_vocab} tokens: use {dense.d_vocab}",
    )
    require(
        dense.n_ctx >= sparse.n_ctx,
        "sparse.n_ctx",
        sparse.n_ctx,
        f"the dense model's context holds {dense.n_ctx} tokens: use at most that",
    )

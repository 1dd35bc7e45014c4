"""The bridges themselves: one encoder and one decoder per residual site (paper 3.3)."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn

from bridges.families import ReadNorm
from sparse_model.io.atomic import recover_folder, replace_folder
from sparse_model.io.commands import command_line
from sparse_model.io.narrow import narrowed, read_weights
from sparse_model.io.reading import NOTHING_ELSE, read_typed
from sparse_model.io.tensors import check_finite, check_sizes, load_checked, read_shapes
from sparse_model.sparsity.abs_topk import abs_topk

DenseResid = Float[Tensor, "batch pos d_dense"]
SparseResid = Float[Tensor, "batch pos d_sparse"]

SCALES = ("rms_dense", "std_dense", "rms_sparse")
"""What is measured on text, not trained (`bridges.scales`)."""


class BridgeSet(nn.Module):
    """Encoders f_i = AbsTopK(linear), dense to sparse, and decoders g_i = linear, sparse to dense, at sites 0 .. 2L.

    Under autocast a stream keeps its type: products are rounded, sums in a stream are not.
    `encoder_k` entries survive each encoder's AbsTopK; d_sparse keeps all (the identity bridges of the tests).
    """

    rms_dense: Float[Tensor, " site"]
    std_dense: Float[Tensor, " site"]
    rms_sparse: Float[Tensor, " site"]

    def __init__(self, n_sites: int, d_dense: int, d_sparse: int, encoder_k: int) -> None:
        super().__init__()
        if not 1 <= encoder_k <= d_sparse:
            raise ValueError(f"encoder_k={encoder_k}: must lie in 1 .. d_sparse={d_sparse}")
        self.n_sites, self.d_dense, self.d_sparse, self.encoder_k = n_sites, d_dense, d_sparse, encoder_k
        self.encoders = nn.ModuleList(nn.Linear(d_dense, d_sparse) for _ in range(n_sites))
        self.decoders = nn.ModuleList(nn.Linear(d_sparse, d_dense) for _ in range(n_sites))
        for name in SCALES:
            self.register_buffer(name, torch.full((n_sites,), torch.nan))
        for bias in (m.bias for m in (*self.encoders, *self.decoders)):
            nn.init.zeros_(bias)

    def norm_scale(self, site: int, norm: ReadNorm) -> Float[Tensor, ""]:
        """The mean, over held-out text, of what the dense norm at a site divides by."""
        return (self.std_dense if norm.centred else self.rms_dense)[site]

    def encode(self, site: int, resid: DenseResid) -> SparseResid:
        """f_site: a dense residual stream as a sparse one."""
        return abs_topk(self.encoders[site](resid), self.encoder_k).to(resid.dtype)

    def decode(self, site: int, resid: SparseResid) -> DenseResid:
        """g_site: a sparse residual stream as a dense one."""
        return self.decoders[site](resid).to(resid.dtype)

    def encode_sites(self, resids: list[DenseResid]) -> Float[Tensor, "site batch pos d_sparse"]:
        """Every site's encoder on its stream, in the launches of one."""
        return abs_topk(_linear_sites(self.encoders, resids), self.encoder_k)

    def decode_sites(self, resids: list[SparseResid]) -> Float[Tensor, "site batch pos d_dense"]:
        """Every site's decoder on its stream, in the launches of one."""
        return _linear_sites(self.decoders, resids)

    def set_scales(
        self,
        rms_dense: Float[Tensor, " site"],
        std_dense: Float[Tensor, " site"],
        rms_sparse: Float[Tensor, " site"],
    ) -> None:
        """Set the streams' scales, averaged over a reference set; interventions convert units with them (A.4)."""
        for name, value in zip(SCALES, (rms_dense, std_dense, rms_sparse), strict=True):
            getattr(self, name).copy_(value)

    def check_scales(self) -> None:
        """Raise ValueError for bridges whose streams were never measured: there is no unit to steer in."""
        if not torch.isfinite(self.rms_sparse).all():
            raise ValueError(
                "the bridges have no scales: training measures them, bridges.scales.measure_scales sets them"
            )

    def directions(self, site: int) -> Float[Tensor, "d_sparse d_dense"]:
        """What one unit of each sparse stream channel adds to the dense stream: the decoder's columns, without bias."""
        weight = self.decoders[site].weight
        assert isinstance(weight, Tensor)
        return weight.detach().T


def kept_by_encoders(share: float, d_sparse: int) -> int:
    """Entries that an encoder's AbsTopK keeps: this share of the sparse width, rounded down, at least one."""
    return max(1, int(share * d_sparse))


@dataclass(frozen=True)
class BridgeShape:
    """The sizes of a `BridgeSet`, as its config.json has them."""

    __pydantic_config__ = NOTHING_ELSE

    n_sites: int
    d_dense: int
    d_sparse: int
    encoder_k: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        if self.encoder_k > self.d_sparse:
            raise ValueError(f"encoder_k={self.encoder_k}: must lie in 1 .. d_sparse={self.d_sparse}")


def _linear_sites(
    layers: nn.ModuleList, resids: list[Float[Tensor, "batch pos d_in"]]
) -> Float[Tensor, "site batch pos d_out"]:
    weights = torch.stack([layer.weight for layer in layers])  # type: ignore[misc]
    biases = torch.stack([layer.bias for layer in layers])  # type: ignore[misc]
    rows = torch.stack(resids).flatten(1, 2)
    return torch.baddbmm(biases[:, None], rows, weights.mT).unflatten(1, resids[0].shape[:2]).to(rows.dtype)


def save_bridges(bridges: BridgeSet, folder: Path) -> None:
    """Write a BridgeSet: shape in config.json, weights and scales in safetensors."""
    with replace_folder(folder) as temporary:
        shape = BridgeShape(bridges.n_sites, bridges.d_dense, bridges.d_sparse, bridges.encoder_k)
        (temporary / "config.json").write_text(json.dumps(asdict(shape), indent=2) + "\n")
        state = {n: t.cpu().contiguous() for n, t in bridges.state_dict().items()}
        save_file(narrowed(state), temporary / "bridges.safetensors")


def load_bridges(folder: Path) -> BridgeSet:
    """Read a BridgeSet; missing or damaged files and misfits are errors that name them."""
    recover_folder(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder.parent} has no bridges ({path} does not exist): finish its training with "
            f"{command_line('train-bridge', '--run', folder.parent, '--resume')}, or name another run"
        )
    shape, weights = read_typed(BridgeShape, path, "copy it again"), folder / "bridges.safetensors"
    stored = read_shapes(weights)
    check_sizes(weights, {"n_sites": (shape.n_sites, sum(n.endswith(".weight") for n in stored) // 2)})
    first = stored.get("encoders.0.weight", ())
    if len(first) == 2:
        check_sizes(weights, {"d_sparse": (shape.d_sparse, first[0]), "d_dense": (shape.d_dense, first[1])})
    state = read_weights(weights)
    bridges = BridgeSet(**asdict(shape))
    load_checked(bridges, state, weights)
    check_finite({name: t for name, t in state.items() if name not in SCALES}, weights)
    return bridges

"""Faithfulness of a run on held-out text, per site (paper 3.3, with the figures the paper leaves out).

Dense and sparse models are evaluated as they are; every site gets both bridges' NMSE and explained variance, both
hybrids' KL and cross-entropy, and the share of the loss that each hybrid recovers:

    recovered = (CE(ablated) - CE(hybrid)) / (CE(ablated) - CE(own))

where `own` is the model that runs the hybrid's suffix and `ablated` that model with its residual stream at the site
replaced by its mean over held-out tokens. 1 is a perfect bridge, 0 one that carries nothing.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from bridges.bridge import BridgeSet
from bridges.dense import Sublayered
from bridges.hybrid import mixed_path, random_path, residuals, suffix
from bridges.losses import kl
from bridges.sites import all_sites
from sparse_model.io.progress import progress_bar
from sparse_model.io.tables import paragraph, table
from sparse_model.model.transformer import SparseTransformer
from sparse_model.sparsity.projection import count_nonzeros
from sparse_model.sparsity.sparse_linear import sparse_products
from sparse_model.training.losses import next_token_loss


class SiteReport(NamedTuple):
    """Faithfulness of one site's bridges."""

    site: int
    label: str
    """What reads at the site: attn.0, mlp.0, ..., unembed."""
    nmse_encode: float
    """NMSE of f(h_dense) against h_sparse; 1 is predicting the mean."""
    nmse_decode: float
    """NMSE of g(h_sparse) against h_dense."""
    explained_variance_encode: float
    """1 - var(error) / var(target): as 1 - NMSE, but a constant error is free."""
    explained_variance_decode: float
    kl_dense_to_sparse: float
    """KL(dense || hybrid that starts dense and ends sparse), nats per token."""
    kl_sparse_to_dense: float
    """KL(dense || hybrid that starts sparse and ends dense), nats per token."""
    ce_dense_to_sparse: float
    """Next-token cross-entropy of that hybrid, nats."""
    ce_sparse_to_dense: float
    recovered_dense_to_sparse: float
    """Share of the loss recovered against mean ablation in the sparse model."""
    recovered_sparse_to_dense: float
    """Share of the loss recovered against mean ablation in the dense model."""
    dead_reads: int
    """Channels of the sparse read that are zero at every held-out token."""


class Moments:
    """Sums over tokens from which NMSE and explained variance follow exactly, whatever the batches."""

    def __init__(self) -> None:
        self.n = 0
        self.error2 = self.target2 = torch.zeros((), dtype=torch.float64)
        self.error = self.target = torch.zeros((), dtype=torch.float64)

    def add(self, prediction: Float[Tensor, "batch pos d"], target: Float[Tensor, "batch pos d"]) -> None:
        error, target = (x.double().flatten(0, 1).cpu() for x in (prediction - target, target))
        self.n += len(target)
        self.error2, self.target2 = self.error2 + error.square().sum(), self.target2 + target.square().sum()
        self.error, self.target = self.error + error.sum(0), self.target + target.sum(0)

    def nmse(self) -> float:
        return float(self.error2 / self._variance())

    def explained_variance(self) -> float:
        return float(1 - (self.error2 - self.error.square().sum() / self.n) / self._variance())

    def mean(self) -> Float[Tensor, " d"]:
        return (self.target / self.n).float()

    def _variance(self) -> Tensor:
        return self.target2 - self.target.square().sum() / self.n


RANDOM_PATHS = 64
RECOVERED = 0.8
"""Share of the loss that a hybrid should recover."""


class Bridged(NamedTuple):
    """What is evaluated."""

    dense: Sublayered
    sparse: SparseTransformer
    bridges: BridgeSet


@torch.no_grad()
def evaluate(
    dense: Sublayered,
    sparse: SparseTransformer,
    bridges: BridgeSet,
    blocks: Int[Tensor, "block pos"],
    *,
    batch_size: int = 32,
    progress: bool = True,
) -> dict:
    """The `dense`, `sparse` and `sites` parts of metrics.json, from held-out blocks of tokens. Changes no model."""
    with sparse_products(sparse):
        return _evaluate(dense, sparse, bridges, blocks, batch_size, progress)


def _evaluate(
    dense: Sublayered,
    sparse: SparseTransformer,
    bridges: BridgeSet,
    blocks: Int[Tensor, "block pos"],
    batch_size: int,
    progress: bool,
) -> dict:
    models = Bridged(dense, sparse, bridges)
    batches = [b.long().to(next(sparse.parameters()).device) for b in blocks.split(batch_size)]
    encode, decode = _measure_bridges(
        models, progress_bar(batches, "evaluate: bridges", leave=False, disable=not progress)
    )
    bar = progress_bar(batches, "evaluate: hybrids", leave=False, disable=not progress)
    means = _measure_hybrids(models, bar, encode, decode)
    report = sparsity_report(sparse, batches)
    sites = []
    for site, mean in zip(all_sites(sparse.n_layers), means, strict=True):
        i = site.index

        def recovered(way: str, side: str, mean: dict[str, float] = mean) -> float:
            return (mean[f"ablated_{side}"] - mean[f"ce_{way}"]) / (mean[f"ablated_{side}"] - mean[side])

        sites.append(
            SiteReport(
                site=i,
                label=site.label,
                nmse_encode=encode[i].nmse(),
                nmse_decode=decode[i].nmse(),
                explained_variance_encode=encode[i].explained_variance(),
                explained_variance_decode=decode[i].explained_variance(),
                **{n: mean[n] for n in mean if n.startswith(("kl_", "ce_"))},
                recovered_dense_to_sparse=recovered("dense_to_sparse", "sparse"),
                recovered_sparse_to_dense=recovered("sparse_to_dense", "dense"),
                dead_reads=report["dead_channels"][site.read_hook],
            )._asdict()
        )
    return {
        "held_out_tokens": int(sum(b.numel() for b in batches)),
        "dense": {"ce": means[0]["dense"]},
        "sparse": {"ce": means[0]["sparse"], **report},
        "sites": sites,
        "paths": {"n": RANDOM_PATHS, "kl": random_paths_kl(models, batches)},
    }


def _measure_bridges(models: Bridged, batches: Iterable[Tensor]) -> tuple[list[Moments], list[Moments]]:
    """Errors of every encoder and decoder."""
    dense, sparse, bridges = models
    n_sites = bridges.n_sites
    encode, decode = [Moments() for _ in range(n_sites)], [Moments() for _ in range(n_sites)]
    for tokens in batches:
        h_dense, h_sparse = residuals(dense, tokens), residuals(sparse, tokens)
        for site in range(n_sites):
            encode[site].add(bridges.encode(site, h_dense[site]), h_sparse[site])
            decode[site].add(bridges.decode(site, h_sparse[site]), h_dense[site])
    return encode, decode


def _measure_hybrids(
    models: Bridged, batches: Iterable[Tensor], encode: list[Moments], decode: list[Moments]
) -> list[dict[str, float]]:
    """Per site, means over tokens of the models' own losses, the hybrids' KLs and losses, and the ablated losses."""
    dense, sparse, bridges = models
    sums = [defaultdict[str, float](float) for _ in range(bridges.n_sites)]
    count = 0
    for tokens in batches:
        count += len(tokens)
        h_dense, h_sparse = residuals(dense, tokens), residuals(sparse, tokens)
        target = dense.unembed(h_dense[-1], tokens)
        measured = {
            "dense": next_token_loss(target, tokens),
            "sparse": next_token_loss(sparse.unembed(h_sparse[-1], tokens), tokens),
        }
        for i in range(bridges.n_sites):
            to_sparse = suffix(sparse, i, bridges.encode(i, h_dense[i]), tokens)
            to_dense = suffix(dense, i, bridges.decode(i, h_sparse[i]), tokens)
            values = measured | {
                "kl_dense_to_sparse": kl(target, to_sparse),
                "kl_sparse_to_dense": kl(target, to_dense),
                "ce_dense_to_sparse": next_token_loss(to_sparse, tokens),
                "ce_sparse_to_dense": next_token_loss(to_dense, tokens),
                "ablated_sparse": _ablated_loss(sparse, i, encode[i].mean(), h_sparse[i], tokens),
                "ablated_dense": _ablated_loss(dense, i, decode[i].mean(), h_dense[i], tokens),
            }
            for name, value in values.items():
                sums[i][name] += float(value) * len(tokens)
    return [{name: total / count for name, total in site.items()} for site in sums]


@torch.no_grad()
def random_paths_kl(models: Bridged, batches: list[Tensor], n: int = RANDOM_PATHS) -> float:
    """Mean KL of the dense model's output to that of n random mixed paths, each on one of the batches in turn, nats."""
    rng = np.random.default_rng(0)
    paths = [random_path(models.bridges.n_sites, rng) for _ in range(n)]
    kls = [0.0] * n
    for first, tokens in enumerate(batches[:n]):
        target = suffix(models.dense, 0, models.dense.embed(tokens), tokens)  # once for all paths on the batch
        for i in range(first, n, len(batches)):
            kls[i] = float(kl(target, mixed_path(*models, tokens, paths[i])))
    return sum(kls) / n


def _ablated_loss(
    model: Sublayered, site: int, mean: Float[Tensor, " d"], like: Tensor, tokens: Int[Tensor, "batch pos"]
) -> Tensor:
    resid = mean.to(like).expand_as(like)
    return next_token_loss(suffix(model, site, resid, tokens), tokens)


def sparsity_report(sparse: SparseTransformer, batches: list[Tensor]) -> dict:
    """Real nonzero fractions, mean activation L0 per location, and dead neurons."""
    counts = count_nonzeros(sparse.sparse_parameters(1.0))
    names = [
        f"blocks.{layer}.{part}"
        for layer in range(sparse.n_layers)
        for part in ("attn.hook_in", "attn.hook_q", "attn.hook_k", "attn.hook_v", "hook_attn_out",
                     "mlp.hook_in", "mlp.hook_post", "hook_mlp_out")
    ] + ["ln_final.hook_normalized"]  # fmt: skip
    active = dict.fromkeys(names, 0.0)
    alive: dict[str, Tensor] = {}
    for tokens in batches:
        _, cache = sparse.run_with_cache(tokens, names_filter=names)
        for name in names:
            on = (cache[name] != 0).flatten(2)
            active[name] += float(on.sum())
            alive[name] = alive.get(name, torch.zeros(1, dtype=torch.bool)) | on.flatten(0, 1).any(0).cpu()
    n_tokens = sum(b.numel() for b in batches)
    return {
        "nonzero_fraction": sum(c.nonzeros for c in counts) / sum(c.entries for c in counts),
        "nonzeros": sum(c.nonzeros for c in counts),
        "matrices": {c.name: {"nonzeros": c.nonzeros, "fraction": c.fraction} for c in counts},
        "activation_l0": {name: active[name] / n_tokens for name in names},
        "dead_channels": {name: int((~alive[name]).sum()) for name in names},
    }


_COLUMNS = (
    ("NMSE", "d>s", "nmse_encode"), ("", "s>d", "nmse_decode"),
    ("EV", "d>s", "explained_variance_encode"), ("", "s>d", "explained_variance_decode"),
    ("KL", "d>s", "kl_dense_to_sparse"), ("", "s>d", "kl_sparse_to_dense"),
    ("CE", "d>s", "ce_dense_to_sparse"), ("", "s>d", "ce_sparse_to_dense"),
    ("kept", "d>s", "recovered_dense_to_sparse"), ("", "s>d", "recovered_sparse_to_dense"),
)  # fmt: skip
_LEGEND = (
    "d>s: from the dense model into the sparse one (encoder), s>d: back (decoder). NMSE: a bridge's error, 0 is "
    "perfect, 1 no better than the mean. EV: explained variance, 1 is perfect. KL, CE: nats per token of the model "
    "that changes over at the site, KL from the dense model, 0 is perfect. kept: share of the loss that it recovers, "
    "1 is perfect, 0 carries nothing. dead: channels that the next sublayer never reads."
)


def evaluation_table(metrics: dict) -> str:
    """The per-site table as text, with what its columns are and a verdict."""
    rows = [["site", "reader", *(group for group, _, _ in _COLUMNS), "dead"]]
    rows += [["", "", *(way for _, way, _ in _COLUMNS), ""]]
    for site in metrics["sites"]:
        values = [f"{site[key]:.3f}" for _, _, key in _COLUMNS]
        rows.append([str(site["site"]), site["label"], *values, str(site["dead_reads"])])
    n = len(metrics["sites"])
    rows.append(["", "mean", *(f"{sum(s[key] for s in metrics['sites']) / n:.3f}" for _, _, key in _COLUMNS), ""])
    sparse, text = metrics["sparse"], metrics.get("held_out_text")
    dead = sum(v for k, v in sparse["dead_channels"].items() if k.endswith("hook_post"))
    of = f" of {text}" if text else ""
    totals = (
        f"dense CE {metrics['dense']['ce']:.4f}, sparse CE {sparse['ce']:.4f} on {metrics['held_out_tokens']} held-out "
        f"tokens{of}; {sparse['nonzeros']} nonzero weights, 1 in {1 / sparse['nonzero_fraction']:.1f}; {dead} dead "
        f"neurons; KL of {metrics['paths']['n']} random mixed paths {metrics['paths']['kl']:.3f}"
    )
    return "\n".join([table(rows, left=2), *map(paragraph, (totals, _LEGEND, evaluation_verdict(metrics)))])


def evaluation_verdict(metrics: dict) -> str:
    """Whether the bridges carry the models' loss, in words."""
    weak = [
        f"{site['label']} {way} ({site[key]:.2f})"
        for site in metrics["sites"]
        for way, key in (("d>s", "recovered_dense_to_sparse"), ("s>d", "recovered_sparse_to_dense"))
        if not site[key] >= RECOVERED
    ]
    if not weak:
        return f"good: at every site at least {RECOVERED:g} of the loss is kept, both ways"
    return f"weak: less than {RECOVERED:g} of the loss is kept at {', '.join(weak)}; more --steps train them further"

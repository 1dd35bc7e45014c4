"""The sparse model's activations on any text, from the sparse model itself or as the encoders read them off the dense.

`source="sparse"`: the sparse model runs on the text. `source="encoder"`: at every site the encoder turns the dense
model's stream into a sparse one, and the sublayer that reads there runs on it: each sublayer's activations are what
the dense stream in front of it says.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens import ActivationCache

from bridges.run_folder import Run
from bridges.sites import Site, all_sites
from interventions.bundle.bundle import get_bundle
from interventions.bundle.channels import Channel, resolve, without_gain
from sparse_model.model.node_names import parse_node
from sparse_model.model.text import Prompts

Source = Literal["sparse", "encoder"]


class TopChannels(NamedTuple):
    """The channels of a read with the largest |activation| at each token, the largest first."""

    indices: Int[Tensor, "batch pos k"]
    values: Float[Tensor, "batch pos k"]


@torch.no_grad()
def sparse_cache(dense: nn.Module, prompts: Prompts, *, source: Source = "sparse") -> ActivationCache:
    """All activations of the sparse model on a batch of texts (or tokens), by TransformerLens' hook names.

    Each text begins with end-of-text, and shorter ones are padded with it on the right.

    Raises ValueError for a text that does not fit into the context, and for a model without a run.
    """
    run: Run = get_bundle(dense).run
    tokens = run.sparse.to_tokens(prompts).to(run.sparse.W_E.device)
    values: dict[str, Tensor] = {}
    with _keeping(run.sparse, values):
        if source == "sparse":
            run.sparse(tokens)
        elif source == "encoder":
            _run_on_encoded(run, tokens)
        else:
            raise ValueError(f"source={source!r}: use sparse or encoder")
    return ActivationCache(values, run.sparse)


def _run_on_encoded(run: Run, tokens: Int[Tensor, "batch pos"]) -> None:
    resid = run.dense.embed(tokens)
    for i in range(2 * run.dense.n_layers):
        run.sparse.sublayer(i, run.bridges.encode(i, resid.float()))
        resid = run.dense.sublayer(i, resid)
    run.sparse.unembed(run.bridges.encode(2 * run.dense.n_layers, resid.float()), tokens)


@contextmanager
def _keeping(sparse: Any, values: dict[str, Tensor]) -> Iterator[None]:
    """Write every activation into `values` meanwhile."""

    def keep(value: Tensor, hook: Any) -> None:
        values[hook.name] = value.detach()

    with sparse.hooks(fwd_hooks=[(lambda name: True, keep)]):
        yield


@torch.no_grad()
def activations(
    dense: nn.Module, prompts: Prompts, place: str | int | Channel, *, source: Source = "sparse"
) -> Float[Tensor, "batch pos *width"]:
    """Activations on a batch of texts: of all channels of a site's read, of one node, or of a named channel.

    place: a site's index or label ("mlp.0", "unembed"), a node ("0.mlp.post_act.3", "attn.1.read.7"), or a channel.
    Reads are in the unit of `intervene`: after RMSNorm and AbsTopK, before the norm's gain. Nodes are as they are.

    Raises KeyError for an unknown place, ValueError for one out of range, and what `sparse_cache` raises.
    """
    bundle = get_bundle(dense)
    sparse, cache = bundle.run.sparse, sparse_cache(dense, prompts, source=source)
    labels = {site.label: site.index for site in all_sites(sparse.n_layers)}
    if isinstance(place, str) and place not in labels:
        if place[0].isdigit():
            node = parse_node(place, sparse.cfg)
            values = cache[node.hooks[0]]
            return values[..., node.channel] if node.head is None else values[..., node.head, node.channel]
        place = resolve(place, bundle.channels, bundle.shape)
    if isinstance(place, Channel):
        return place.value(_reads(sparse, cache, place.site))
    return _reads(sparse, cache, labels[place] if isinstance(place, str) else place)


def _reads(sparse: Any, cache: ActivationCache, site: int) -> Float[Tensor, "batch pos d_sparse"]:
    return without_gain(sparse, site, cache[Site(site, sparse.n_layers).read_hook])


def top_channels(
    dense: nn.Module, prompts: Prompts, site: int | str, *, count: int = 8, source: Source = "sparse"
) -> TopChannels:
    """The channels of a site's read with the largest |activation| at every token. Raises what `activations` raises."""
    reads = activations(dense, prompts, site, source=source)
    indices = reads.abs().topk(min(count, reads.shape[-1]), dim=-1).indices
    return TopChannels(indices, reads.gather(-1, indices))

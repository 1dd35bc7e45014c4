"""The weight projection of parameters that are cut along their first axis over several processes.

The threshold search (`sparse_model.sparsity.topk_torch`) works on counts, so that all the processes exchange is counts:
256 for each of four digits, and one per neuron and bit where neurons are columns. Every process finds its part of the
very mask that `projection_mask` gives for the whole parameter.
"""

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor

from sparse_model.sparsity.projection import NeuronAxis, check_minimum
from sparse_model.sparsity.topk import magnitude_bits
from sparse_model.sparsity.topk_torch import Shards, flat_masks, forced_masks


def process_shards(group: dist.ProcessGroup | None = None) -> Shards:
    """The processes of a group, by default all, as holders of a tensor's parts."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)

    def total(counts: Tensor) -> Tensor:
        counts = counts.clone()
        dist.all_reduce(counts, group=group)
        return counts

    def before(counts: Tensor) -> Tensor:
        by_rank = counts.new_zeros(size, *counts.shape)
        by_rank[rank] = counts
        return total(by_rank)[:rank].sum(0)

    return Shards(total, before)


def sharded_projection_mask(
    shard: Float[Tensor, "*shape"],
    k: int,
    *,
    min_per_neuron: int = 0,
    neuron_axis: NeuronAxis = None,
    group: dist.ProcessGroup | None = None,
) -> Bool[Tensor, "*shape"]:
    """This process' part of the mask of the k entries to keep of a parameter cut along its first axis.

    Called by every process of the group. Raises ValueError for a k that the parameter does not hold or that cannot hold
    the minimum, as `projection_mask` does.
    """
    shards = process_shards(group)
    bits = magnitude_bits(shard)
    rows = int(shards.total(torch.tensor([len(shard)], device=shard.device))[0])
    j = check_minimum((rows, *shard.shape[1:]), k, min_per_neuron, neuron_axis)
    if j == 0 or neuron_axis is None:
        return flat_masks(bits.reshape(1, -1), k, shards).view(shard.shape)
    return forced_masks(bits[None], k, j, neuron_axis, shards)[0]

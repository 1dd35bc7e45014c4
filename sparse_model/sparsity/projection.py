"""Top-k weight projection with a minimum per neuron, and the annealing of the kept fraction (paper 2.1, A.1).

After every optimizer step each matrix and bias keeps only its largest-magnitude entries:

1. budget K = round(fraction * entries), at least 1;
2. no neuron or attention channel may be left with fewer than j nonzeros: the j largest of each are forced in;
3. the rest of the budget goes to the largest of the others, ties to the lower index.

This is the set of largest total magnitude among all sets of K entries that respect step 2. A neuron is a row of a
matrix that reads the residual stream (q, k, v, MLP in) and a column of one that writes it (attention out, MLP out);
embeddings, unembedding and biases have no minimum.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sparse_model.config import SparsityConfig
from sparse_model.sparsity.topk import check_k, magnitude_bits, top_mask_flat, top_mask_forced
from sparse_model.sparsity.topk_torch import flat_masks, forced_masks

NeuronAxis = Literal["row", "column"] | None

# Entries projected together: the working copies of as many take two gigabytes.
_MOST_TOGETHER = 1 << 27


class SparseParameter(NamedTuple):
    """One parameter under projection."""

    name: str
    """Name in the model's state dict."""
    tensor: nn.Parameter
    """The parameter itself."""
    fraction: float
    """Fraction of entries kept at the end of annealing."""
    neuron_axis: NeuronAxis
    """What counts as a neuron for the minimum j; None where there is no minimum."""


def budget(n_entries: int, fraction: float) -> int:
    """Number of entries kept of n_entries: round(fraction * n_entries), at least one."""
    return max(1, round(n_entries * fraction))


def projection_mask(
    weight: Float[Tensor, "*shape"], k: int, *, min_per_neuron: int = 0, neuron_axis: NeuronAxis = None
) -> Bool[Tensor, "*shape"]:
    """Mask of the k entries to keep; exactly k are true, and at least min_per_neuron in every row or column.

    Raises NotFiniteError for NaN (CPU), ValueError for k outside 0 .. numel and for a k that cannot hold the minimum,
    naming the smallest one that can.
    """
    j = check_minimum(weight.shape, k, min_per_neuron, neuron_axis)
    if j == 0 or neuron_axis is None:
        return top_mask_flat(weight.detach().reshape(-1), k).view(weight.shape)
    return top_mask_forced(weight.detach(), k, j, neuron_axis)


def check_minimum(shape: Sequence[int], k: int, min_per_neuron: int, neuron_axis: NeuronAxis) -> int:
    """The minimum per neuron of a parameter of this shape: at most a neuron's inputs, 0 where there are no neurons.

    Raises ValueError for a k outside 0 .. entries or too small for it.
    """
    entries = math.prod(shape)
    check_k(k, entries)
    if neuron_axis is None:
        return 0
    neurons, inputs = shape if neuron_axis == "row" else reversed(shape)
    j = min(min_per_neuron, inputs)
    if j * neurons > k:
        raise ValueError(
            f"a budget of {k} nonzeros cannot hold {j} for each of {neurons} neurons of a {tuple(shape)} matrix: "
            f"keep at least {j * neurons} (fraction {j * neurons / entries:.6g}) or lower min_per_neuron"
        )
    return j


@torch.no_grad()
def project_(parameters: list[SparseParameter], config: SparsityConfig, progress: float = 1.0) -> None:
    """Zero all but the kept entries of every parameter, in place, at a point `progress` in 0 .. 1 of training.

    On the CPU one after the other; elsewhere those of one shape and rule together, because launches are what costs.
    """
    groups: dict[tuple, list[Tensor]] = defaultdict(list)
    for p in parameters:
        fraction = annealed_fraction(p.fraction, config, progress)
        if fraction < 1:
            rule = p.tensor.shape, p.tensor.dtype, budget(p.tensor.numel(), fraction), p.neuron_axis
            groups[rule].append(p.tensor)
    for (shape, _, k, axis), tensors in groups.items():
        if tensors[0].device.type != "cpu":
            most = max(1, _MOST_TOGETHER // math.prod(shape))
            for start in range(0, len(tensors), most):
                project_together_(tensors[start : start + most], k, config.min_per_neuron, axis)
            continue
        for tensor in tensors:
            mask = projection_mask(tensor, k, min_per_neuron=config.min_per_neuron, neuron_axis=axis)
            tensor.masked_fill_(~mask, 0)


@torch.no_grad()
def project_together_(tensors: list[Tensor], k: int, min_per_neuron: int, neuron_axis: NeuronAxis) -> None:
    """Project tensors of one shape, each onto k entries, in the launches of one and without waiting for the device."""
    j = check_minimum(tensors[0].shape, k, min_per_neuron, neuron_axis)
    stack = torch.stack(tensors)
    bits = magnitude_bits(stack)
    if j == 0 or neuron_axis is None:
        mask = flat_masks(bits.flatten(1), k).view(stack.shape)
    else:
        mask = forced_masks(bits, k, j, neuron_axis)
    torch._foreach_copy_(tensors, list(torch.where(mask, stack, 0)))


def smallest_budget(p: SparseParameter, config: SparsityConfig) -> int:
    """The smallest number of nonzeros that leaves min_per_neuron in every neuron of this parameter."""
    if p.neuron_axis is None:
        return 1
    neurons, inputs = p.tensor.shape if p.neuron_axis == "row" else reversed(p.tensor.shape)
    return neurons * min(config.min_per_neuron, inputs)


def check_budgets(parameters: list[SparseParameter], config: SparsityConfig) -> None:
    """Raise ValueError for the first parameter whose final budget cannot hold the minimum per neuron."""
    for p in parameters:
        k, need = budget(p.tensor.numel(), p.fraction), smallest_budget(p, config)
        if p.neuron_axis is not None and k < need:
            neurons = p.tensor.shape[0 if p.neuron_axis == "row" else 1]
            raise ValueError(
                f"nonzero_fraction={p.fraction:g} leaves {k} of {p.tensor.numel()} entries of {p.name}, but "
                f"min_per_neuron={config.min_per_neuron} needs {need}: raise the fraction to at least "
                f"{need / p.tensor.numel():.6g} or lower min_per_neuron to {k // neurons}"
            )


def annealed_fraction(final: float, config: SparsityConfig, progress: float) -> float:
    """Kept fraction at `progress` (share of all steps done, 0 .. 1), from 1 down to `final`.

    Flat at 1 until `anneal_start`, then linear in progress ("linear", the paper's) or linear in its logarithm
    ("log"), flat at `final` from `anneal_stop` on.
    """
    start, stop = config.anneal_start, config.anneal_stop
    if progress >= stop:
        return final
    if progress <= start:
        return 1.0
    share = (progress - start) / (stop - start)
    if config.anneal == "linear":
        return 1 + share * (final - 1)
    return math.exp(share * math.log(final))


def annealed_topk(final: float, config: SparsityConfig, progress: float) -> float:
    """Share that AbsTopK keeps at `progress`: from 1, linearly in its logarithm, to `final` at topk_anneal_stop."""
    if progress >= config.topk_anneal_stop:
        return final
    return final ** (progress / config.topk_anneal_stop)


class NonzeroCount(NamedTuple):
    """Real sparsity of one parameter."""

    name: str
    nonzeros: int
    entries: int

    @property
    def fraction(self) -> float:
        return self.nonzeros / self.entries


def count_nonzeros(parameters: list[SparseParameter]) -> list[NonzeroCount]:
    """Nonzeros of every parameter under projection."""
    return [NonzeroCount(p.name, int(p.tensor.count_nonzero()), p.tensor.numel()) for p in parameters]


def prove_sparsity(parameters: list[SparseParameter], config: SparsityConfig) -> list[NonzeroCount]:
    """Count the nonzeros of a finished model and check them against its budgets.

    Raises ValueError, naming the parameter, where one has more nonzeros than its budget or a neuron has fewer than
    min_per_neuron.
    """
    counts = count_nonzeros(parameters)
    for p, count in zip(parameters, counts, strict=True):
        allowed = budget(count.entries, p.fraction)
        if count.nonzeros > allowed:
            raise ValueError(f"{p.name} has {count.nonzeros} nonzeros, its budget is {allowed}")
        if p.neuron_axis is not None:
            axis = 1 if p.neuron_axis == "row" else 0
            j = min(config.min_per_neuron, p.tensor.shape[axis])
            fewest, neuron = p.tensor.count_nonzero(axis).min(0)
            if fewest < j:
                raise ValueError(f"neuron {int(neuron)} of {p.name} has {int(fewest)} nonzeros, fewer than {j}")
    return counts

"""How far back the heads of a circuit look: their attention from the last prompt token, and what it would be if some
tokens stood in the prompt more often."""

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interventions.circuits.node_model import NodeEdit, NodeModel, Values, device_of
from interventions.tasks.base import TaskBatch, since_difference
from sparse_model.model.transformer import SparseTransformer

Head = tuple[int, int]
"""Layer and head."""


class Look(NamedTuple):
    """A head's attention weights from the last prompt token; means over both members of all pairs."""

    first: float
    """On the first token in which the members of a pair differ, or another that was asked for."""
    rest: float
    """On each other token, the last itself among them."""
    uneven: float
    """Half the sum over the n tokens of |weight - 1/n|: 0 for an even average, near 1 for one token alone."""


@torch.no_grad()
def looks(
    model: NodeModel,
    heads: Iterable[Head],
    batch: TaskBatch,
    edit: NodeEdit | None = None,
    onto: Int[Tensor, " pair"] | None = None,
) -> dict[Head, Look]:
    """Where heads look from the last prompt token, in the whole model or with its nodes edited.

    onto: a position in each pair, in place of the first in which its prompts differ.
    """
    wanted, shape, device = sorted(set(heads)), model.shape, device_of(model)
    queries_and_keys: dict[str, Values] = {}
    names = {f"blocks.{layer}.attn.hook_{part}" for layer, _ in wanted for part in "qk"}

    def note(name: str, values: Values) -> Values:
        values = values if edit is None else edit(name, values)
        if name in names:
            queries_and_keys[name] = values
        return values

    model.visit(batch.tokens.flatten(0, 1).to(device), note)
    last = batch.last.repeat_interleave(2).to(device)
    first = (first_differences(batch) if onto is None else onto).repeat_interleave(2).to(device)
    found = {}
    for layer, head in wanted:
        span = slice(head * shape.d_head, (head + 1) * shape.d_head)
        q, k = (queries_and_keys[f"blocks.{layer}.attn.hook_{part}"][..., span].float() for part in "qk")
        weights = _from_last(model, layer, head, q, k, last)
        on_first = weights.gather(1, first[:, None])[:, 0]
        others = (weights.sum(1) - on_first) / last.clamp(min=1)
        even = (torch.arange(weights.shape[1], device=device) <= last[:, None]) / (last[:, None] + 1)
        uneven = (weights - even).abs().sum(1) / 2
        found[layer, head] = Look(float(on_first.mean()), float(others.mean()), float(uneven.mean()))
    return found


def first_differences(batch: TaskBatch) -> Int[Tensor, " pair"]:
    """Position of the first token in which the two members of each pair differ."""
    return since_difference(batch.tokens[:, 0], batch.tokens[:, 1], batch.last).int().argmax(1)


def _from_last(
    model: NodeModel,
    layer: int,
    head: int,
    q: Float[Tensor, "row pos channel"],
    k: Float[Tensor, "row pos channel"],
    last: Int[Tensor, " row"],
) -> Float[Tensor, "row pos"]:
    """Attention weights from each row's last token."""
    at_last = q[torch.arange(len(q), device=q.device), last]
    scores = torch.einsum("rc,rpc->rp", at_last, k) * _scale(model, layer)
    scores = scores.masked_fill(torch.arange(k.shape[1], device=q.device) > last[:, None], -math.inf)
    module = model.module
    sink = module.blocks[layer].attn.sink_logit if isinstance(module, SparseTransformer) else None
    if sink is None:
        return scores.softmax(1)
    return torch.cat([scores, sink[head].to(scores).expand(len(scores), 1)], 1).softmax(1)[:, :-1]


def _scale(model: NodeModel, layer: int) -> float:
    """What scores are multiplied by; some GPT-2s do it in another way."""
    config = getattr(model.module, "config", None)
    scale = model.shape.d_head**-0.5 if getattr(config, "scale_attn_weights", True) else 1.0
    return scale / (layer + 1) if getattr(config, "scale_attn_by_inverse_layer_idx", False) else scale


@contextmanager
def as_if_repeated(
    model: NodeModel, times: Float[Tensor, "row pos"], heads: Iterable[Head] | None = None
) -> Iterator[None]:
    """Within it some heads (None: all) attend as if each token stood in its prompt `times` times.

    Attention is a sum over tokens, so a token that stands there m times gets log m on its score. In a model without
    positions this is what m equal copies side by side do, if what they hold is the same. A sparse model or a GPT-2.
    """
    log_times = times.to(device_of(model)).log()
    wanted = None if heads is None else set(heads)
    with ExitStack() as stack:
        for layer in range(model.shape.n_layers):
            chosen = [h for h in range(model.shape.n_heads) if wanted is None or (layer, h) in wanted]
            if chosen:
                stack.enter_context(_added_to_scores(model, layer, chosen, log_times))
        yield


@contextmanager
def _added_to_scores(
    model: NodeModel, layer: int, heads: list[int], amount: Float[Tensor, "row pos"]
) -> Iterator[None]:
    module: Any = model.module
    if isinstance(module, SparseTransformer):

        def add(scores: Tensor, hook: Any) -> Tensor:
            scores = scores.clone()
            scores[:, heads] += amount[:, None, None]
            return scores

        with module.hooks(fwd_hooks=[(f"blocks.{layer}.attn.hook_attn_scores", add)]):
            yield
        return
    if getattr(getattr(module, "config", None), "model_type", "") != "gpt2":
        raise ValueError(f"tokens of a {type(module).__name__} cannot be repeated: give a sparse model or a GPT-2")
    mask = torch.full((amount.shape[1], amount.shape[1]), -math.inf, device=amount.device).triu(1)
    mask = mask.expand(len(amount), model.shape.n_heads, -1, -1).clone()
    mask[:, heads] += amount[:, None, None]
    attention = module.transformer.h[layer].attn
    handle = attention.register_forward_pre_hook(partial(_mask_with, mask), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _mask_with(mask: Tensor, module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
    return inputs, named | {"attention_mask": mask}

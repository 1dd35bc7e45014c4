"""Roles in bracket counting, the law of dilution, and what both come to on longer lists."""

from collections.abc import Sequence
from typing import Any

import torch
from bracket_prompts import SHORT, batches, margins, margins_of, times
from carriers import (
    all_heads,
    carriers,
    find_carriers,
    head_table,
    joined,
    one_node,
    share_of,
    strong,
    values_at,
    weight_between,
)
from jaxtyping import Float
from prediction_figures import agreement
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from interventions.circuits.attention import Head, as_if_repeated, first_differences, looks
from interventions.circuits.circuit import Circuit
from interventions.circuits.node_model import NodeModel, Values
from interventions.tasks.base import TaskBatch
from sparse_model.model.transformer import SparseTransformer

ByNumber = dict[int, TaskBatch]
_OPENERS = (("", ""), ("[", "[["), ("[[[", "[[["))


def find_roles(model: NodeModel, prompts: ByNumber, tokenizer: PreTrainedTokenizerFast, options: Any) -> dict[str, Any]:
    """Who does what, on selection prompts with three names; of a dense model the head alone."""
    batch = prompts[SHORT]
    right = margins(model, batch) * torch.tensor([-1.0, 1.0])
    roles: dict[str, Any] = {"pairs_right": float((right > 0).all(1).float().mean())}
    if not isinstance(model.module, SparseTransformer):
        heads = head_table(model, batch)
        return {**roles, "head": [int(part) for part in next(iter(heads)).split(".")], "heads": heads}
    roles |= find_carriers(model, batch, options.draws)
    for detector in roles["detectors"]:
        detector["values"] = _by_token(model, detector["place"], detector["channel"], batch)
    for inner in roles["inner"]:
        inner["values"] = _by_token(model, inner["place"], inner["channel"], batch)
    if roles["written"]:
        roles["depth"] = roles["written"][0]
        roles |= _readers(model, roles["depth"]["channel"], roles["head"][0], batch)
        roles["by_depth"] = _by_depth(model, roles["depth"], tokenizer, options)
        roles["curve"] = _curve(model, roles["depth"], batch)
    return roles


def _by_token(model: NodeModel, place: str, channel: int, batch: TaskBatch) -> dict[str, float]:
    """Mean of a channel at the two openers, and at the tokens behind and before them."""
    values, first = values_at(model, place, batch)[..., channel], first_differences(batch)
    pos = torch.arange(values.shape[-1])
    inside = (pos > first[:, None]) & (pos <= batch.last[:, None])
    at = values.gather(2, first[:, None, None].expand(-1, 2, 1))[..., 0].mean(0)
    both = values.mean(1)
    return {
        "[": float(at[0]),
        "[[": float(at[1]),
        "list": float(both[inside].mean()),
        "before": float(both[pos < first[:, None]].mean()),
        "last": float(both.gather(1, batch.last[:, None]).mean()),
    }


def _readers(model: NodeModel, channel: int, layer: int, batch: TaskBatch) -> dict[str, Any]:
    """What reads the depth channel: the MLPs from its layer on, their neurons, and the unembedding."""
    through, neurons = {}, []
    for later in range(layer, model.shape.n_layers):
        source, target = f"blocks.{later}.mlp.hook_in", f"blocks.{later}.mlp.hook_post"
        through[f"mlp.{later}"] = share_of(model, one_node(model, source, channel), batch)
        for found in strong(carriers(model, target, joined(model, source, target, out_of=[channel]), batch)):
            weight = weight_between(model, source, target)[found.channel, channel]
            neurons.append(
                {**found._asdict(), "weight": float(weight), "values": _by_token(model, target, found.channel, batch)}
            )
    flat, double = batch.answers[0].tolist()
    unembedding = model.module.unembedding.weight.detach()  # type: ignore[union-attr]
    return {
        "through": through,
        "neurons": neurons,
        "logit_weight": float(unembedding[double, channel] - unembedding[flat, channel]),
    }


def _by_depth(
    model: NodeModel, depth: dict[str, Any], tokenizer: PreTrainedTokenizerFast, options: Any
) -> dict[str, float]:
    """Mean of the depth channel at the last token by the number of brackets that are open; 0 and 3 no text has."""
    found: dict[str, float] = {}
    for openers in _OPENERS:
        of = batches(
            tokenizer,
            [SHORT],
            pairs=options.pairs,
            split="selection",
            seed=options.seed,
            n_ctx=model.shape.n_ctx,
            openers=openers,
        )
        at_last = at_last_token(values_at(model, depth["place"], of[SHORT])[..., depth["channel"]], of[SHORT])
        found |= {str(len(opener)): float(at_last[:, member].mean()) for member, opener in enumerate(openers)}
    return dict(sorted(found.items()))


def at_last_token(values: Float[Tensor, "pair 2 pos"], batch: TaskBatch) -> Float[Tensor, "pair 2"]:
    return values.gather(2, batch.last[:, None, None].expand(-1, 2, 1))[..., 0]


def _curve(model: NodeModel, depth: dict[str, Any], batch: TaskBatch, steps: int = 13) -> list[list[float]]:
    """(value, margin behind `[`, behind `[[`) with the depth channel put at a value at the last token."""
    written = at_last_token(values_at(model, depth["place"], batch)[..., depth["channel"]], batch).mean(0)
    low, high = float(written.min()), float(written.max())
    rows, last, points = torch.arange(2 * len(batch.last)), batch.last.repeat_interleave(2), []
    for value in torch.linspace(low - (high - low) / 2, high + (high - low) / 2, steps).tolist():

        def put(name: str, values: Values, value: float = value) -> Values:
            if name == depth["place"]:
                values = values.clone()
                values[rows, last, depth["channel"]] = value
            return values

        points.append([value, *margins(model, batch, put).mean(0).tolist()])
    return points


def predict(model: NodeModel, roles: dict[str, Any], prompts: ByNumber, circuit: Circuit | None) -> dict[str, Tensor]:
    """Margins [number, pair, 2] by law, from prompts with three names; the depth channel's values likewise."""
    batch, head = prompts[SHORT], (roles["head"][0], roles["head"][1])
    before = [other for other in all_heads(model) if other[0] < head[0]]
    laws: dict[str, Sequence[Head] | None] = {"all heads": None, "the head alone": [head], "layers before": before}
    laws |= {
        f"other {layer}.{number}": [(layer, number)] for layer, number in all_heads(model) if (layer, number) != head
    }
    found: dict[str, list[Tensor]] = {}
    base = margins(model, batch)
    length = batch.last + 1.0
    for number in sorted(prompts):
        counts = times(batch, SHORT, number)
        for law, heads in laws.items():
            with as_if_repeated(model, counts, heads):
                found.setdefault(law, []).append(margins(model, batch))
                if "depth" in roles and not law.startswith("other"):
                    found.setdefault(f"depth, {law}", []).append(_depth(model, roles, batch))
        half = (base[:, 1] - base[:, 0]) / 2 * length / (length + 2 * (number - SHORT))
        found.setdefault("even average", []).append(base.mean(1, keepdim=True) + torch.stack([-half, half], 1))
        found.setdefault("no dilution", []).append(base)
        if circuit is not None:
            with as_if_repeated(model, counts):
                logits = circuit.run(model, batch.tokens.flatten(0, 1))
            rows = torch.arange(len(logits))
            found.setdefault("the pruned circuit", []).append(
                margins_of(logits[rows, batch.last.repeat_interleave(2)], batch)
            )
    return {law: torch.stack(values) for law, values in found.items()}


def _depth(model: NodeModel, roles: dict[str, Any], batch: TaskBatch) -> Float[Tensor, "pair 2"]:
    return at_last_token(values_at(model, roles["depth"]["place"], batch)[..., roles["depth"]["channel"]], batch)


def measure(model: NodeModel, roles: dict[str, Any], prompts: dict[str, ByNumber]) -> dict[str, dict[str, Tensor]]:
    """By split: margins [number, pair, 2], the depth channel likewise, and where the head looks."""
    found = {}
    for split, by_number in prompts.items():
        of = [by_number[number] for number in sorted(by_number)]
        values = {"margins": torch.stack([margins(model, batch) for batch in of])}
        if "depth" in roles:
            values["depth"] = torch.stack([_depth(model, roles, batch) for batch in of])
        head = (roles["head"][0], roles["head"][1])
        seen = [looks(model, [head], batch)[head] for batch in of]
        even = [float((1 / (batch.last + 1.0)).mean()) for batch in of]
        values["looks"] = torch.tensor([[*look, one] for look, one in zip(seen, even, strict=True)])
        found[split] = values
    return found


def compare(
    predicted: dict[str, Tensor], measured: dict[str, dict[str, Tensor]], numbers: list[int], options: Any
) -> dict[str, Any]:
    """Figures of every law on evaluation prompts, three names left out; means by number of names."""
    others = [index for index, number in enumerate(numbers) if number != SHORT]
    truth = measured["evaluation"]["margins"]
    laws = {law: values for law, values in predicted.items() if not law.startswith(("other", "depth"))}
    figures: dict[str, Any] = {"numbers": numbers, "laws": {}}
    for law, values in laws.items():
        figures["laws"][law] = {
            **_figures(values[others], truth[others]),
            **_flips(values, numbers),
            "mean": values.mean(1).tolist(),
        }
    figures["measured"] = {
        split: {name: (v.mean(1) if v.ndim == 3 else v).tolist() for name, v in values.items()}
        for split, values in measured.items()
    }
    figures["flips"] = _flips(truth, numbers)
    figures["right"] = [float(((row * torch.tensor([-1.0, 1.0])) > 0).all(1).float().mean()) for row in truth]
    null = {
        law: _figures(values[others], truth[others]) for law, values in predicted.items() if law.startswith("other")
    }
    best = max(null, key=lambda law: null[law]["explained"], default=None)
    figures["other heads"] = {"best": best, **null[best]} if best else {}
    figures["other orders"] = _orders(laws["all heads"][others], truth[others], options)
    if "depth" in measured["evaluation"]:
        depth = measured["evaluation"]["depth"][others]
        for law in (law for law in predicted if law.startswith("depth")):
            values = predicted[law]
            figures["laws"][law] = {**_figures(values[others], depth), "mean": values.mean(1).tolist()}
    return figures


def _figures(predicted: Float[Tensor, "number pair 2"], measured: Float[Tensor, "number pair 2"]) -> dict[str, float]:
    found = agreement(predicted, measured, ranks=False)
    left = ((measured - predicted) ** 2).sum() / ((measured - measured.mean()) ** 2).sum().clamp(min=1e-30)
    gaps = predicted.diff(dim=2), measured.diff(dim=2)
    return {
        "correlation": found["correlation"],
        "slope": found["slope"],
        "explained": float(1 - left),
        "same_sign": found["same_sign"],
        "gap_correlation": agreement(*gaps, ranks=False)["correlation"],
    }


def _flips(margin: Float[Tensor, "number pair 2"], numbers: list[int]) -> dict[str, float | None]:
    """At how many names, from three up, the mean margin changes its sign: behind `[` and behind `[[`."""
    mean = margin.mean(1)
    return {
        opener: _crossing(mean[:, member], numbers, sign)
        for member, opener, sign in ((0, "flip [", -1), (1, "flip [[", 1))
    }


def _crossing(values: Float[Tensor, " number"], numbers: list[int], sign: int) -> float | None:
    start = numbers.index(SHORT)
    signed = (sign * values).tolist()
    if signed[start] <= 0:
        return float(SHORT)
    for index in range(start, len(numbers) - 1):
        here, there = signed[index], signed[index + 1]
        if there <= 0:
            return numbers[index] + (numbers[index + 1] - numbers[index]) * here / (here - there)
    return None


def _orders(predicted: Tensor, measured: Tensor, options: Any) -> dict[str, float]:
    """Correlations with the foretold numbers of names in another order."""
    generator = torch.Generator().manual_seed(options.seed)
    drawn = [
        agreement(predicted[torch.randperm(len(predicted), generator=generator)], measured, ranks=False)["correlation"]
        for _ in range(50 * options.draws)
    ]
    return {"mean": sum(drawn) / len(drawn), "largest": max(drawn)}

"""How well numbers tell two kinds of tokens apart, and a logistic probe to compare with."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interventions.steering.logistic import logistic

_PENALTIES = (1e-4, 1e-2, 1.0)
_STEPS = 60


def auc(inside: Float[Tensor, " n"], rest: Float[Tensor, " m"]) -> float:
    """P(a value inside is larger than one of the rest), ties counting half."""
    order = rest.sort().values
    below, up_to = (torch.searchsorted(order, inside.contiguous(), side=side) for side in ("left", "right"))
    return float((below + up_to).double().mean() / (2 * len(rest)))


def best_threshold(values: Float[Tensor, " n"], inside: Bool[Tensor, " n"]) -> float:
    """The value from which on tokens are to be called inside for the largest F1; of equal ones the largest."""
    order = values.argsort(descending=True, stable=True)
    values, hits = values[order], inside[order].cumsum(0)
    last = torch.cat([values[1:] != values[:-1], torch.tensor([True])])  # equal values are called alike
    called = torch.arange(1, len(values) + 1)
    f1 = torch.where(last, 2 * hits / (called + inside.sum()), -1.0)
    return float(values[int(f1.argmax())])


class Logistic:
    """A logistic regression with a quadratic penalty, on features of mean 0 and deviation 1."""

    def __init__(self, features: Float[Tensor, "n d"], inside: Bool[Tensor, " n"], penalty: float) -> None:
        self.mean, self.std = features.mean(0), features.std(0).clamp(min=1e-6)
        scaled = (features - self.mean) / self.std
        self.weight, self.bias = logistic(scaled, inside.to(scaled), penalty / features.shape[1], steps=_STEPS)

    def __call__(self, features: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """The log-odds of being inside."""
        return (features - self.mean) / self.std @ self.weight + self.bias


class Probe(NamedTuple):
    """A logistic regression, and what it says of the tokens that it was fitted to when it is fitted to others."""

    model: Logistic
    left_out: Float[Tensor, " n"]


def fit_probe(features: Float[Tensor, "n d"], inside: Bool[Tensor, " n"]) -> Probe:
    """A probe with the penalty of the largest AUC on either half of the tokens when the other half is fitted."""
    middle = len(inside) // 2
    halves = [slice(0, middle), slice(middle, None)]
    tried = []
    for penalty in _PENALTIES:
        models = [Logistic(features[half], inside[half], penalty) for half in halves]
        left_out = torch.cat([models[1](features[halves[0]]), models[0](features[halves[1]])])
        tried.append((auc(left_out[inside], left_out[~inside]), penalty, left_out))
    _, penalty, left_out = max(tried, key=lambda one: one[0])
    return Probe(Logistic(features, inside, penalty), left_out)

"""What a caller may give for an amount, a vector, a site or tokens: every reasonable spelling, or one sentence."""

import math
import operator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bridges.sites import Site, all_sites
from interventions.bundle.channels import Channel, SparseShape
from sparse_model.model.lengths import check_length

LARGEST = torch.finfo(torch.float32).max


def number(name: str, given: Any) -> int | float:
    """One finite number, from Python, NumPy or a tensor without dimensions."""
    value = given
    if isinstance(given, Tensor | np.ndarray | np.generic) and not given.ndim:
        if isinstance(given, Tensor) and given.requires_grad:
            raise ValueError(f"{name} is a tensor that asks for a gradient: give a number, and scale a vector instead")
        value = given.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name}={given!r} is no number: give an int or a float")
    # Beyond the largest float32 it would become infinite in the model.
    if not abs(value) <= LARGEST:
        raise ValueError(f"{name}={value} is not finite, or too large for float32 ({LARGEST:.2g}): give a smaller one")
    return value


def amount(name: str, given: Any) -> int | float | Tensor:
    """One number, or one for each row of the batch as a tensor [batch]."""
    if isinstance(given, Tensor) and not given.ndim and given.requires_grad:
        given = given[None]
    if isinstance(given, list | tuple | range) or (isinstance(given, Tensor | np.ndarray) and given.ndim):
        rows = floats(name, given)
        if rows.ndim != 1 or not len(rows):
            raise ValueError(
                f"{name} has shape {tuple(rows.shape)}: give one number, or one for each row of the batch [batch]"
            )
        return rows
    return number(name, given)


def floats(name: str, given: Any) -> Tensor:
    """A tensor of finite numbers, in float32 unless it is of another floating-point type."""
    try:
        values = given if isinstance(given, Tensor) else torch.as_tensor(np.asarray(given))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}={given!r} is no tensor of numbers ({error}): give a torch tensor") from error
    if values.dtype == torch.bool or values.is_complex():
        raise ValueError(f"{name} is of type {values.dtype}: give real numbers")
    if not isinstance(given, Tensor) or not values.is_floating_point():
        values = values.to(torch.float32)
    if not bool((values.detach().abs() <= LARGEST).all()):
        raise ValueError(f"{name} holds values that are not finite, or too large for float32: give smaller ones")
    return values


def vector(given: Any, width: int) -> Tensor:
    """A dense vector [d_dense], or one per token [batch, pos, d_dense]."""
    values = floats("vector", given)
    if not values.ndim or values.shape[-1] != width:
        shown = values.shape[-1] if values.ndim else "none"
        raise ValueError(f"vector has width {shown}, the dense stream {width}")
    if values.ndim == 2 or values.ndim > 3:
        raise ValueError(
            f"vector has shape {tuple(values.shape)}: give one for all tokens [{width}], or one per token "
            f"[batch, pos, {width}], with 1 for the batch where every row has the same"
        )
    return values


def tokens(given: Any, n_vocab: int, n_ctx: int) -> Tensor:
    """Counterfactual token ids [batch, pos]."""
    if isinstance(given, str) or (isinstance(given, list | tuple) and any(isinstance(t, str) for t in given)):
        raise ValueError("toward is text: give its token ids, such as dense.to_tokens(text)")
    try:
        ids = given if isinstance(given, Tensor) else torch.as_tensor(np.asarray(given))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"toward={given!r} is no tensor of token ids ({error}): give [batch, pos]") from error
    if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex() or ids.ndim not in (1, 2):
        raise ValueError(f"toward is {ids.dtype} of shape {tuple(ids.shape)}: give whole token ids [batch, pos]")
    ids = (ids[None] if ids.ndim == 1 else ids).to(torch.long)
    if not ids.numel():
        raise ValueError(f"toward has shape {tuple(ids.shape)} and so no tokens: give counterfactual token ids")
    check_length(ids.shape[1], n_ctx)
    if int(ids.min()) < 0 or int(ids.max()) >= n_vocab:
        raise ValueError(f"toward holds ids from {int(ids.min())} to {int(ids.max())}: the vocabulary has {n_vocab}")
    return ids


def site(given: Any, n_layers: int) -> Site:
    """A residual site by index or label."""
    if isinstance(given, Site):
        given = given.index
    if isinstance(given, str):
        labels = {place.label: place for place in all_sites(n_layers)}
        if given not in labels:
            raise ValueError(f"site {given!r} is unknown: sites are {', '.join(labels)}, or their numbers from 0")
        return labels[given]
    try:
        if isinstance(given, bool | np.bool_):
            raise TypeError
        index = operator.index(given)
    except TypeError:
        raise ValueError(f"site {given!r} is no site: give its number, or a label such as 'attn.1'") from None
    return Site(index, n_layers)


def prompt_length(given: Any, n_ctx: int) -> int | None:
    """Columns of the prompt, where the caller says them."""
    if given is None:
        return None
    length = number("prompt_length", given)
    if not isinstance(length, int) or not 1 <= length <= n_ctx:
        raise ValueError(f"prompt_length={given!r}: give the prompt's number of columns, 1 to {n_ctx}")
    return length


def check_channel(channel: Channel, shape: SparseShape) -> None:
    """Raise ValueError for a channel that is not one of this sparse model."""
    if channel.site > 2 * shape.n_layers:
        raise ValueError(
            f"channel {channel.name!r}: site {channel.site} is out of range: {shape.n_layers} layers have sites 0 .. "
            f"{2 * shape.n_layers}"
        )
    if max(channel.indices) >= shape.d_model:
        raise ValueError(
            f"channel {channel.name!r}: index {max(channel.indices)} is out of range, the sparse stream has "
            f"{shape.d_model}"
        )


def check_product(name: str, *factors: int | float | Tensor) -> None:
    """Raise ValueError where a product of finite factors is none any more."""
    largest = math.prod(float(f.detach().abs().max()) if isinstance(f, Tensor) else abs(f) for f in factors)
    if largest > LARGEST:
        raise ValueError(f"{name} times its strength and weight is too large for float32: give smaller ones")

"""Which tokens a forward pass of the dense model sees, and where they stand in their sequence.

Under a KV cache a hook is given the new tokens alone. What came before, and which tokens are padding, only the model's
own arguments say: `Calls` reads them at the model's body, the one module through which the calls of TransformerLens
and of Hugging Face both pass, `generate` included.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn


class Filled(NamedTuple):
    """What a KV cache was filled with."""

    length: int
    tokens: Int[Tensor, "batch all_pos"] | None
    first: int
    """Columns of the call that began it."""
    keys: Tensor | None
    """The first layer's keys of the last token: they tell when the cache's rows were put in another order."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """One forward pass. A column is an index into the token tensor; a position counts real tokens only."""

    length: int
    """Columns of this pass."""
    device: torch.device
    start: int = 0
    """Column of its first token: the tokens that the KV cache already held."""
    first: int
    """Columns of the pass that began the sequence; this one's own without a cache."""
    tokens: Int[Tensor, "batch all_pos"] | None = None
    """Every token so far. None for embeddings, or a cache that this model did not fill."""
    real: Bool[Tensor, "batch all_pos"] | None = None
    """False at padding. None where there is no attention mask, hence no padding."""
    reordered: bool = False
    """Whether the cache's rows changed places since the last pass (beam search): a row may continue another."""

    @property
    def columns(self) -> Int[Tensor, " pos"]:
        """The columns of this pass."""
        return torch.arange(self.start, self.start + self.length, device=self.device)

    @property
    def positions(self) -> Int[Tensor, "#batch pos"]:
        """Absolute positions of this pass's tokens, counted from each row's first real token; -1 at padding."""
        if self.real is None:
            return self.columns[None]
        return (self.real.cumsum(1) - 1).masked_fill(~self.real, -1)[:, self.start : self.start + self.length]

    @property
    def reach(self) -> int:
        """Number of positions up to the end of this pass, in its longest row."""
        if self.real is None:
            return self.start + self.length
        return int(self.real[:, : self.start + self.length].sum(1).max())


class Calls:
    """Watches a model's body (`Anatomy.body`); changes nothing."""

    def __init__(self, body: nn.Module) -> None:
        self.now: Call | None = None
        """The pass in progress; None between passes."""
        self._cache: Any = None
        # Weak, so that a cache is freed when its owner drops it.
        self._filled: WeakKeyDictionary[Any, Filled] = WeakKeyDictionary()
        self._signature = inspect.signature(body.forward)
        body.register_forward_pre_hook(self._before, with_kwargs=True)
        body.register_forward_hook(self._after, with_kwargs=True, always_call=True)

    def _before(self, body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given: Mapping[str, Any] = self._signature.bind(*args, **kwargs).arguments
        cache, ids = given.get("past_key_values"), given.get("input_ids")
        start = int(cache.get_seq_length()) if cache is not None else 0
        filled = self._filled.get(cache) if start else None
        shown: Tensor = given["inputs_embeds"] if ids is None else ids.view(-1, ids.shape[-1])
        length = shown.shape[1]
        self.now = Call(
            length=length,
            device=shown.device,
            start=start,
            # Of a cache that others filled, all is taken for the prompt.
            first=filled.first if filled else start or length,
            tokens=None if ids is None else _so_far(start, filled, shown),
            real=_real(_whole_mask(body, given.get("attention_mask")), start + length),
            reordered=filled is not None and not _same_rows(filled, cache),
        )

    def _after(self, body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        now, self.now = self.now, None
        cache = getattr(output, "past_key_values", None)
        if cache is not None and now is not None:
            length = now.start + now.length
            tokens = None if now.tokens is None else now.tokens.clone()  # the caller may write into his own
            self._filled[cache] = Filled(length, tokens, now.first, _last_keys(cache, length))


def _so_far(start: int, filled: Filled | None, new: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch all_pos"] | None:
    """The cached tokens and the new ones; None where the cached ones are not known."""
    if not start:
        return new
    if filled is None or filled.tokens is None or filled.length < start or len(filled.tokens) != len(new):
        return None
    return torch.cat([filled.tokens[:, :start], new], 1)


def _whole_mask(body: Any, mask: Any) -> Tensor | None:
    """The mask that shows every real token; ValueError where static caches bring those of sliding windows alone."""
    if isinstance(mask, Mapping):  # by kind of layer
        whole = mask.get("full_attention")
    else:
        config = body.config
        slides = getattr(config, "sliding_window", None) is not None and not getattr(config, "layer_types", None)
        whole = None if mask is not None and mask.ndim == 4 and slides else mask
    if mask is not None and whole is None:
        raise ValueError(
            "a static cache gives this model masks of its sliding window alone, which do not tell padding from what is "
            "out of sight: leave out cache_implementation"
        )
    return whole


def _real(mask: Tensor | None, columns: int) -> Bool[Tensor, "batch all_pos"] | None:
    """Which tokens are no padding, from a mask [batch, pos] or, as static caches get it, [batch, 1, query, key]."""
    if mask is None:
        return None
    if mask.ndim == 4:  # the last query sees every real token; additive masks are 0 there
        mask = mask[:, 0, -1] if mask.dtype == torch.bool else mask[:, 0, -1] == 0
    return mask[:, :columns].bool()


def _last_keys(cache: Any, length: int) -> Tensor | None:
    layers = getattr(cache, "layers", None)
    keys = getattr(layers[0], "keys", None) if layers else None
    if keys is None:
        return None
    # A sliding window's cache keeps its last tokens only, a static one has room for more.
    return keys[:, :, min(length, keys.shape[2]) - 1].detach().clone()


def _same_rows(filled: Filled, cache: Any) -> bool:
    if filled.keys is None or cache.get_seq_length() < filled.length:  # cropped: nothing to compare with
        return True
    now = _last_keys(cache, filled.length)
    return now is not None and torch.equal(now, filled.keys)

"""Which tokens a forward pass of the dense model sees, and where they stand in their sequence.

Under a KV cache a hook is given the new tokens alone. What came before, which tokens are padding and where the prompt
ends, only the callers' own arguments say: `Calls` reads them around the model's body, the one module through which the
calls of TransformerLens and of Hugging Face both pass, and around `generate` (`interventions.bundle.generating`).

What belongs to one pass is kept with that pass: threads, and hooks that call the model inside a pass, do not meet.
"""

import inspect
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from sparse_model.model.lengths import check_length


class Filled(NamedTuple):
    """What a KV cache was filled with."""

    length: int
    tokens: Int[Tensor, "batch all_pos"] | None
    keys: Tensor | None
    """The first layer's keys of the last token: they tell when the cache's rows were put in another order."""


@dataclass
class Generation:
    """One call of `generate`, which knows where the prompt ends."""

    calls: "Calls"
    columns: int | None = None
    """Columns of the prompt; None until the first pass has shown it."""
    ids: Int[Tensor, "batch prompt_pos"] | None = None
    """The prompt's tokens; None for embeddings, or where only those after a filled cache were given."""
    masked: bool = False
    """Whether an attention mask was given."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """One forward pass. A column is an index into the token tensor; a position counts real tokens only."""

    calls: "Calls"
    """Of the model that runs."""
    length: int
    """Columns of this pass."""
    rows: int
    device: torch.device
    start: int = 0
    """Column of its first token: the tokens that the KV cache already held."""
    tokens: Int[Tensor, "batch all_pos"] | None = None
    """Every token so far. None for embeddings, or a cache that this model did not fill."""
    real: Bool[Tensor, "batch all_pos"] | None = None
    """False at padding. None where there is no attention mask, hence no padding."""
    position_ids: Int[Tensor, "#batch pos"] | None = None
    """Positions of this pass's tokens as the caller gave them."""
    reordered: bool = False
    """Whether the cache's rows changed places since the last pass (beam search): a row may continue another."""
    packed: bool = False
    """Whether one row holds several sequences, as continuous batching packs them."""
    generation: Generation | None = None
    """The `generate` that makes this pass."""
    handles: tuple["Handle", ...] = ()
    """The handles that act in this pass."""
    views: dict[Any, Any] = field(default_factory=dict)
    """What each edit keeps for the length of the pass."""

    @property
    def columns(self) -> Int[Tensor, " pos"]:
        """The columns of this pass."""
        return torch.arange(self.start, self.start + self.length, device=self.device)

    @property
    def counted(self) -> Int[Tensor, "#batch pos"]:
        """Positions counted from each row's first real token; -1 at padding."""
        if self.real is None:
            return self.columns[None]
        return (self.real.cumsum(1) - 1).masked_fill(~self.real, -1)[:, self.start : self.start + self.length]

    @property
    def positions(self) -> Int[Tensor, "#batch pos"]:
        """Absolute positions: as the caller gave them, otherwise as counted; -1 at padding."""
        counted = self.counted
        return counted if self.position_ids is None else torch.where(counted >= 0, self.position_ids, -1)

    @property
    def reach(self) -> int:
        """Number of positions up to the end of this pass, in its longest row."""
        return int(self.positions.max()) + 1

    @property
    def prompt(self) -> int | None:
        """Columns of the prompt where `generate` told them, and this pass goes on with that prompt."""
        told = self.generation
        if told is None or told.columns is None or told.ids is None or self.tokens is None:
            return None if told is None else told.columns
        columns = min(told.columns, self.tokens.shape[1])
        rows, more = divmod(self.rows, told.ids.shape[0])
        if more:
            return None
        prompt = told.ids[:, :columns].repeat_interleave(rows, 0).to(self.tokens.device)
        # A logits processor may call the model on other tokens.
        return told.columns if torch.equal(self.tokens[:, :columns], prompt) else None


class Handle:
    """What acts around the passes of a model while it is open."""

    def __init__(self, calls: "Calls") -> None:
        self.calls, self.is_open = calls, True
        self.elsewhere = 0
        """Passes of the model, while this was open, in threads without a handle."""

    def begin(self, call: Call) -> None:
        """Before a pass."""

    def end(self, call: Call, output: Any) -> None:
        """After a pass that raised nothing."""


_pass_in_progress: ContextVar[Call | None] = ContextVar("pass_in_progress", default=None)
_entered: ContextVar[tuple[Handle, ...]] = ContextVar("entered", default=())
generation_in_progress: ContextVar[Generation | None] = ContextVar("generation_in_progress", default=None)
_open: list[Handle] = []
"""Every open handle of every thread."""


def enter(handle: Handle) -> None:
    """Let a handle act in the passes of this thread, or of this asyncio task and what copies its context."""
    _entered.set((*_entered.get(), handle))
    _open.append(handle)


def leave(handle: Handle) -> None:
    """Undo `enter`, also from another thread."""
    handle.is_open = False
    _entered.set(tuple(other for other in _entered.get() if other is not handle))
    _open.remove(handle)


def is_entered(handle: Handle) -> bool:
    """Whether a handle acts in the passes of this thread."""
    return handle in _entered.get()


class Calls:
    """Runs the body of a dense model and knows the pass in progress; changes nothing by itself."""

    def __init__(self, body: nn.Module, padding: tuple[int | None, int | None] = (None, None)) -> None:
        self.padding = padding
        """The ids of the padding token and of the token that begins a text."""
        self._body = body
        # Weak, so that a cache is freed when its owner drops it.
        self._filled: WeakKeyDictionary[Any, Filled] = WeakKeyDictionary()
        body.forward = self.run

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_filled"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._filled = WeakKeyDictionary()

    @property
    def now(self) -> Call | None:
        """The pass of this model in progress in this thread; None between passes."""
        call = _pass_in_progress.get()
        return call if call is not None and call.calls is self else None

    # Not compiled, as what a pass is given differs from pass to pass; the model's own code is, as it would be alone.
    @torch.compiler.disable(recursive=False)
    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The body's forward pass, with the handles of this thread told of its begin and end."""
        call = self._expected(args, kwargs)
        token = _pass_in_progress.set(call)
        try:
            for handle in call.handles:
                handle.begin(call)
            # Compiled code may go past hooks: under a handle the body runs as it is written.
            forward = type(self._body).forward
            run = torch.compiler.disable(forward) if call.handles else forward
            output = run(self._body, *args, **kwargs)
            for handle in call.handles:
                handle.end(call, output)
        finally:
            _pass_in_progress.reset(token)
        self._remember(call, output)
        return output

    @torch.compiler.disable
    def _expected(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """The pass that these arguments make."""
        bound = inspect.signature(type(self._body).forward).bind(self._body, *args, **kwargs).arguments
        handles = tuple(h for h in _entered.get() if h.calls is self and h.is_open)
        return self._read(bound | bound.get("kwargs", {}), handles)

    def _read(self, given: Mapping[str, Any], handles: tuple[Handle, ...]) -> Call:
        cache, ids = given.get("past_key_values"), given.get("input_ids")
        start = int(cache.get_seq_length()) if cache is not None else 0
        filled = self._filled.get(cache) if start else None
        shown: Tensor = given["inputs_embeds"] if ids is None else ids if ids.ndim == 2 else ids.view(-1, ids.shape[-1])
        # A hook's own call of the model inside a pass is none of `generate`.
        generation = generation_in_progress.get() if _pass_in_progress.get() is None else None
        generation = generation if generation is not None and generation.calls is self else None
        tokens = None if ids is None else _so_far(start, filled, shown, generation)
        if generation is not None and generation.columns is None:
            generation.columns, generation.ids = start + shown.shape[1], None if tokens is None else tokens.clone()
        position_ids = given.get("position_ids")
        self._check_length(start + shown.shape[1], position_ids)
        return Call(
            calls=self,
            length=shown.shape[1],
            rows=shown.shape[0],
            device=shown.device,
            start=start,
            tokens=tokens,
            real=_real(given.get("attention_mask"), start + shown.shape[1]),
            position_ids=None if position_ids is None else position_ids.view(-1, position_ids.shape[-1]),
            reordered=filled is not None and not _same_rows(filled, cache),
            packed=given.get("cu_seq_lens_q") is not None or given.get("block_table") is not None,
            generation=generation,
            handles=handles,
        )

    def _check_length(self, columns: int, position_ids: Tensor | None) -> None:
        n_ctx = self._body.config.max_position_embeddings  # type: ignore[union-attr]
        if position_ids is None:
            check_length(columns, n_ctx)  # type: ignore[arg-type]
        elif position_ids.device.type == "cpu" and position_ids.numel():  # elsewhere reading it would wait
            check_length(int(position_ids.max()) + 1, n_ctx)  # type: ignore[arg-type]

    @torch.compiler.disable
    def _remember(self, call: Call, output: Any) -> None:
        if not call.handles:
            for handle in [h for h in _open if h.calls is self]:
                handle.elsewhere += 1
        cache = getattr(output, "past_key_values", None)
        if cache is not None:
            length = call.start + call.length
            tokens = None if call.tokens is None else call.tokens.clone()  # the caller may write into his own
            self._filled[cache] = Filled(length, tokens, _last_keys(cache, length))


def _so_far(
    start: int, filled: Filled | None, new: Int[Tensor, "batch pos"], generation: Generation | None
) -> Int[Tensor, "batch all_pos"] | None:
    """The cached tokens and the new ones; None where the cached ones are not known."""
    if not start:
        return new
    if filled is not None and filled.tokens is not None and filled.length >= start and len(filled.tokens) == len(new):
        return torch.cat([filled.tokens[:, :start], new], 1)
    # A cache that others filled with the beginning of a prompt that `generate` was given whole.
    if generation is not None and generation.ids is not None and generation.ids.shape[1] >= start:
        rows, more = divmod(len(new), len(generation.ids))
        return None if more else torch.cat([generation.ids[:, :start].repeat_interleave(rows, 0).to(new), new], 1)
    return None


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
    return None if keys is None else keys[:, :, length - 1].detach().clone()


def _same_rows(filled: Filled, cache: Any) -> bool:
    if filled.keys is None or cache.get_seq_length() < filled.length:  # cropped: nothing to compare with
        return True
    now = _last_keys(cache, filled.length)
    return now is not None and torch.equal(now, filled.keys)

"""Which tokens an intervention acts on: positions in the sequence, prompt or generated tokens, never padding.

Positions are absolute: 0 is a row's first real token, and tokens that are generated go on counting, so that a KV cache
makes no difference. Negative ones count from the end of the prompt.
"""

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from interventions.editing.seen import History, Seen

Positions = int | slice | list[int] | Tensor | Callable[[Tensor], Any] | None
"""A selection of tokens in the one form in which it is kept; `as_positions` gives it."""
Steps = Literal["prompt", "generated", "all"]

FORMS = (
    "give a number, numbers (a list, range, set, array or tensor of integers), a slice, a boolean mask or a callable"
)


def as_positions(given: Any, n_ctx: int) -> Positions:
    """Any spelling of a selection in the form in which it is kept.

    Raises IndexError for positions beyond the context, ValueError for what is no selection of tokens.
    """
    positions = _as_selection(given)
    for position in _integers(positions):
        if not -n_ctx <= position < n_ctx:
            raise IndexError(f"positions={position} is out of range: the model's context holds {n_ctx} tokens")
    return positions


def _as_selection(given: Any) -> Positions:
    if given is None:
        return None
    if isinstance(given, slice):
        return _as_slice(given)
    if isinstance(given, str | bytes | Mapping):
        raise ValueError(f"positions={given!r}: {FORMS}")
    if isinstance(given, Tensor | np.ndarray | np.generic):
        return _from_tensor(torch.as_tensor(given).detach())
    if callable(given):
        return given
    if isinstance(given, Iterable):
        return _from_items(list(given))
    return _whole(given)


def _as_slice(given: slice) -> slice:
    start, stop, step = (None if bound is None else _whole(bound) for bound in (given.start, given.stop, given.step))
    if step is not None and step < 1:
        raise ValueError(f"positions={given!r}: the step must be at least 1")
    return slice(start, stop, step)


def _from_tensor(given: Tensor) -> Positions:
    if given.dtype == torch.bool and given.ndim in (1, 2):
        return given.clone()
    if given.ndim == 1 and not given.numel():
        return []
    if given.dtype == torch.bool or given.is_floating_point() or given.is_complex() or given.ndim > 1:
        raise ValueError(
            f"positions is {str(given.dtype).removeprefix('torch.')} of shape {tuple(given.shape)}: numbers are whole "
            "and the same for every row, [k]; a boolean mask, [pos] or [batch, pos], may differ between rows"
        )
    return int(given) if given.ndim == 0 else given.tolist()


def _from_items(items: list[Any]) -> Positions:
    """A list: numbers, or a mask that is written out."""
    kinds = {_is_bool(item) for item in items}
    if kinds == {True}:
        return torch.tensor([bool(item) for item in items])
    if any(_is_row(item) for item in items):
        rows = [_from_items(list(item)) if _is_row(item) else None for item in items]
        if not all(isinstance(row, Tensor) and len(row) == len(rows[0]) for row in rows):  # type: ignore[arg-type]
            raise ValueError(
                "positions is a list of lists: numbers are the same for every row, so give one list of them, or for "
                "positions of its own in each row a boolean mask [batch, pos]"
            )
        return torch.stack(rows)  # type: ignore[arg-type]
    if len(kinds) > 1:
        raise ValueError(f"positions={items}: some are booleans and some numbers, give only one of the two")
    return [_whole(item) for item in items]


def _is_row(item: Any) -> bool:
    if isinstance(item, Tensor | np.ndarray | np.generic):
        return item.ndim > 0
    return isinstance(item, Iterable) and not isinstance(item, str | bytes)


def _is_bool(item: Any) -> bool:
    return isinstance(item, bool | np.bool_) or (
        isinstance(item, Tensor) and not item.ndim and item.dtype == torch.bool
    )


def _whole(item: Any) -> int:
    try:
        if not _is_bool(item):
            return operator.index(item)
    except (TypeError, ValueError):
        pass
    raise ValueError(f"positions={item!r} is no whole number: {FORMS}")


def check_steps(steps: Any) -> None:
    """Raise ValueError for an unknown kind of step."""
    if not isinstance(steps, str) or steps not in ("prompt", "generated", "all"):
        raise ValueError(f"steps={steps!r}: use 'prompt', 'generated' or 'all'")


def select(positions: Positions, steps: Steps, seen: Seen) -> Bool[Tensor, "#batch pos"] | None:
    """Mask over the tokens of the pass in progress; None for all of them.

    Raises IndexError for a position before the prompt's first token, ValueError for a mask that does not fit.
    """
    call = seen.call
    chosen = None if call.real is None else call.counted >= 0
    if steps != "all":
        in_prompt = call.columns[None] < seen.prompt()
        wanted = in_prompt if steps == "prompt" else ~in_prompt
        chosen = wanted if chosen is None else chosen & wanted
    if positions is not None:
        wanted = _chosen(positions, seen)
        chosen = wanted if chosen is None else chosen & wanted
    return chosen


def check_reached(positions: Positions, history: History) -> None:
    """Raise IndexError for a position that no pass seen so far has held, in any of its rows."""
    held, beyond = history.reach, [p for p in _integers(positions) if p >= history.reach]
    if isinstance(positions, Tensor):
        columns = positions.reshape(-1, positions.shape[-1]).any(0).nonzero()
        held, beyond = history.width, [int(c) for c in columns if c >= history.width]
    if beyond:
        raise IndexError(
            f"positions={beyond[0]} is out of range for {held} tokens, the longest sequence that the model was given"
        )


def _integers(positions: Positions) -> list[int]:
    """The positions that are given one by one."""
    if isinstance(positions, int):
        return [positions]
    return positions if isinstance(positions, list) else []


def _chosen(positions: Positions, seen: Seen) -> Bool[Tensor, "#batch pos"]:
    if isinstance(positions, Tensor):
        return _in_mask(positions, seen)
    if isinstance(positions, slice):
        return _in_slice(positions, seen)
    if callable(positions):
        return _in_mask(_asked(positions, seen), seen)
    seen.check_padding(left_only=True)
    here = seen.call.positions
    wanted = torch.zeros((), dtype=torch.bool, device=seen.call.device)
    for position in _integers(positions):
        wanted = wanted | (here == _absolute(position, seen))
    return wanted.expand_as(here) if wanted.ndim == 0 else wanted


def _absolute(position: int, seen: Seen) -> Any:
    """A position as it is, or from the end of each row's prompt: [#batch, 1]."""
    if position >= 0:
        return position
    ends = seen.prompt_ends()
    longest = int(ends.max())
    if position < -longest:
        raise IndexError(f"positions={position} is out of range for {longest} tokens, the length of the prompt")
    return ends + position


def _in_slice(positions: slice, seen: Seen) -> Bool[Tensor, "#batch pos"]:
    seen.check_padding(left_only=True)
    here, ends = seen.call.positions, None
    if any(bound is not None and bound < 0 for bound in (positions.start, positions.stop)):
        ends = seen.prompt_ends()

    def bound(value: int) -> Any:
        return value if value >= 0 or ends is None else (ends + value).clamp(min=0)

    first = bound(positions.start or 0)
    wanted = (here >= first) & ((here - first) % (positions.step or 1) == 0)
    return wanted if positions.stop is None else wanted & (here < bound(positions.stop))


def _asked(positions: Callable[[Tensor], Any], seen: Seen) -> Bool[Tensor, "batch all_pos"]:
    """A callable's answer for every token so far."""
    tokens = seen.tokens()
    if seen.call.reordered:
        raise ValueError(
            "positions is a callable and the rows of the KV cache changed places (beam search), so the earlier tokens "
            "of a row are not known: generate with use_cache=False, or give positions as numbers or a mask"
        )
    answer = positions(tokens)
    mask = torch.as_tensor(answer) if isinstance(answer, np.ndarray | list) else answer
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != tokens.shape:
        what = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else repr(answer)
        raise ValueError(
            f"positions gave {what}: for tokens of shape {tuple(tokens.shape)} it must give a boolean mask of that "
            "shape"
        )
    return mask


def _in_mask(mask: Bool[Tensor, "*batch all_pos"], seen: Seen) -> Bool[Tensor, "#batch pos"]:
    call = seen.call
    mask = mask.reshape(-1, mask.shape[-1]).to(call.device)
    if mask.shape[0] not in (1, call.rows):
        raise ValueError(
            f"positions has {mask.shape[0]} rows but the batch has {call.rows}: give one each, or one for all"
        )
    # A mask given for the prompt leaves generated tokens alone.
    short = max(0, call.start + call.length - mask.shape[1])
    return torch.nn.functional.pad(mask, (0, short))[:, call.start : call.start + call.length]

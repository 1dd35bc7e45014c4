"""Which tokens an intervention acts on: positions in the sequence, prompt or generated tokens, never padding.

Positions are absolute: 0 is a row's first real token, and tokens that are generated go on counting, so that a KV cache
makes no difference. Negative ones count from the end of the prompt.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from interventions.editing.vectors import Seen

Positions = int | slice | Sequence[int] | Tensor | Callable[[Tensor], Tensor] | None
Steps = Literal["prompt", "generated", "all"]


def select(positions: Positions, steps: Steps, seen: Seen) -> Bool[Tensor, "#batch pos"] | None:
    """Mask over the tokens of the pass in progress; None for all of them.

    Raises IndexError for a position before the prompt's first token, ValueError for a mask that does not fit.
    """
    call = seen.now()
    chosen = None if call.real is None else call.positions >= 0
    if steps != "all":
        in_prompt = call.columns[None] < seen.prompt()
        wanted = in_prompt if steps == "prompt" else ~in_prompt
        chosen = wanted if chosen is None else chosen & wanted
    if positions is not None:
        wanted = _chosen(positions, seen)
        chosen = wanted if chosen is None else chosen & wanted
    return chosen


def check_positions(positions: Positions, steps: Steps, n_ctx: int) -> None:
    """Raise IndexError for positions beyond the context, ValueError for what is no selection of tokens."""
    if steps not in ("prompt", "generated", "all"):
        raise ValueError(f"steps={steps!r}: use 'prompt', 'generated' or 'all'")
    if isinstance(positions, slice) and positions.step is not None and positions.step < 1:
        raise ValueError(f"positions={positions!r}: the step must be at least 1")
    for position in _integers(positions):
        if not -n_ctx <= position < n_ctx:
            raise IndexError(f"positions={position} is out of range: the model's context holds {n_ctx} tokens")


def check_reached(positions: Positions, seen: Seen) -> None:
    """Raise IndexError for a position that no pass seen so far has held, in any of its rows."""
    held, beyond = seen.reach, [p for p in _integers(positions) if p >= seen.reach]
    if isinstance(positions, Tensor) and positions.dtype == torch.bool:
        columns = positions.reshape(-1, positions.shape[-1]).any(0).nonzero()
        held, beyond = seen.width, [int(c) for c in columns if c >= seen.width]
    if beyond:
        raise IndexError(
            f"positions={beyond[0]} is out of range for {held} tokens, the longest sequence that the model was given"
        )


def _integers(positions: Positions) -> list[int]:
    """The positions that are given one by one."""
    if isinstance(positions, Tensor):
        return [] if positions.dtype == torch.bool else [int(p) for p in positions.reshape(-1)]
    if isinstance(positions, int):
        return [positions]
    return list(positions) if isinstance(positions, Sequence) else []


def _chosen(positions: Any, seen: Seen) -> Bool[Tensor, "#batch pos"]:
    if isinstance(positions, slice):
        return _in_slice(positions, seen)
    if callable(positions) and not isinstance(positions, Tensor):
        return _in_mask(_asked(positions, seen), seen)
    if isinstance(positions, Tensor) and positions.dtype == torch.bool:
        return _in_mask(positions, seen)
    here, wanted = seen.now().positions, torch.zeros((), dtype=torch.bool, device=seen.now().device)
    for position in _integers(positions):
        wanted = wanted | (here == _absolute(position, seen))
    return wanted.expand_as(here) if wanted.ndim == 0 else wanted


def _absolute(position: int, seen: Seen) -> Any:
    """A position as it is, or from the end of each row's prompt: [#batch, 1]."""
    if position >= 0:
        return position
    lengths = seen.prompt_lengths()
    longest = int(lengths.max())
    if position < -longest:
        raise IndexError(f"positions={position} is out of range for {longest} tokens, the length of the prompt")
    return lengths + position


def _in_slice(positions: slice, seen: Seen) -> Bool[Tensor, "#batch pos"]:
    here, lengths = seen.now().positions, None
    if any(bound is not None and bound < 0 for bound in (positions.start, positions.stop)):
        lengths = seen.prompt_lengths()

    def bound(value: int) -> Any:
        return value if value >= 0 or lengths is None else (lengths + value).clamp(min=0)

    first = bound(positions.start or 0)
    wanted = (here >= first) & ((here - first) % (positions.step or 1) == 0)
    return wanted if positions.stop is None else wanted & (here < bound(positions.stop))


def _asked(positions: Callable[[Tensor], Tensor], seen: Seen) -> Bool[Tensor, "batch all_pos"]:
    """A callable's answer for every token so far."""
    tokens = seen.tokens()
    if seen.now().reordered:
        raise ValueError(
            "positions is a callable and the rows of the KV cache changed places (beam search), so the earlier tokens "
            "of a row are not known: generate with use_cache=False, or give positions as numbers or a mask"
        )
    mask = positions(tokens)
    if mask.dtype != torch.bool or mask.shape != tokens.shape:
        raise ValueError(
            f"positions gave {mask.dtype} of shape {tuple(mask.shape)}: for tokens of shape {tuple(tokens.shape)} it "
            "must give a boolean mask of that shape"
        )
    return mask


def _in_mask(mask: Bool[Tensor, "*batch all_pos"], seen: Seen) -> Bool[Tensor, "#batch pos"]:
    call = seen.now()
    mask = mask.reshape(-1, mask.shape[-1]).to(call.device)
    batch = call.tokens.shape[0] if call.tokens is not None else mask.shape[0]
    if mask.shape[0] not in (1, batch):
        raise ValueError(f"positions has {mask.shape[0]} rows but the batch has {batch}: give one each, or one for all")
    # A mask given for the prompt leaves generated tokens alone.
    short = max(0, call.start + call.length - mask.shape[1])
    return torch.nn.functional.pad(mask, (0, short))[:, call.start : call.start + call.length]

"""What an edit sees: the pass in progress, where its prompt ends, and how far the passes have come."""

import threading
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from interventions.bundle.passes import Call


class History:
    """What one edit of an entered handle remembers from pass to pass."""

    def __init__(self, *, one_pass: bool = False) -> None:
        self.one_pass = one_pass
        """Whether there will be no later pass, so that a position that is not reached is an error at once."""
        self.reach = self.width = 0
        """Positions and columns that the longest pass has held."""
        self._lock = threading.Lock()
        self._prompts: dict[int, set[int]] = {}
        """Of the passes that were taken for whole prompts: hashes by their number of columns."""

    def note(self, call: Call) -> None:
        """Note how far a pass comes. Counts padding, so only what has positions asks."""
        reach = call.reach
        with self._lock:
            self.reach, self.width = max(self.reach, reach), max(self.width, call.start + call.length)

    def continues(self, tokens: Int[Tensor, "batch pos"]) -> bool:
        """Whether tokens begin with those of an earlier pass; they are remembered if not."""
        with self._lock:
            for columns, earlier in self._prompts.items():
                if columns < tokens.shape[1] and _hashed(tokens[:, :columns]) in earlier:
                    return True
            self._prompts.setdefault(tokens.shape[1], set()).add(_hashed(tokens))
            return False


class Seen:
    """One pass of the model, as one edit sees it."""

    def __init__(self, call: Call, history: History, prompt_length: int | None) -> None:
        self.call, self.history = call, history
        self.stream: Tensor | None = None
        """The residual stream, where the edit sits behind the place that shows it."""
        self.largest_change: Tensor | None = None
        """Once the edit has run: the largest magnitude of what it added, or would add at tokens that are not chosen."""
        self._prompt = prompt_length

    def tokens(self) -> Int[Tensor, "batch all_pos"]:
        """Every token so far; ValueError where the model was not given them."""
        if self.call.tokens is None:
            raise ValueError(
                "this intervention depends on the tokens, and the model was given embeddings or a KV cache that other "
                "calls filled: pass token ids, and fill the cache by calling this model"
            )
        return self.call.tokens

    def prompt(self, told: int | None = None) -> int:
        """Columns of the prompt. Compares tokens, so only what depends on the prompt asks.

        told: what the edit's own tensors say, where nothing better is known. ValueError where nobody knows.
        """
        if self._prompt is None:
            self._prompt = self.call.prompt
        if self._prompt is None:
            self._prompt = told if self._is_continued() else self.call.length
        if self._prompt is None:
            raise ValueError(
                "this intervention depends on where the prompt ends, and a pass that goes on with a KV cache or with "
                "the tokens of an earlier pass does not say: call the model's generate, or give "
                "prompt_length=(number of columns of the prompt)"
            )
        return self._prompt

    def _is_continued(self) -> bool:
        tokens = self.call.tokens
        return self.call.start > 0 or (tokens is not None and self.history.continues(tokens))

    def prompt_ends(self) -> Int[Tensor, "#batch 1"]:
        """The position behind the last token of each row's prompt."""
        call, columns = self.call, self.prompt()
        self.check_padding(left_only=False)
        if call.real is None:
            ends = torch.tensor([[columns]], device=call.device)
        else:
            ends = call.real[:, :columns].sum(1, keepdim=True)
        if call.position_ids is None:
            return ends
        shift = call.position_ids - call.counted
        real = (call.counted >= 0).expand_as(shift)
        moved = shift.gather(1, real.int().argmax(1, keepdim=True))
        if bool((real & (shift != moved)).any()):
            raise ValueError(
                "position_ids do not count up by one in every row, so there is no position from the end of the prompt: "
                "give positions as numbers from the start or as a boolean mask"
            )
        return ends + moved

    def check_padding(self, *, left_only: bool) -> None:
        """ValueError for a prompt that looks padded though no attention mask says so."""
        call, (pad, begin) = self.call, self.call.calls.padding
        masked = call.generation is not None and call.generation.masked
        if call.real is not None or masked or call.tokens is None or pad is None:
            return
        columns = call.tokens.shape[1] if left_only else min(self.prompt(), call.tokens.shape[1])
        # A text may begin with the token that also pads.
        pads = call.tokens[:, int(pad == begin) : columns] == pad
        if pads.shape[1] and bool((pads[:, 0] if left_only else pads[:, 0] | pads[:, -1]).any()):
            raise ValueError(
                f"the tokens begin or end with the padding token ({pad}) and no attention mask says which are real, so "
                "positions are not known: give the model attention_mask= (all ones where nothing is padding)"
            )


def _hashed(tokens: Int[Tensor, "batch pos"]) -> int:
    return hash((tuple(tokens.shape), tokens.cpu().contiguous().numpy().tobytes()))


def seen_by(history: History, call: Call, prompt_length: int | None) -> Seen:
    """The pass as the edit with this history sees it, the same object for the length of the pass."""
    views: dict[Any, Seen] = call.views
    if history not in views:
        views[history] = Seen(call, history, prompt_length)
    return views[history]

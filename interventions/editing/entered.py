"""A handle that is entered: the passes of its own thread are edited, and each edit has run in each of them.

A model that is called in another thread, or by a hook inside a pass, keeps its own passes; only hooks are shared, and
they ask which handles act in the pass in progress.
"""

import sys
import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import checkpoint

from interventions.bundle.bundle import check_raw, get_bundle
from interventions.bundle.passes import Call, Handle, enter, is_entered, leave
from interventions.editing.hooks import Edit, Remove, See, attach
from interventions.editing.positions import check_reached
from interventions.editing.seen import History, Seen, seen_by

_attaching = threading.RLock()
"""torch numbers hooks, and TransformerLens lists them, without regard to threads."""

TOO_LARGE = torch.finfo(torch.float32).max ** 0.5
"""Squares of such activations are infinite in float32, so that norms and attention no longer mean anything."""

OUTSIDE = (
    "an intervention ran outside a forward pass of the dense model, where positions mean nothing: call the model, not "
    "one of its blocks"
)


def one_pass(edit: Edit) -> See:
    """What hooks see that are attached by TransformerLens for one pass: every pass that meets them."""
    history, calls = History(one_pass=True), edit.bundle.calls

    def see() -> Seen:
        if calls.now is None:
            raise RuntimeError(OUTSIDE)
        return seen_by(history, calls.now, edit.prompt_length)

    return see


class Entered(Handle):
    """One entry into a handle's `with` block (`interventions.bundle.passes.Handle`)."""

    def __init__(self, dense: nn.Module, edits: tuple[Edit, ...]) -> None:
        self._dense = dense
        self._edits = [(edit, History()) for edit in edits if not edit.source.is_nothing]
        self._removers: list[Remove] = []
        super().__init__(get_bundle(dense).calls)
        self._passes = 0
        if self._edits:
            check_whole(dense)
        with _attaching:
            try:
                for edit, history in self._edits:
                    self._removers.extend(attach(dense, edit, self._see(edit, history)))
            except BaseException:
                self._detach()
                raise
            enter(self)

    def _see(self, edit: Edit, history: History) -> See:
        def see() -> Seen | None:
            call = self.calls.now
            if call is None and is_entered(self):
                raise RuntimeError(OUTSIDE)
            if call is None or self not in call.handles:  # another thread's pass
                return None
            return seen_by(history, call, edit.prompt_length)

        return see

    def _detach(self) -> None:
        for remove in self._removers:
            remove()

    def close(self) -> None:
        """Take the hooks off."""
        with _attaching:
            self._detach()
            leave(self)

    def check(self) -> None:
        """Raise where the block edited nothing though the model ran, or where a position was not reached."""
        if self._edits and not self._passes and self.elsewhere:
            raise RuntimeError(
                f"the model ran {self.elsewhere} times during the block, but in other threads, where this handle does "
                "not act: enter it in the thread that calls the model, or start that thread with "
                "contextvars.copy_context().run"
            )
        for edit, history in self._edits:
            if history.width:
                check_reached(edit.positions, history)

    @torch.compiler.disable
    def begin(self, call: Call) -> None:
        """Refuse a pass that cannot be edited right."""
        if not self._edits:
            return
        check_raw(self._dense)
        if not call.rows or not call.length:
            raise ValueError(f"the model was given {call.rows} rows of {call.length} tokens: give at least one of each")
        if call.packed:
            raise ValueError(
                "the pass packs several sequences into one row (continuous batching), where positions within a "
                "sequence are not known: use generate without it"
            )
        check_checkpointing(self._dense)

    @torch.compiler.disable
    def end(self, call: Call, output: Any) -> None:
        """Count the pass. Raises where an edit did not run in it, and where it gave no numbers."""
        self._passes += 1
        views = [call.views.get(history) for _, history in self._edits]
        changes = [None if view is None else view.largest_change for view in views]
        missing = [edit for (edit, _), change in zip(self._edits, changes, strict=True) if change is None]
        if missing:
            raise RuntimeError(
                f"edits did not run in this pass: {', '.join(f'{e.site.label} (where={e.where!r})' for e in missing)}. "
                "Their hooks were taken off, or the model goes past them (compiled or replaced modules): enter the "
                "handle on the model as it was loaded, and compile no part of it"
            )
        if self._edits and not _is_usable(output[0], call, changes):
            raise ValueError(
                "under the intervention the model's activations are no longer finite, or too large for float32: make "
                "delta, set_to or strength smaller"
            )


def _is_usable(last: Tensor, call: Call, changes: list[Any]) -> bool:
    """Whether changes, and the last activations at real tokens, are numbers that can be computed with."""
    usable = ((last.detach().abs() < TOO_LARGE).all(-1) | (call.counted < 0)).all()
    for change in changes:
        usable = usable & (change < TOO_LARGE).to(usable.device)
    return bool(usable)


def check_whole(dense: nn.Module) -> None:
    """Raise ValueError for a model with parts that go past hooks, or that are run twice."""
    for name, module in _parts(dense):
        forward = module.__dict__.get("forward")
        compiled = getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")
        if compiled or hasattr(forward, "get_compiler_config"):
            raise ValueError(
                f"{name} was compiled by itself, and compiled modules go past the hooks of an intervention: compile "
                "the whole model instead (it runs uncompiled under a handle), or load it again"
            )
    check_checkpointing(dense)


def _parts(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    whole = {id(model), id(getattr(model, "base_model", None)), id(getattr(model, "original_model", None))}
    return ((name, module) for name, module in model.named_modules() if id(module) not in whole)


def check_checkpointing(dense: nn.Module) -> None:
    """Raise ValueError where layers are computed again in the backward pass."""
    layers = dense.training and any(getattr(module, "gradient_checkpointing", False) for module in dense.modules())
    if layers or _is_checkpointed():
        raise ValueError(
            "gradient checkpointing computes layers again in the backward pass, perhaps when the block was left: call "
            "gradient_checkpointing_disable() on the model or eval(), and no torch.utils.checkpoint around it"
        )


def _is_checkpointed() -> bool:
    """Whether torch.utils.checkpoint runs this pass, to run it again later."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_filename == checkpoint.__file__:
            return True
    return False

"""One edit of the dense model: a source at a site, and the hooks that carry it out.

The algorithm:

1. A source (`interventions.editing.vectors`) gives v, the change of the dense residual stream at each token.
2. where="read" (the paper's, A.4): only what the next sublayer reads changes. The norm's response to a small v is
   added behind it: gain * (v - mean(v)) / std, with std the stream's own standard deviation at that token (LayerNorm's
   epsilon included; in the paper's units the mean over held-out text). The residual stream stays as it was.
3. where="stream": v is added to the residual stream itself, so that everything downstream sees it.
4. Tokens that are not selected (`interventions.editing.positions`) keep their values bit for bit.

Before an MLP the TransformerLens hook `hook_resid_mid` is only the MLP's input, not the stream; there a stream edit
goes into attention's output, which both the MLP and the skip path read. A plain Hugging Face model gets the same edits
at the same places as module hooks.

Sums are computed in float32 (or the stream's type, if that is wider) and returned in the type of what was hooked.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from bridges.sites import Site
from interventions.bundle.bundle import Bundle
from interventions.editing.positions import Positions, Steps, check_reached, select
from interventions.editing.reads import norm_at, read_change, read_std
from interventions.editing.vectors import Seen, Source
from interventions.editing.where import Where

Hook = Callable[..., Tensor | None]
Remove = Callable[[], None]


@dataclass(frozen=True)
class Edit:
    """One source at one site."""

    bundle: Bundle
    site: Site
    source: Source
    where: Where
    positions: Positions
    steps: Steps

    def read(
        self,
        seen: Seen,
        value: Float[Tensor, "batch pos d_dense"],
        stream: Float[Tensor, "batch pos d_dense"],
    ) -> Float[Tensor, "batch pos d_dense"]:
        """The reading norm's output for a stream, edited."""
        self._look(seen)
        wide = _wide(stream)
        std = self._mean_std if self.source.units == "paper" else read_std(self.norm, wide)
        return self._add(seen, value, read_change(self.norm, std, self.source(seen, wide)))

    def write(
        self, seen: Seen, stream: Float[Tensor, "batch pos d_dense"], value: Float[Tensor, "batch pos d_dense"]
    ) -> Float[Tensor, "batch pos d_dense"]:
        """A value that is added to the stream, or the stream itself, edited."""
        self._look(seen)
        return self._add(seen, value, self.source(seen, _wide(stream)))

    def _look(self, seen: Seen) -> None:
        call = self.bundle.calls.now
        if call is None:
            raise RuntimeError(
                "an intervention ran outside a forward pass of the dense model, where positions mean nothing: call the "
                "model, not one of its blocks"
            )
        if seen.call is not call:
            seen.see(call)

    def _add(
        self, seen: Seen, value: Float[Tensor, "batch pos d_dense"], change: Float[Tensor, "#batch #pos d_dense"]
    ) -> Float[Tensor, "batch pos d_dense"]:
        edited = (_wide(value) + change.to(value.device)).to(value.dtype)
        if self.positions is not None:
            seen.reached()
            if seen.one_pass:
                check_reached(self.positions, seen)
        selected = select(self.positions, self.steps, seen)
        return edited if selected is None else torch.where(selected[..., None].to(value.device), edited, value)

    @property
    def norm(self) -> nn.LayerNorm:
        """The dense norm that reads at the site."""
        return norm_at(self.bundle.hf, self.site)

    def vector(self) -> Float[Tensor, " d_dense"]:
        """What is added where both streams have their mean scales over held-out text."""
        direction = self.source.direction()
        if direction is None:
            raise ValueError("only a fixed delta or vector has one direction; toward and set_to differ at each token")
        if self.where == "stream":
            return direction
        return read_change(self.norm, self._mean_std, direction).detach()

    @property
    def _mean_std(self) -> Tensor:
        """The dense stream's standard deviation at the site over held-out text."""
        return self.bundle.bridges.std_dense[self.site.index]


def lens_hooks(edit: Edit, seen: Seen) -> list[tuple[str, Hook]]:
    """(hook name, function) pairs for TransformerLens; none for an edit that changes nothing."""
    if edit.source.is_nothing:
        return []
    stream: dict[str, Tensor] = {}

    def see_stream(value: Tensor, hook: Any = None) -> None:
        stream["now"] = value

    def edit_read(value: Tensor, hook: Any = None) -> Tensor:
        return edit.read(seen, value, stream["now"])

    def edit_write(value: Tensor, hook: Any = None) -> Tensor:
        return edit.write(seen, value + stream["now"] if edit.site.reader == "mlp" else value, value)

    if edit.where == "read":
        norm = edit.site.norm_hook
        return [(f"{norm}.hook_in", see_stream), (f"{norm}.hook_out", edit_read)]
    if edit.site.reader == "mlp":
        layer = f"blocks.{edit.site.layer}"
        return [(f"{layer}.ln1.hook_in", see_stream), (f"{layer}.hook_attn_out", edit_write)]
    return [(edit.site.stream_hook, edit_write)]


def attach(dense: nn.Module, edit: Edit, seen: Seen) -> Iterator[Remove]:
    """Attach an edit to its model, hook by hook; yields what takes each one off again."""
    if isinstance(dense, GPT2LMHeadModel):
        yield from _attach_hf(dense, edit, seen)
    else:
        yield from _attach_lens(dense, edit, seen)


def _attach_lens(dense: Any, edit: Edit, seen: Seen) -> Iterator[Remove]:
    for name, function in lens_hooks(edit, seen):
        point = dense.hook_dict[name]
        # Permanent for TransformerLens, so that run_with_hooks and reset_hooks inside the block leave it alone.
        yield partial(_remove_lens, point, point.add_hook(function, is_permanent=True))


def _remove_lens(point: Any, handle: Any) -> None:
    handle.hook.remove()
    point.fwd_hooks = [h for h in point.fwd_hooks if h is not handle]


def _attach_hf(model: GPT2LMHeadModel, edit: Edit, seen: Seen) -> Iterator[Remove]:
    if edit.source.is_nothing:
        return
    stream: dict[str, Tensor] = {}
    block: Any = model.transformer.h[edit.site.layer]

    def edit_read(norm: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return edit.read(seen, output, inputs[0])

    def see_stream(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        stream["now"] = inputs[0]

    def edit_attention(attention: nn.Module, inputs: Any, output: tuple[Any, ...]) -> tuple[Any, ...]:
        return edit.write(seen, output[0] + stream["now"], output[0]), *output[1:]

    def edit_input(block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return edit.write(seen, inputs[0], inputs[0]), *inputs[1:]

    def edit_output(block: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return edit.write(seen, output, output)

    if edit.where == "read":
        yield edit.norm.register_forward_hook(edit_read).remove
    elif edit.site.is_final:
        yield block.register_forward_hook(edit_output).remove
    elif edit.site.reader == "attn":
        yield block.register_forward_pre_hook(edit_input).remove
    else:
        yield block.ln_1.register_forward_pre_hook(see_stream).remove
        yield block.attn.register_forward_hook(edit_attention).remove


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))

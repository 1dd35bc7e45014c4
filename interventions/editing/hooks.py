"""One edit of the dense model: a source at a site, and the hooks that carry it out.

The algorithm:

1. A source (`interventions.editing.vectors`) gives v, the change of the dense residual stream at each token.
2. where="read" (the paper's, A.4): only what the next sublayer reads changes. The norm's response to a small v is
   added behind it: gain * (v - mean(v)) / std, with std the stream's own standard deviation at that token (the norm's
   epsilon included; in the paper's units the mean over held-out text); for an RMSNorm gain * v / rms. The residual
   stream stays as it was.
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
from transformers import PreTrainedModel

from bridges.families import ReadNorm
from bridges.sites import Site
from interventions.bundle.bundle import Bundle
from interventions.editing.positions import Positions, Steps, check_reached, select
from interventions.editing.seen import Seen
from interventions.editing.vectors import Source
from interventions.editing.where import Where

Hook = Callable[..., Tensor | None]
Remove = Callable[[], None]
See = Callable[[], Seen | None]
"""Gives the pass in progress; None for a pass in which the edit does not act."""


@dataclass(frozen=True)
class Edit:
    """One source at one site."""

    bundle: Bundle
    site: Site
    source: Source
    where: Where
    positions: Positions
    steps: Steps
    prompt_length: int | None = None
    """Columns of the prompt, where the caller said them."""

    def __str__(self) -> str:
        return f"{self.source} at {self.site.label}, {self.where}, in {self.steps} steps"

    def read(
        self,
        seen: Seen,
        value: Float[Tensor, "*tokens d_dense"],
        stream: Float[Tensor, "*tokens d_dense"],
    ) -> Float[Tensor, "*tokens d_dense"]:
        """The reading norm's output for a stream, edited."""
        rows = (-1, seen.call.length, value.shape[-1])  # OPT lays batch and positions side by side before its MLP
        wide, norm = _wide(stream).reshape(rows), self.norm
        scale = self._mean_scale if self.source.units == "paper" else norm.scale(wide)
        return self._add(seen, value.reshape(rows), norm.response(self.source(seen, wide), scale)).view_as(value)

    def write(
        self, seen: Seen, stream: Float[Tensor, "batch pos d_dense"], value: Float[Tensor, "batch pos d_dense"]
    ) -> Float[Tensor, "batch pos d_dense"]:
        """A value that is added to the stream, or the stream itself, edited."""
        return self._add(seen, value, self.source(seen, _wide(stream)))

    def _add(
        self, seen: Seen, value: Float[Tensor, "batch pos d_dense"], change: Float[Tensor, "#batch #pos d_dense"]
    ) -> Float[Tensor, "batch pos d_dense"]:
        edited = (_wide(value) + change.to(value.device)).to(value.dtype)
        seen.largest_change = change.detach().abs().amax()
        if self.positions is not None:
            seen.history.note(seen.call)
            if seen.history.one_pass:
                check_reached(self.positions, seen.history)
        selected = select(self.positions, self.steps, seen)
        return edited if selected is None else torch.where(selected[..., None].to(value.device), edited, value)

    @property
    def norm(self) -> ReadNorm:
        """The dense norm that reads at the site."""
        return self.bundle.anatomy.read_norm(self.site.index)

    def vector(self) -> Float[Tensor, " d_dense"]:
        """What is added where both streams have their mean scales over held-out text."""
        direction = self.source.direction()
        if direction is None:
            raise ValueError("only a fixed delta or vector has one direction; toward and set_to differ at each token")
        if self.where == "stream":
            return direction
        return self.norm.response(direction, self._mean_scale)

    @property
    def _mean_scale(self) -> Tensor:
        """What the norm divides by, its mean over held-out text."""
        return self.bundle.bridges.norm_scale(self.site.index, self.norm)


def lens_hooks(edit: Edit, see: See, dense: Any) -> list[tuple[str, Hook]]:
    """(hook name, function) pairs for TransformerLens; none for an edit that changes nothing."""
    if edit.source.is_nothing:
        return []
    check_on_path(edit, dense)

    def see_stream(value: Tensor, hook: Any = None) -> None:
        if (seen := see()) is not None:
            seen.stream = value

    def edit_read(value: Tensor, hook: Any = None) -> Tensor | None:
        if (seen := see()) is None:
            return None
        check_on_path(edit, dense)  # a switch may have been set since
        return edit.read(seen, value, _shown(seen))

    def edit_write(value: Tensor, hook: Any = None) -> Tensor | None:
        if (seen := see()) is None:
            return None
        return edit.write(seen, value + _shown(seen) if edit.site.reader == "mlp" else value, value)

    if edit.where == "read":
        norm = edit.site.norm_hook
        return [(f"{norm}.hook_in", see_stream), (f"{norm}.hook_out", edit_read)]
    if edit.site.reader == "mlp":
        layer = f"blocks.{edit.site.layer}"
        return [(f"{layer}.ln1.hook_in", see_stream), (f"{layer}.hook_attn_out", edit_write)]
    return [(edit.site.stream_hook, edit_write)]


def check_on_path(edit: Edit, dense: Any) -> None:
    """Raise ValueError where TransformerLens' attention takes its input from before the norm that is edited."""
    if edit.where != "read" or edit.site.reader != "attn":
        return
    for switch in ("use_split_qkv_input", "use_attn_in"):
        if getattr(dense.cfg, switch, False):
            raise ValueError(
                f"with {switch} attention reads past the place where {edit.site.label} is edited: call "
                f"set_{switch}(False), or use where='stream'"
            )


def _shown(seen: Seen) -> Tensor:
    assert seen.stream is not None
    return seen.stream


def attach(dense: nn.Module, edit: Edit, see: See) -> Iterator[Remove]:
    """Attach an edit to its model, hook by hook; yields what takes each one off again."""
    if isinstance(dense, PreTrainedModel):
        yield from _attach_hf(dense, edit, see)
    else:
        yield from _attach_lens(dense, edit, see)


def _attach_lens(dense: Any, edit: Edit, see: See) -> Iterator[Remove]:
    for name, function in lens_hooks(edit, see, dense):
        point = dense.hook_dict[name]
        # Permanent for TransformerLens, so that run_with_hooks and reset_hooks inside the block leave it alone.
        yield partial(_remove_lens, point, point.add_hook(function, is_permanent=True))


def _remove_lens(point: Any, handle: Any) -> None:
    handle.hook.remove()
    point.fwd_hooks = [h for h in point.fwd_hooks if h is not handle]


def _attach_hf(model: PreTrainedModel, edit: Edit, see: See) -> Iterator[Remove]:
    if edit.source.is_nothing:
        return
    anatomy, site = edit.bundle.anatomy, edit.site

    def edit_read(norm: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        return None if (seen := see()) is None else edit.read(seen, output, inputs[0])

    def see_stream(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if (seen := see()) is not None:
            seen.stream = inputs[0]

    def edit_attention(attention: nn.Module, inputs: Any, output: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if (seen := see()) is None:
            return None
        return edit.write(seen, output[0] + _shown(seen), output[0]), *output[1:]

    def edit_input(block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return None if (seen := see()) is None else (edit.write(seen, inputs[0], inputs[0]), *inputs[1:])

    def edit_output(block: nn.Module, inputs: Any, output: Any) -> Any:
        if (seen := see()) is None:
            return None
        if isinstance(output, tuple):
            return edit.write(seen, output[0], output[0]), *output[1:]
        return edit.write(seen, output, output)

    if edit.where == "read":
        yield anatomy.norm(site.index).register_forward_hook(edit_read).remove
    elif site.reader == "mlp":
        yield anatomy.norm(site.index - 1).register_forward_pre_hook(see_stream).remove
        yield anatomy.attention(site.layer).register_forward_hook(edit_attention).remove
    elif site.index == 0:
        yield anatomy.blocks[0].register_forward_pre_hook(edit_input).remove
    else:
        yield _first(anatomy.blocks[site.layer if site.is_final else site.layer - 1], edit_output)


def _first(module: nn.Module, hook: Callable[..., Any]) -> Remove:
    """Put a hook behind the other edits and before what only looks, such as output_hidden_states."""
    hook.is_edit = True  # type: ignore[attr-defined]
    handle = module.register_forward_hook(hook)
    hooks: Any = module._forward_hooks
    for key in [key for key, other in hooks.items() if not hasattr(other, "is_edit")]:
        hooks.move_to_end(key)
    return handle.remove


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))

"""intervene(): move a sparse channel and let the dense model follow (paper A.4).

The algorithm, for one channel at one site:

1. A source (`interventions.sources`) gives v, the change of the dense residual stream at each token.
2. where="read" (the paper's): only what the next sublayer reads changes. The norm's response to a small v is added
   behind it: gain * (v - mean(v)) / std, with std the stream's own standard deviation at that token (LayerNorm's
   epsilon included). The residual stream stays as it was.
3. where="stream": v is added to the residual stream itself, so that everything downstream sees it.

Before an MLP the TransformerLens hook `hook_resid_mid` is only the MLP's input, not the stream; there a stream edit
goes into `hook_attn_out`, which both the MLP and the skip path read.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint, LensHandle
from transformer_lens.model_bridge import TransformerBridge

from bridges.run import Run
from bridges.sites import Site
from interventions.bundle import get_bundle
from interventions.channels import Channel, resolve
from interventions.sources import Delta, Fixed, Seen, SetTo, Source, Toward, channel_direction

Where = Literal["read", "stream"]
Positions = int | slice | Sequence[int] | Tensor | Callable[[Tensor], Tensor] | None
Hook = Callable[..., Tensor | None]


@dataclass(frozen=True)
class Edit:
    """One source at one site."""

    run: Run
    site: Site
    source: Source
    where: Where
    positions: Positions
    direction: Float[Tensor, " d_dense"] | None
    """The constant stream direction, where there is one."""

    def hooks(self) -> list[tuple[str, Hook]]:
        """(hook name, function) pairs; each call to this method starts from a clean state."""
        seen = Seen()
        stream: dict[str, Tensor] = {}

        def see_tokens(value: Tensor, hook: HookPoint | None = None) -> None:
            seen.see_tokens(value)

        def see_positions(value: Tensor, hook: HookPoint | None = None) -> None:
            seen.see_positions(value)

        def see_stream(value: Tensor, hook: HookPoint | None = None) -> None:
            stream["now"] = value

        def edit_read(value: Tensor, hook: HookPoint | None = None) -> Tensor:
            now = stream["now"]
            return value + self._norm_response(self._change(seen, now), now).to(value.dtype)

        def edit_stream(value: Tensor, hook: HookPoint | None = None) -> Tensor:
            now = value + stream["now"] if self.site.reader == "mlp" else value
            return value + self._change(seen, now).to(value.dtype)

        found: list[tuple[str, Hook]] = [("embed.hook_in", see_tokens), ("pos_embed.hook_in", see_positions)]
        if self.where == "read":
            norm = self.site.norm_hook
            return [*found, (f"{norm}.hook_in", see_stream), (f"{norm}.hook_out", edit_read)]
        if self.site.reader == "mlp":
            layer = f"blocks.{self.site.layer}"
            return [*found, (f"{layer}.ln1.hook_in", see_stream), (f"{layer}.hook_attn_out", edit_stream)]
        return [*found, (self.site.stream_hook, edit_stream)]

    def _change(self, seen: Seen, stream: Float[Tensor, "batch pos d_dense"]) -> Float[Tensor, "batch pos d_dense"]:
        vector = self.source(seen, stream).expand_as(stream)
        if self.positions is None:
            return vector
        return vector * _position_mask(self.positions, seen, stream)[..., None].to(vector)

    def _norm_response(
        self, vector: Float[Tensor, "batch pos d_dense"], stream: Float[Tensor, "batch pos d_dense"]
    ) -> Float[Tensor, "batch pos d_dense"]:
        norm = self._norm()
        std = (stream.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
        return norm.weight.to(vector) * (vector - vector.mean(-1, keepdim=True)) / std

    def _norm(self) -> torch.nn.LayerNorm:
        body: Any = self.run.dense.hf.transformer
        if self.site.is_final:
            return body.ln_f
        block = body.h[self.site.layer]
        return block.ln_2 if self.site.reader == "mlp" else block.ln_1

    def vector(self) -> Float[Tensor, " d_dense"]:
        """What is added, at the mean scale of the stream over held-out text."""
        if self.direction is None:
            raise ValueError("only a fixed delta or vector has one direction; toward and set_to differ at each token")
        if self.where == "stream":
            return self.direction
        centred = self.direction - self.direction.mean()
        return self._norm().weight.detach() * centred / self.run.bridges.std_dense[self.site.index]


class Intervention:
    """A handle that changes nothing by itself.

    A context manager: attaches on enter, removes only its own hooks, also after an exception; nests and can be entered
    again. `a + b` applies both (edits at one place add up, in that order).
    """

    def __init__(self, dense: TransformerBridge, edits: tuple[Edit, ...]) -> None:
        self.dense, self.edits = dense, edits
        self._attached: list[list[tuple[HookPoint, LensHandle]]] = []

    def hooks(self) -> list[tuple[str, Hook]]:
        """Hooks for `dense.run_with_hooks(tokens, fwd_hooks=handle.hooks())`."""
        return [pair for edit in self.edits for pair in edit.hooks()]

    def vector(self) -> Float[Tensor, " d_dense"]:
        """The dense direction of a single edit: behind the norm for where="read", in the stream for "stream".

        Raises ValueError for a sum of edits and for those that differ from token to token.
        """
        if len(self.edits) != 1:
            raise ValueError(f"a sum of {len(self.edits)} edits has no one direction: ask each of them")
        return self.edits[0].vector()

    def __add__(self, other: "Intervention") -> "Intervention":
        if other.dense is not self.dense:
            raise ValueError("the two interventions belong to different models: build both on the same one")
        return Intervention(self.dense, self.edits + other.edits)

    def __enter__(self) -> "Intervention":
        added: list[tuple[HookPoint, LensHandle]] = []
        self._attached.append(added)
        points = self.dense.hook_dict
        try:
            for name, function in self.hooks():
                # Permanent for TransformerLens, so that run_with_hooks and reset_hooks inside the block leave it alone.
                added.append((points[name], points[name].add_hook(function, is_permanent=True)))
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for point, handle in self._attached.pop():
            handle.hook.remove()
            point.fwd_hooks = [h for h in point.fwd_hooks if h is not handle]


def intervene(
    dense: TransformerBridge,
    channel: str | Channel,
    *,
    delta: int | float | Float[Tensor, " batch"] | None = None,
    set_to: int | float | None = None,
    toward: Int[Tensor, "batch pos"] | None = None,
    strength: int | float = 1.0,
    positions: Positions = None,
    where: Where = "read",
) -> Intervention:
    """An intervention that moves a sparse channel of a dense model from `load_dense`.

    channel: a name from channels.json, an address such as "attn.1.read.146", or a Channel.
    delta: change in units of the channel's post-norm activation; a number, or one per batch row.
    set_to: the value to which the channel moves, as the encoder reads it from the dense stream.
    toward: counterfactual tokens, aligned with the prompt; strength 0 .. 1 scales the per-token difference.
    positions: where in the sequence, absolute also under a KV cache; an index, slice, list, boolean mask [batch, pos],
        or a callable from tokens [batch, pos] to such a mask. Everywhere when None.
    where: "read", only the next sublayer's input, or "stream", everything downstream.

    Raises KeyError for an unknown channel, ValueError for anything else that does not fit.
    """
    bundle = get_bundle(dense)
    if isinstance(channel, str):
        channel = resolve(channel, bundle.channels, bundle.run.sparse)
    site = Site(channel.site, bundle.run.sparse.n_layers)
    if sum(x is not None for x in (delta, set_to, toward)) != 1:
        raise ValueError("give exactly one of delta, set_to, toward")
    _check_where(where)
    if not torch.isfinite(bundle.run.bridges.rms_sparse).all():
        raise ValueError("the bridges have no scales yet: run scripts/evaluate.py on the run first")
    direction = None
    source: Source
    if delta is not None:
        per_unit = channel_direction(bundle.run, channel)
        source = Delta(per_unit, delta)
        direction = per_unit * delta if isinstance(delta, int | float) else None
    elif set_to is not None:
        source = SetTo(bundle.run, channel, set_to)
    else:
        assert toward is not None
        source = Toward(bundle.run, channel, toward, strength)
    return Intervention(dense, (Edit(bundle.run, site, source, where, positions, direction),))


def intervene_vector(
    dense: TransformerBridge,
    site: int,
    vector: Float[Tensor, "*batch_pos d_dense"],
    *,
    strength: int | float = 1.0,
    positions: Positions = None,
    where: Where = "read",
) -> Intervention:
    """The same handle for a dense stream vector of one's own: [d_dense], or one per token [batch, pos, d_dense].

    Baselines and controls go through it, so that they share every code path with `intervene`.
    """
    bundle = get_bundle(dense)
    _check_where(where)
    if vector.shape[-1] != bundle.run.dense.d_model:
        raise ValueError(f"vector has width {vector.shape[-1]}, the dense stream {bundle.run.dense.d_model}")
    edit = Edit(
        bundle.run,
        Site(site, bundle.run.sparse.n_layers),
        Fixed(vector, strength),
        where,
        positions,
        strength * vector if vector.ndim == 1 else None,
    )
    return Intervention(dense, (edit,))


def _check_where(where: str) -> None:
    if where not in ("read", "stream"):
        raise ValueError(f"where={where!r}: use 'read' (only the next sublayer) or 'stream' (everything downstream)")


def _position_mask(
    positions: Any, seen: Seen, stream: Float[Tensor, "batch pos d_dense"]
) -> Bool[Tensor, "#batch pos"]:
    """Mask over the current call's tokens."""
    assert seen.tokens is not None
    length, now = seen.tokens.shape[1], slice(seen.start, seen.start + stream.shape[1])
    if callable(positions):
        positions = positions(seen.tokens)
    if isinstance(positions, Tensor) and positions.dtype == torch.bool:
        if positions.shape[-1] < length:  # a mask given for the prompt leaves generated tokens alone
            positions = torch.nn.functional.pad(positions, (0, length - positions.shape[-1]))
        return positions.reshape(-1, positions.shape[-1])[:, now].to(stream.device)
    mask = torch.zeros(1, length, dtype=torch.bool, device=stream.device)
    index = positions.tolist() if isinstance(positions, Tensor) else positions
    try:
        mask[:, index if isinstance(index, slice) else torch.as_tensor(index)] = True
    except IndexError as error:
        raise ValueError(f"positions={positions!r} is out of range for {length} tokens") from error
    return mask[:, now]

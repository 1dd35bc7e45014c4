"""Where an intervention's dense vectors come from: each source gives the change of the dense residual stream.

In the sparse model's pre-norm stream a post-norm change of delta is worth about delta * rms_s, so the dense stream
moves by delta * rms_s * W_g[:, c] (paper A.4); rms_s is the sparse stream's RMS at the site over held-out text and W_g
the decoder, without its bias.
"""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bridges.bridge import BridgeSet
from interventions.bundle.channels import Channel, residual_reads
from interventions.editing.seen import Seen

StreamVector = Float[Tensor, "#batch #pos d_dense"]

REPEATED = "beam search and num_return_sequences repeat every prompt row: .repeat_interleave(n, 0) does the same"


@runtime_checkable
class Source(Protocol):
    """Gives the stream change of one pass."""

    def __call__(self, seen: Seen, stream: Float[Tensor, "batch pos d_dense"]) -> StreamVector: ...

    @property
    def is_nothing(self) -> bool:
        """Whether it changes nothing whatever it sees."""

    def direction(self) -> Float[Tensor, " d_dense"] | None:
        """The stream change, where it is the same at every token."""


def stream_change(
    rms: Float[Tensor, ""], deltas: Float[Tensor, "*batch_pos channel"], columns: Float[Tensor, "channel d_dense"]
) -> Float[Tensor, "*batch_pos d_dense"]:
    """The dense stream's change where sparse channels move by `deltas`: rms_s * sum_c delta_c * W[:, c] (paper A.4).

    `columns` are the decoder's, or those of a map that stands in for it.
    """
    return rms * deltas @ columns


def channel_direction(bridges: BridgeSet, channel: Channel) -> Float[Tensor, " d_dense"]:
    """The stream change per unit of a channel: its indices' columns, weighted."""
    return _channel_change(bridges, channel, torch.tensor(channel.weights).to(bridges.rms_sparse))


def _channel_change(
    bridges: BridgeSet, channel: Channel, deltas: Float[Tensor, "*batch_pos channel"]
) -> Float[Tensor, "*batch_pos d_dense"]:
    """The stream change where a channel's indices move by `deltas`."""
    columns = bridges.directions(channel.site)[list(channel.indices)]
    return stream_change(bridges.rms_sparse[channel.site], deltas, columns)


@dataclass(frozen=True)
class Delta:
    """Move a channel by strength * delta: one amount, or one per batch row."""

    bridges: BridgeSet
    channel: Channel
    delta: int | float | Float[Tensor, " batch"]
    strength: int | float

    def __str__(self) -> str:
        amount = f"{self.delta:+g}" if isinstance(self.delta, int | float) else f"{len(self.delta)} amounts"
        return f"{self.channel.name} by {amount}{_times(self.strength)}"

    @property
    def is_nothing(self) -> bool:
        return self.strength == 0 or (not isinstance(self.delta, Tensor) and self.delta == 0)

    def direction(self) -> Float[Tensor, " d_dense"] | None:
        if isinstance(self.delta, Tensor):
            return None
        return self.strength * self.delta * channel_direction(self.bridges, self.channel)

    def __call__(self, seen: Seen, stream: Float[Tensor, "batch pos d_dense"]) -> StreamVector:
        if not isinstance(self.delta, Tensor):
            direction = self.direction()
            assert direction is not None
            return direction.to(stream)[None, None]
        _check_rows("delta", self.delta, stream)
        direction = channel_direction(self.bridges, self.channel).to(stream)
        return self.strength * self.delta.to(stream)[:, None, None] * direction


@dataclass(frozen=True)
class SetTo:
    """Move a channel, as the encoder reads it from the dense stream, to a value; strength < 1 goes part of the way."""

    bridges: BridgeSet
    channel: Channel
    value: int | float | Float[Tensor, " batch"]
    strength: int | float

    def __str__(self) -> str:
        return f"{self.channel.name} to {self.value:g}{_times(self.strength)}"

    @property
    def is_nothing(self) -> bool:
        return self.strength == 0

    def direction(self) -> Float[Tensor, " d_dense"] | None:
        return None

    def __call__(self, seen: Seen, stream: Float[Tensor, "batch pos d_dense"]) -> StreamVector:
        # The bridges stay in their own precision and on their own device; the dense model may be elsewhere.
        encoded = self.bridges.encode(self.channel.site, stream.to(self.bridges.rms_sparse))
        normalized = encoded / encoded.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-12)
        value = self.value
        if isinstance(value, Tensor):
            _check_rows("set_to", value, stream)
            value = value.to(normalized)[:, None]
        change = self.strength * (value - self.channel.value(normalized))
        return (change[..., None] * channel_direction(self.bridges, self.channel)).to(stream)


class Toward:
    """Move a channel's indices towards their values on counterfactual tokens, token by token.

    delta is the sparse model's activation on the counterfactual minus that on the tokens presented, times strength.
    """

    def __init__(self, models: Any, channel: Channel, tokens: Int[Tensor, "batch pos"], strength: int | float) -> None:
        # Anything with `bridges` and `sparse`. Not annotated: the class of a run needs TransformerLens to be imported.
        self.models, self.channel, self.tokens, self.strength = models, channel, tokens, strength
        self._last: tuple[Tensor, Tensor | None, Tensor] | None = None

    def __str__(self) -> str:
        return f"{self.channel.name} toward a counterfactual{_times(self.strength)}"

    @property
    def is_nothing(self) -> bool:
        return self.strength == 0

    def direction(self) -> Float[Tensor, " d_dense"] | None:
        return None

    def __call__(self, seen: Seen, stream: Float[Tensor, "batch pos d_dense"]) -> StreamVector:
        call, columns = seen.call, seen.prompt(self.tokens.shape[1])
        presented = seen.tokens()[:, :columns]  # less than the prompt where it comes in chunks
        if (presented.shape[0], columns) != self.tokens.shape:
            raise ValueError(
                f"toward has shape {tuple(self.tokens.shape)} but the prompt {(presented.shape[0], columns)}: give "
                "counterfactual tokens of the same batch and length, aligned token by token. Pad the shorter text at "
                f"the place where they differ, or choose a counterfactual of equal length; {REPEATED}"
            )
        real = None if call.real is None else call.real[:, :columns]
        change = self.strength * self._difference(presented, real)
        change = change[:, call.start : call.start + call.length]
        if change.shape[1] < stream.shape[1]:  # generated tokens have no counterfactual
            change = torch.nn.functional.pad(change, (0, 0, 0, stream.shape[1] - change.shape[1]))
        return _channel_change(self.models.bridges, self.channel, change).to(stream)

    def _difference(
        self, presented: Int[Tensor, "batch pos"], real: Bool[Tensor, "batch pos"] | None
    ) -> Float[Tensor, "batch pos channel"]:
        last = self._last  # read once: other threads may set it
        if last is None or not _equal(last[0], presented) or not _equal(last[1], real):
            other = self.tokens[:, : presented.shape[1]]
            with torch.no_grad():
                change = self._read(other, real) - self._read(presented, real)
            # A copy: the caller may write other tokens into the same tensor.
            self._last = last = presented.clone(), real, change
        return last[2]

    def _read(
        self, tokens: Int[Tensor, "batch pos"], real: Bool[Tensor, "batch pos"] | None
    ) -> Float[Tensor, "batch pos channel"]:
        sparse, indices = self.models.sparse, list(self.channel.indices)
        tokens = tokens.to(self.models.bridges.rms_sparse.device)
        if real is None or bool(real.all()):
            return residual_reads(sparse, tokens, self.channel.site)[..., indices]
        # The sparse model has no attention mask: each row goes through it without its padding.
        read = torch.zeros(*tokens.shape, len(indices), device=tokens.device)
        for row, kept in zip(read, zip(tokens, real.to(tokens.device), strict=True), strict=True):
            row[kept[1]] = residual_reads(sparse, kept[0][kept[1]][None], self.channel.site)[0, :, indices]
        return read


@dataclass(frozen=True)
class Fixed:
    """A dense vector of one's own: the same everywhere [d_dense], or one per token [batch, pos, d_dense]."""

    vector: Float[Tensor, "*batch_pos d_dense"]
    strength: int | float

    def __str__(self) -> str:
        return f"a vector of length {float(self.vector.norm(dim=-1).mean()):.3g}{_times(self.strength)}"

    @property
    def is_nothing(self) -> bool:
        return self.strength == 0

    def direction(self) -> Float[Tensor, " d_dense"] | None:
        return self.strength * self.vector if self.vector.ndim == 1 else None

    def __call__(self, seen: Seen, stream: Float[Tensor, "batch pos d_dense"]) -> StreamVector:
        vector = self.strength * self.vector.to(stream)
        if vector.ndim == 1:
            return vector[None, None]
        call, columns = seen.call, seen.prompt(self.vector.shape[-2])
        vector = vector.reshape(-1, *vector.shape[-2:])
        if vector.shape[0] not in (1, stream.shape[0]) or vector.shape[1] < columns:
            raise ValueError(
                f"vector has shape {tuple(self.vector.shape)} but the prompt {(stream.shape[0], columns)}: give "
                f"one vector per token of the prompt, or one for all ({REPEATED})"
            )
        vector = vector[:, call.start : call.start + call.length]
        # Generated tokens have none of their own.
        return torch.nn.functional.pad(vector, (0, 0, 0, call.length - vector.shape[1]))


def _times(strength: int | float) -> str:
    return "" if strength == 1 else f" times {strength:g}"


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def _check_rows(name: str, amount: Float[Tensor, " rows"], stream: Float[Tensor, "batch pos d_dense"]) -> None:
    if amount.shape[0] not in (1, stream.shape[0]):
        raise ValueError(
            f"{name} has {amount.shape[0]} rows but the batch has {stream.shape[0]}: give one each ({REPEATED})"
        )

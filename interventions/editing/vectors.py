"""Where an intervention's dense vectors come from: each source gives the change of the dense residual stream.

In the sparse model's pre-norm stream a change delta of what is read of channel c is worth delta * rms_s, so the dense
stream moves by delta * rms_s * W_g[:, c] (paper A.4), with W_g the decoder, without its bias. rms_s is the sparse
stream's RMS at that very token: as the encoder reads it from the dense stream there, or, for `toward`, the sparse
model's own on the tokens presented. With units="paper" it is the mean over held-out text, at every token the same.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bridges.bridge import BridgeSet
from interventions.bundle.channels import Channel, reads_and_rms, stream_rms
from interventions.editing.seen import Seen
from interventions.editing.units import Units

StreamVector = Float[Tensor, "#batch #pos d_dense"]

REPEATED = "beam search and num_return_sequences repeat every prompt row: .repeat_interleave(n, 0) does the same"


@runtime_checkable
class Source(Protocol):
    """Gives the stream change of one pass."""

    @property
    def units(self) -> Units:
        """paper: a read edit, too, goes by the dense norm's mean scale."""

    def __call__(self, seen: Seen, stream: Float[Tensor, "batch pos d_dense"]) -> StreamVector: ...

    @property
    def is_nothing(self) -> bool:
        """Whether it changes nothing whatever it sees."""

    def direction(self) -> Float[Tensor, " d_dense"] | None:
        """The stream change, where it is the same at every token."""


def channel_direction(bridges: BridgeSet, channel: Channel) -> Float[Tensor, " d_dense"]:
    """The dense stream's change where a channel moves the sparse *stream* by 1: its indices' columns, weighted."""
    return torch.tensor(channel.weights).to(bridges.rms_sparse) @ _columns(bridges, channel)


def _columns(bridges: BridgeSet, channel: Channel) -> Float[Tensor, "channel d_dense"]:
    return bridges.directions(channel.site)[list(channel.indices)]


def encoded_value(
    bridges: BridgeSet, channel: Channel, stream: Float[Tensor, "*batch_pos d_dense"]
) -> tuple[Float[Tensor, "*batch_pos"], Float[Tensor, "*batch_pos 1"]]:
    """A channel's value as the encoder reads it from the dense stream, and the sparse RMS that it is in units of."""
    # The bridges stay in their own precision and on their own device; the dense model may be elsewhere.
    encoded = bridges.encode(channel.site, stream.to(bridges.rms_sparse))
    rms = stream_rms(encoded)
    return channel.value(encoded / rms), rms


@dataclass(frozen=True)
class Delta:
    """Move a channel by strength * delta: one amount, or one per batch row."""

    bridges: BridgeSet
    channel: Channel
    delta: int | float | Float[Tensor, " batch"]
    strength: int | float
    units: Units = "exact"

    def __str__(self) -> str:
        amount = f"{self.delta:+g}" if isinstance(self.delta, int | float) else f"{len(self.delta)} amounts"
        return f"{self.channel.name} by {amount}{_times(self.strength)}"

    @property
    def is_nothing(self) -> bool:
        return self.strength == 0 or (not isinstance(self.delta, Tensor) and self.delta == 0)

    def direction(self) -> Float[Tensor, " d_dense"] | None:
        if isinstance(self.delta, Tensor):
            return None
        rms = self.bridges.rms_sparse[self.channel.site]
        return self.strength * self.delta * rms * channel_direction(self.bridges, self.channel)

    def __call__(self, seen: Seen, stream: Float[Tensor, "batch pos d_dense"]) -> StreamVector:
        delta: Any = self.delta
        if isinstance(delta, Tensor):
            _check_rows("delta", delta, stream)
            delta = delta.to(self.bridges.rms_sparse)[:, None, None]
        rms = _rms(self.units, self.bridges, self.channel, stream)
        return (self.strength * delta * rms * channel_direction(self.bridges, self.channel)).to(stream)


@dataclass(frozen=True)
class SetTo:
    """Move a channel, as the encoder reads it from the dense stream, to a value; strength < 1 goes part of the way."""

    bridges: BridgeSet
    channel: Channel
    value: int | float | Float[Tensor, " batch"]
    strength: int | float
    units: Units = "exact"

    def __str__(self) -> str:
        return f"{self.channel.name} to {self.value:g}{_times(self.strength)}"

    @property
    def is_nothing(self) -> bool:
        return self.strength == 0

    def direction(self) -> Float[Tensor, " d_dense"] | None:
        return None

    def __call__(self, seen: Seen, stream: Float[Tensor, "batch pos d_dense"]) -> StreamVector:
        now, rms = encoded_value(self.bridges, self.channel, stream)
        if self.units == "paper":
            rms = self.bridges.rms_sparse[self.channel.site]
        value = self.value
        if isinstance(value, Tensor):
            _check_rows("set_to", value, stream)
            value = value.to(now)[:, None]
        change = self.strength * (value - now)
        return (change[..., None] * rms * channel_direction(self.bridges, self.channel)).to(stream)


def _rms(units: Units, bridges: BridgeSet, channel: Channel, stream: Tensor) -> Tensor:
    """The sparse stream's RMS: at every token as the encoder reads it, or the mean over held-out text."""
    if units == "paper":
        return bridges.rms_sparse[channel.site][None, None, None]
    return encoded_value(bridges, channel, stream)[1]


class Toward:
    """Move a channel's indices towards their values on counterfactual tokens, token by token.

    delta is the sparse model's read on the counterfactual minus that on the tokens presented, times strength, in units
    of the RMS of its stream on the tokens presented.
    """

    def __init__(
        self,
        models: Any,
        channel: Channel,
        tokens: Int[Tensor, "batch pos"],
        strength: int | float,
        units: Units = "exact",
    ) -> None:
        # Anything with `bridges` and `sparse`. Not annotated: the class of a run needs TransformerLens to be imported.
        self.models, self.channel, self.tokens, self.strength, self.units = models, channel, tokens, strength, units
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
        return (change @ _columns(self.models.bridges, self.channel)).to(stream)

    def _difference(
        self, presented: Int[Tensor, "batch pos"], real: Bool[Tensor, "batch pos"] | None
    ) -> Float[Tensor, "batch pos channel"]:
        """How far the indices move in the sparse stream."""
        last = self._last  # read once: other threads may set it
        if last is None or not _equal(last[0], presented) or not _equal(last[1], real):
            other = self.tokens[:, : presented.shape[1]]
            with torch.no_grad():
                there, (here, rms) = self._read(other, real)[0], self._read(presented, real)
                if self.units == "paper":
                    rms = self.models.bridges.rms_sparse[self.channel.site]
                change = rms * (there - here)
            # A copy: the caller may write other tokens into the same tensor.
            self._last = last = presented.clone(), real, change
        return last[2]

    def _read(
        self, tokens: Int[Tensor, "batch pos"], real: Bool[Tensor, "batch pos"] | None
    ) -> tuple[Float[Tensor, "batch pos channel"], Float[Tensor, "batch pos 1"]]:
        """Reads of the indices, and the RMS of the stream; zeros at padding."""
        sparse, site, indices = self.models.sparse, self.channel.site, list(self.channel.indices)
        tokens = tokens.to(self.models.bridges.rms_sparse.device)
        if real is None or bool(real.all()):
            read, rms = reads_and_rms(sparse, tokens, site)
            return read[..., indices], rms
        # The sparse model has no attention mask: each row goes through it without its padding.
        reads, scales = (torch.zeros(*tokens.shape, width, device=tokens.device) for width in (len(indices), 1))
        for row, kept in enumerate(real.to(tokens.device)):
            read, rms = reads_and_rms(sparse, tokens[row][kept][None], site)
            reads[row, kept], scales[row, kept] = read[0, :, indices], rms[0]
        return reads, scales


@dataclass(frozen=True)
class Fixed:
    """A dense vector of one's own: the same everywhere [d_dense], or one per token [batch, pos, d_dense]."""

    vector: Float[Tensor, "*batch_pos d_dense"]
    strength: int | float
    units: ClassVar[Units] = "exact"

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

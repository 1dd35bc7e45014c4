"""Where an intervention's dense vectors come from: each source gives the change of the dense residual stream.

In the sparse model's pre-norm stream a post-norm change of delta is worth about delta * rms_s, so the dense stream
moves by delta * rms_s * W_g[:, c] (paper A.4); rms_s is the sparse stream's RMS at the site over held-out text and W_g
the decoder, without its bias.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from bridges.run import Run
from interventions.channels import Channel, read_nodes

StreamVector = Float[Tensor, "#batch #pos d_dense"]


class Seen:
    """What one forward pass (or one generation) has shown to the hooks so far."""

    def __init__(self) -> None:
        self.tokens: Int[Tensor, "batch all_pos"] | None = None
        self.positions: Int[Tensor, "#batch pos"] | None = None
        self.start = 0
        """Index of the current call's first token within `tokens`; above 0 with a KV cache."""

    def see_tokens(self, tokens: Int[Tensor, "batch pos"]) -> None:
        """Note the tokens of one call; `see_positions` then says whether they continue the last ones."""
        self._new = tokens

    def see_positions(self, positions: Int[Tensor, "#batch pos"]) -> None:
        """Note the call's position ids: a call that does not start a sequence continues the last one."""
        self.positions = positions
        continues = self.tokens is not None and int(positions[:, 0].min()) > 0
        self.start = self.tokens.shape[1] if continues and self.tokens is not None else 0
        self.tokens = torch.cat([self.tokens, self._new], 1) if self.start and self.tokens is not None else self._new


@runtime_checkable
class Source(Protocol):
    """Gives the stream change of one call."""

    def __call__(self, seen: Seen, stream: Float[Tensor, "batch pos d_dense"]) -> StreamVector: ...


def unit_directions(run: Run, channel: Channel) -> Float[Tensor, "channel d_dense"]:
    """rms_s * W_g[:, c] for each index of a channel: the stream change per unit of its activation."""
    return run.bridges.rms_sparse[channel.site] * run.bridges.directions(channel.site)[list(channel.indices)]


def channel_direction(run: Run, channel: Channel) -> Float[Tensor, " d_dense"]:
    """The stream change per unit of a channel: its indices' directions, weighted."""
    directions = unit_directions(run, channel)
    return torch.tensor(channel.weights).to(directions) @ directions


@dataclass(frozen=True)
class Delta:
    """Move a channel by a fixed amount, or by one amount per batch row."""

    direction: Float[Tensor, " d_dense"]
    """Stream change per unit of the channel."""
    delta: int | float | Float[Tensor, " batch"]

    def __call__(self, seen: Seen, stream: Float[Tensor, "batch pos d_dense"]) -> StreamVector:
        direction = self.direction.to(stream)
        if isinstance(self.delta, Tensor):
            if self.delta.shape[0] not in (1, stream.shape[0]):
                raise ValueError(
                    f"delta has {self.delta.shape[0]} rows but the batch has {stream.shape[0]}: give one each"
                )
            return self.delta.to(stream)[:, None, None] * direction
        return (self.delta * direction)[None, None]


@dataclass(frozen=True)
class SetTo:
    """Move a channel, as the encoder reads it from the dense stream, to a value."""

    run: Run
    channel: Channel
    value: int | float

    def __call__(self, seen: Seen, stream: Float[Tensor, "batch pos d_dense"]) -> StreamVector:
        encoded = self.run.bridges.encode(self.channel.site, stream)
        normalized = encoded / encoded.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-12)
        change = self.value - self.channel.value(normalized)
        return change[..., None] * channel_direction(self.run, self.channel).to(stream)


class Toward:
    """Move a channel's indices towards their values on counterfactual tokens, token by token.

    delta is the sparse model's activation on the counterfactual minus that on the tokens presented, times strength.
    """

    def __init__(self, run: Run, channel: Channel, tokens: Int[Tensor, "batch pos"], strength: int | float) -> None:
        self.run, self.channel, self.tokens, self.strength = run, channel, tokens, strength
        self._last: tuple[Tensor, Tensor] | None = None

    def __call__(self, seen: Seen, stream: Float[Tensor, "batch pos d_dense"]) -> StreamVector:
        assert seen.tokens is not None
        presented = seen.tokens[:, : self.tokens.shape[1]]
        # Longer is right only when this prompt was seen before and has been continued since.
        continued = self._last is not None and torch.equal(self._last[0], presented)
        if not continued and seen.tokens.shape != self.tokens.shape:
            raise ValueError(
                f"toward has shape {tuple(self.tokens.shape)} but the prompt {tuple(seen.tokens.shape)}: give "
                "counterfactual tokens of the same batch and length, aligned token by token"
            )
        change = self.strength * self._difference(presented).to(stream)
        change = change[:, seen.start : seen.start + stream.shape[1]]
        if change.shape[1] < stream.shape[1]:  # generated tokens have no counterfactual
            change = torch.nn.functional.pad(change, (0, 0, 0, stream.shape[1] - change.shape[1]))
        return einsum(change, unit_directions(self.run, self.channel).to(stream), "b p c, c d -> b p d")

    def _difference(self, presented: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos channel"]:
        if self._last is None or not torch.equal(self._last[0], presented):
            with torch.no_grad():
                nodes = [
                    read_nodes(self.run.sparse, tokens.to(self.run.bridges.rms_sparse.device), self.channel.site)
                    for tokens in (self.tokens, presented)
                ]
            self._last = presented.clone(), (nodes[0] - nodes[1])[..., list(self.channel.indices)]
        return self._last[1]


@dataclass(frozen=True)
class Fixed:
    """A dense vector of one's own: the same everywhere [d_dense], or one per token [batch, pos, d_dense]."""

    vector: Float[Tensor, "*batch_pos d_dense"]
    strength: int | float

    def __call__(self, seen: Seen, stream: Float[Tensor, "batch pos d_dense"]) -> StreamVector:
        vector = self.strength * self.vector.to(stream)
        if vector.ndim == 1:
            return vector[None, None]
        return vector[:, seen.start : seen.start + stream.shape[1]]

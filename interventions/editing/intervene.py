"""intervene(): move a sparse channel and let the dense model follow (paper A.4).

A handle holds edits (`interventions.editing.hooks`), each a source at a site. Entering it attaches their hooks to the
model.

Order: edits act where they sit in the model, so a stream edit is seen by whatever reads later, whatever the order of
`with` blocks or of a sum. At one and the same place edits add up in the order in which they were attached; it matters
only for where="stream": `set_to` reads the stream, and `delta` its scale, as the edits before them have left it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from bridges.sites import Site
from interventions.bundle.bundle import Bundle, check_raw, get_bundle
from interventions.bundle.channels import Channel, resolve
from interventions.editing.hooks import Edit, Hook, Remove, attach, lens_hooks
from interventions.editing.positions import Positions, Steps, check_positions, check_reached
from interventions.editing.saved import load_edits, save_edits
from interventions.editing.units import Units
from interventions.editing.vectors import Delta, Fixed, Seen, SetTo, Source, Toward
from interventions.editing.where import Where

Channels = str | Channel | Mapping[str, int | float] | Sequence[str | Channel]


class Intervention:
    """A handle that changes nothing by itself.

    A context manager: attaches on enter, removes only its own hooks, also after an exception, in whatever order handles
    are left. Entered twice it applies twice, and each exit takes one of them away. `a + b` applies both.

    Leaving a block without an exception raises IndexError for a position that no pass inside it had reached.
    """

    def __init__(self, dense: nn.Module, edits: tuple[Edit, ...]) -> None:
        self.dense, self.edits = dense, edits
        self._attached: list[tuple[list[Remove], list[Seen]]] = []

    def hooks(self) -> list[tuple[str, Hook]]:
        """Hooks for `dense.run_with_hooks(tokens, fwd_hooks=handle.hooks())`, one pass of a TransformerLens model.

        There is no exit that could report a position that was never reached, so the pass itself raises IndexError.
        Raises ValueError for a plain Hugging Face model, which knows no such hooks.
        """
        if isinstance(self.dense, GPT2LMHeadModel):
            raise ValueError("a plain Hugging Face model has no run_with_hooks: enter the handle with `with`")
        check_raw(self.dense)
        return [pair for edit in self.edits for pair in lens_hooks(edit, Seen(one_pass=True))]

    def vector(self) -> Float[Tensor, " d_dense"]:
        """The dense direction that is added: behind the norm for where="read", in the stream for "stream".

        Raises ValueError for edits at several places and for those that differ from token to token.
        """
        if len({(edit.site, edit.where) for edit in self.edits}) != 1:
            raise ValueError("edits at several places have no one direction: ask each of them")
        return torch.stack([edit.vector() for edit in self.edits]).sum(0)

    def save(self, path: str | Path) -> None:
        """Write the folder `path`: settings as JSON, tensors as safetensors, digests of the models it belongs to.

        Raises FileExistsError where something else is, ValueError for positions given as a callable.
        """
        check_raw(self.dense)
        save_edits(Path(path), get_bundle(self.dense), self.edits)

    @classmethod
    def load(cls, path: str | Path, dense: nn.Module) -> "Intervention":
        """Read a saved handle for the model it was saved for, in TransformerLens or as a Hugging Face model.

        Raises ValueError for another model, naming what differs, and for a damaged folder.
        """
        check_raw(dense)
        return cls(dense, load_edits(Path(path), get_bundle(dense)))

    def __add__(self, other: "Intervention") -> "Intervention":
        if other.dense is not self.dense:
            raise ValueError("the two interventions belong to different models: build both on the same one")
        return Intervention(self.dense, self.edits + other.edits)

    def __enter__(self) -> "Intervention":
        check_raw(self.dense)
        removers: list[Remove] = []
        seen = [Seen() for _ in self.edits]
        try:
            for edit, its in zip(self.edits, seen, strict=True):
                removers.extend(attach(self.dense, edit, its))
        except BaseException:
            for remove in removers:
                remove()
            raise
        self._attached.append((removers, seen))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        removers, seen = self._attached.pop()
        for remove in removers:
            remove()
        if kind is None:
            for edit, its in zip(self.edits, seen, strict=True):
                if its.call is not None:
                    check_reached(edit.positions, its)


def intervene(
    dense: nn.Module,
    channel: Channels,
    *,
    delta: int | float | Float[Tensor, " batch"] | None = None,
    set_to: int | float | None = None,
    toward: Int[Tensor, "batch pos"] | None = None,
    strength: int | float = 1.0,
    positions: Positions = None,
    steps: Steps = "all",
    where: Where = "read",
    units: Units = "exact",
) -> Intervention:
    """An intervention that moves sparse channels of a dense model from `load_dense` or `load_hf`.

    channel: a name from channels.json, an address such as "attn.1.read.146", or a Channel; several as a list, or as a
        mapping to weights, which multiply delta, set_to or (for toward) the strength.
    delta: change of the channel's value, in the unit of `Channel.value` of a read; a number, or one per batch row.
    set_to: the value to which the channel moves, from the one that the encoder reads in the dense stream at each token
        (`interventions.editing.vectors.encoded_value`).
    toward: counterfactual tokens, aligned with the prompt token by token, padding included; generated tokens have no
        counterfactual and stay as they are.
    strength: scales the change: 1 is all of it, 0 leaves the model as without the handle.
    positions: where in the sequence; everywhere when None. Absolute, with a KV cache or without: 0 is a row's first
        real token, generated tokens go on counting. Indices and slices (an open end takes in generated tokens) may be
        negative: from the end of the row's prompt. A boolean mask [batch, pos] is laid over the tokens as passed,
        padding included, and leaves later ones alone. A callable takes all tokens so far [batch, pos] to such a mask;
        whether it takes a token must not depend on later ones.
    steps: "prompt", "generated" or "all" tokens. The prompt is the first pass since entering; a pass that begins with
        the same tokens continues it (generation, with a KV cache or without), any other is a new prompt. Of two prompts
        of which one begins the other, the second needs a block of its own.
    where: "read", only the next sublayer's input, or "stream", everything downstream.
    units: "exact", by each token's own scales, or "paper", by their averages over held-out text (A.4).

    Padding is known from the attention mask that the model is given, also by `generate`; it is never edited.
    Beam search works; per-row arguments then need a row per beam, and with a cache a callable is refused.

    Raises KeyError for an unknown channel, IndexError for a position beyond the context (and on leaving the handle for
    one that was not reached), ValueError for anything else that does not fit.
    """
    bundle = get_bundle(dense)
    check_raw(dense)
    if sum(x is not None for x in (delta, set_to, toward)) != 1:
        raise ValueError("give exactly one of delta, set_to, toward")
    _check_places(bundle, positions, steps, where)
    if units not in get_args(Units):
        raise ValueError(f"units={units!r}: use 'exact' (each token's own scales) or 'paper' (their averages)")
    bundle.bridges.check_scales()

    def source(channel: Channel, weight: int | float) -> Source:
        if delta is not None:
            return Delta(bundle.bridges, channel, delta, weight * strength, units)
        if set_to is not None:
            return SetTo(bundle.bridges, channel, weight * set_to, strength, units)
        assert toward is not None
        return Toward(bundle, channel, toward, weight * strength, units)

    chosen = [(_resolved(c, bundle), weight) for c, weight in _weighted(channel)]
    return Intervention(
        dense,
        tuple(
            Edit(bundle, Site(c.site, bundle.shape.n_layers), source(c, weight), where, positions, steps)
            for c, weight in chosen
        ),
    )


def intervene_vector(
    dense: nn.Module,
    site: int,
    vector: Float[Tensor, "*batch_pos d_dense"],
    *,
    strength: int | float = 1.0,
    positions: Positions = None,
    steps: Steps = "all",
    where: Where = "read",
) -> Intervention:
    """The same handle for a dense stream vector of one's own: [d_dense], or one per token [batch, pos, d_dense].

    Baselines and controls go through it, so that they share every code path with `intervene`. Gradients reach the
    vector. Errors as for `intervene`.
    """
    bundle = get_bundle(dense)
    check_raw(dense)
    _check_places(bundle, positions, steps, where)
    if vector.shape[-1] != bundle.bridges.d_dense:
        raise ValueError(f"vector has width {vector.shape[-1]}, the dense stream {bundle.bridges.d_dense}")
    place = Site(site, bundle.shape.n_layers)
    return Intervention(dense, (Edit(bundle, place, Fixed(vector, strength), where, positions, steps),))


def _weighted(channels: Channels) -> list[tuple[str | Channel, int | float]]:
    """Channels with their weights; ValueError for none."""
    if isinstance(channels, str | Channel):
        return [(channels, 1)]
    if not channels:
        raise ValueError("channel is empty: name at least one")
    if isinstance(channels, Mapping):
        return list(channels.items())
    return [(channel, 1) for channel in channels]


def _resolved(channel: str | Channel, bundle: Bundle) -> Channel:
    return resolve(channel, bundle.channels, bundle.shape) if isinstance(channel, str) else channel


def _check_places(bundle: Bundle, positions: Positions, steps: Steps, where: Where) -> None:
    if where not in ("read", "stream"):
        raise ValueError(f"where={where!r}: use 'read' (only the next sublayer) or 'stream' (everything downstream)")
    check_positions(positions, steps, bundle.hf.config.n_positions)

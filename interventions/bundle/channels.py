"""Named channels: sparse residual reads that mean something, found by patching and kept in channels.json.

A channel is one or a few (index, signed weight) pairs at one site. The node is the sparse model's residual read there:
after RMSNorm and AbsTopK, before the norm's gain (which is part of the next matrix). A name may stand for several
indices because one feature is often two opposing channels.
"""

import difflib
import hashlib
import json
import logging
import math
import re
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NotRequired, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import TypedDict

from bridges.sites import Site, all_sites
from interventions.bundle.evidence import Evidence
from sparse_model.io.atomic import write_text
from sparse_model.io.commands import command_line
from sparse_model.io.lock import one_writer
from sparse_model.io.reading import NOTHING_ELSE, read_json, typed

FILE = "channels.json"

logger = logging.getLogger(__name__)
_one_reader = threading.RLock()


@runtime_checkable
class SparseShape(Protocol):
    """What an address needs of the sparse model; `SparseTransformer` and `SparseConfig` both have it."""

    @property
    def n_layers(self) -> int: ...
    @property
    def d_model(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A condition that a channel was chosen by, and what it reached. The threshold belongs to this rule alone."""

    __pydantic_config__ = NOTHING_ELSE

    quantity: str
    """What is compared, in words."""
    bound: Literal["at least", "more than", "at most"]
    threshold: int | float
    reached: int | float

    @property
    def passed(self) -> bool:
        """Whether the channel meets the condition; where no channel does, the search may take one that does not."""
        if self.bound == "at most":
            return self.reached <= self.threshold
        return self.reached > self.threshold if self.bound == "more than" else self.reached >= self.threshold

    @property
    def words(self) -> str:
        """The rule as a sentence without its full stop."""
        quantity = self.quantity[0].upper() + self.quantity[1:]
        return f"{quantity}: {self.reached:.3g} reached, {self.bound} {self.threshold:.3g} asked for"


class _Record(TypedDict, total=False):
    __pydantic_config__ = {"extra": "allow"}  # type: ignore[misc]  # noqa: RUF012

    prompts: str
    file: str
    sha256: str


class _Dose(TypedDict):
    strength: float
    p: NotRequired[float]
    random_p95: NotRequired[float]


class _SiteEffect(TypedDict):
    site: int
    label: str
    p_stream: float
    p_read: float


class Selection(TypedDict, total=False):
    """`Channel.selection` as far as anything reads it."""

    __pydantic_config__ = {"extra": "allow"}  # type: ignore[misc]  # noqa: RUF012

    task: str | None
    prompts: _Record
    criterion: str
    pairs: int
    sets: dict[str, list[int]]
    share: dict[str, float]
    doses: dict[str, _Dose]
    site_effects: list[_SiteEffect]
    single_effect_nats: dict[str, float]
    whole_effect_nats: float


@dataclass(frozen=True, kw_only=True, repr=False)
class Channel:
    """A named direction of the sparse model's read at one site."""

    __pydantic_config__ = NOTHING_ELSE

    name: str
    site: int
    """Residual site, 0 .. 2L."""
    indices: tuple[int, ...]
    """Channels of the sparse residual stream."""
    weights: tuple[float, ...]
    """Signed share of each index in the name's unit; the largest has magnitude 1."""
    description: str = ""
    """What positive values mean."""
    statistics: dict[str, Any] = field(default_factory=dict)
    """Mean activations on the selection prompts, per class."""
    selection: dict[str, Any] = field(default_factory=dict)
    """How the channel was chosen, with the figures."""
    rules: tuple[Rule, ...] = ()
    """The conditions that it was chosen by; none for a channel that was not searched for."""
    evidence: Evidence | None = None
    """What its name is worth on natural text; None where it was not measured."""

    def __post_init__(self) -> None:
        _check_numbers(self)
        if not self.indices or len(self.indices) != len(self.weights):
            raise ValueError(
                f"channel {self.name!r}: {len(self.indices)} indices and {len(self.weights)} weights; need as many, "
                "and at least one"
            )

    def value(self, reads: Float[Tensor, "*batch d_sparse"]) -> Float[Tensor, "*batch"]:
        """The channel's activation, sum_c w_c x_c / sum_c w_c^2, in the unit in which `delta` moves it."""
        weights = torch.tensor(self.weights).to(reads)
        return reads[..., list(self.indices)] @ weights / weights.square().sum()

    @property
    def digest(self) -> str:
        """Of everything that was chosen: a result that names it was steered with this very channel."""
        return _digest(_chosen(asdict(self)))

    @property
    def strength(self) -> float:
        """The strength of `toward` that was chosen for the channel on selection prompts; 1 where none was."""
        dose = self.selection.get("doses", {}).get(str(len(self.indices)), {})
        return float(dose.get("strength", 1.0))

    def __repr__(self) -> str:
        return f"<channel {self}{'; poor evidence' if self.evidence and self.evidence.faults else ''}>"

    def __str__(self) -> str:
        parts = ", ".join(f"{i} ({w:+.2f})" for i, w in zip(self.indices, self.weights, strict=True))
        count = f"{len(self.indices)} channel{'s' if len(self.indices) > 1 else ''}"
        return f"{self.name}: {count} at site {self.site}: {parts}"


def _check_numbers(channel: Channel) -> None:
    """Raise ValueError for numbers that Python would take all the same: -1 for the last channel, True for 1."""
    for what, values in (("site", (channel.site,)), ("index", channel.indices)):
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"channel {channel.name!r}: {what} {value!r} is not an int from 0 on")
    for weight in channel.weights:
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ValueError(f"channel {channel.name!r}: weight {weight!r} is not a finite number")
    if channel.weights and not any(channel.weights):
        raise ValueError(f"channel {channel.name!r}: all its weights are 0, so it has no direction")


def load_channels(folder: Path) -> dict[str, Channel]:
    """The channels of a run by name; none where channels.json does not exist. A damaged file is a ValueError."""
    path = folder / FILE
    if not path.exists():
        return {}
    remedy = f"remove it and run {command_line('find-channel', '--run', folder)} again"
    data = typed(dict[str, dict[str, Any]], read_json(path, remedy), path, remedy)
    digests = {name: entry.pop("digest", None) for name, entry in data.items()}
    _check_evidence(path, data)
    channels = typed(dict[str, Channel], data, path, remedy)
    typed(dict[str, Selection], {name: c.selection for name, c in channels.items()}, path, remedy)
    typed(dict[str, dict[str, list[float]]], {name: c.statistics for name, c in channels.items()}, path, remedy)
    for name, channel in channels.items():
        if name != channel.name:
            raise ValueError(f"{path} is damaged (the channel {channel.name!r} stands under {name!r}): {remedy}")
        if digests[name] not in (None, _digest(_chosen(data[name]))):
            raise ValueError(
                f"{path}: channel {name!r} was changed after it was chosen: {remedy}, or remove its digest to keep it "
                "as your own"
            )
    return {name: _checked(path, channel) for name, channel in channels.items()}


def _chosen(entry: dict[str, Any]) -> dict[str, Any]:
    """A channel without what was measured of it."""
    return {key: value for key, value in entry.items() if key != "evidence"}


def _evidence_digest(chosen: str, evidence: dict[str, Any]) -> str:
    """Of evidence and the digest of the channel that it was measured of."""
    return _digest({"channel": chosen, "evidence": evidence})


def _check_evidence(path: Path, data: dict[str, dict[str, Any]]) -> None:
    """Take the digests of evidence out of channels.json's entries; ValueError for evidence of something else."""
    for name, entry in data.items():
        evidence = entry.get("evidence")
        digest = evidence.pop("digest", None) if isinstance(evidence, dict) else None
        if digest not in (None, _evidence_digest(_digest(_chosen(entry)), evidence or {})):
            raise ValueError(
                f"{path}: the evidence of channel {name!r} was changed, or is another channel's: remove it there, and "
                "measure it again with interventions.channel_evidence"
            )


def _digest(entry: dict[str, Any]) -> str:
    plain = json.loads(json.dumps(entry))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def _checked(path: Path, channel: Channel) -> Channel:
    """A channel without strengths where those are in the units of an earlier version."""
    if "doses" in channel.selection and "units" not in channel.selection:
        logger.warning(
            "%s: the strengths of channel %r are of an earlier version's units and are left out: run %s again",
            path,
            channel.name,
            command_line("find-channel", "--run", path.parent),
        )
        kept = {key: value for key, value in channel.selection.items() if key != "doses"}
        return replace(channel, selection=kept, rules=())
    return channel


def save_channel(folder: Path, channel: Channel) -> None:
    """Add or replace one channel in RUN/channels.json."""
    with one_writer(folder):
        channels = load_channels(folder) | {channel.name: channel}
        entries = {name: _entry(c) for name, c in channels.items()}
        write_text(folder / FILE, json.dumps(entries, indent=1) + "\n")


def _entry(channel: Channel) -> dict[str, Any]:
    entry = asdict(channel) | {"digest": channel.digest}
    if channel.evidence is None:
        return _chosen(entry)
    return entry | {"evidence": entry["evidence"] | {"digest": _evidence_digest(channel.digest, entry["evidence"])}}


def resolve(name: str, channels: Mapping[str, Channel], sparse: SparseShape) -> Channel:
    """A channel by name, or unnamed by address: `attn.3.read.146`, `mlp.0.read.7`, `unembed.read.12`.

    Raises KeyError listing the known and the near names, ValueError for an address out of range.
    """
    if name in channels:
        return channels[name]
    sites = {site.label: site.index for site in all_sites(sparse.n_layers)}
    address = re.fullmatch(r"((?:attn|mlp)\.\d+|unembed)\.read\.(\d+)", name)
    if not address:
        near = difflib.get_close_matches(name, channels, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        known = ", ".join(channels) or "none yet; sparse-bridges find-channel finds some"
        raise KeyError(f"unknown channel {name!r}: {hint}named channels are {known}; or an address like attn.1.read.7")
    label, index = address[1], int(address[2])
    if label not in sites:
        raise ValueError(f"channel {name!r}: the model has no {label}; sites are {', '.join(sites)}")
    if index >= sparse.d_model:
        raise ValueError(f"channel {name!r}: index {index} is out of range, the sparse stream has {sparse.d_model}")
    return Channel(name=name, site=sites[label], indices=(index,), weights=(1.0,))


def read_gain(sparse: Any, site: int) -> Float[Tensor, " d_sparse"]:
    """The gain of the norm that reads at a site of a `SparseTransformer`."""
    # Not annotated, so that plain Hugging Face models can be steered where TransformerLens cannot be imported.
    where = Site(site, sparse.n_layers)
    if where.is_final:
        return sparse.ln_final.weight
    return getattr(sparse.blocks[where.layer], f"ln{1 + site % 2}").weight


def residual_reads(sparse: Any, tokens: Int[Tensor, "batch pos"], site: int) -> Float[Tensor, "batch pos d_sparse"]:
    """Residual reads of a `SparseTransformer` at a site: after RMSNorm and AbsTopK, before the norm's gain."""
    return reads_and_rms(sparse, tokens, site)[0]


def reads_and_rms(
    sparse: Any, tokens: Int[Tensor, "batch pos"], site: int
) -> tuple[Float[Tensor, "batch pos d_sparse"], Float[Tensor, "batch pos 1"]]:
    """The reads, and the RMS of the residual stream that they are taken from: a read times its RMS is in the stream."""
    place = Site(site, sparse.n_layers)
    reader, seen = threading.get_ident(), {}

    def keep(value: Tensor, hook: Any) -> None:
        if threading.get_ident() == reader:  # others may run the model meanwhile, and their passes meet this hook too
            seen[hook.name] = value.detach()

    hooks = [(name, keep) for name in (place.read_hook, place.stream_hook)]
    with _one_reader, sparse.hooks(hooks):  # TransformerLens counts the hooks it takes off by model
        sparse(tokens)
    return without_gain(sparse, site, seen[place.read_hook]), stream_rms(seen[place.stream_hook])


def stream_rms(stream: Float[Tensor, "*batch_pos d_sparse"]) -> Float[Tensor, "*batch_pos 1"]:
    """The RMS that divides a sparse stream where it is read."""
    return stream.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-12)


def without_gain(
    sparse: Any, site: int, hooked: Float[Tensor, "batch pos width"]
) -> Float[Tensor, "batch pos d_sparse"]:
    """What the hook of a site's read holds, in the unit of channels: without the norm's gain and without positions."""
    gain = read_gain(sparse, site)
    return torch.where(gain != 0, hooked[..., : sparse.d_model] / gain, 0)

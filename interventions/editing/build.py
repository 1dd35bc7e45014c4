"""Edits from what a caller or a saved file gives: both go through the same checks."""

from collections.abc import Callable
from typing import Any, get_args

from bridges.sites import Site
from interventions.bundle.bundle import Bundle
from interventions.bundle.channels import Channel
from interventions.editing import arguments
from interventions.editing.hooks import Edit
from interventions.editing.positions import as_positions, check_steps
from interventions.editing.units import Units
from interventions.editing.vectors import Delta, Fixed, SetTo, Source, Toward


def acting(
    bundle: Bundle, positions: Any, steps: Any, where: Any, prompt_length: Any
) -> Callable[[Site, Source], Edit]:
    """What makes edits of sources, all at the same tokens. Raises ValueError or IndexError for what does not fit."""
    if not isinstance(where, str) or where not in ("read", "stream"):
        raise ValueError(f"where={where!r}: use 'read' (only the next sublayer) or 'stream' (everything downstream)")
    check_steps(steps)
    n_ctx = bundle.hf.config.max_position_embeddings
    kept, length = as_positions(positions, n_ctx), arguments.prompt_length(prompt_length, n_ctx)
    return lambda site, source: Edit(bundle, site, source, where, kept, steps, length)  # type: ignore[arg-type]


def make_source(
    bundle: Bundle,
    channel: Channel,
    kind: str,
    given: Any,
    strength: Any,
    weight: int | float = 1,
    units: Any = "exact",
) -> Source:
    """A source that moves a channel: kind is "delta", "set_to" or "toward"."""
    strength = arguments.number("strength", strength)
    if not isinstance(units, str) or units not in get_args(Units):
        raise ValueError(f"units={units!r}: use 'exact' (each token's own scales) or 'paper' (their averages)")
    if kind == "toward":
        config = bundle.hf.config
        tokens = arguments.tokens(given, config.vocab_size, config.max_position_embeddings)
        arguments.check_product("strength", weight, strength)
        return Toward(bundle, channel, tokens, weight * strength, units)  # type: ignore[arg-type]
    amount = arguments.amount(kind, given)
    arguments.check_product(kind, amount, weight, strength)
    if kind == "delta":
        return Delta(bundle.bridges, channel, amount, weight * strength, units)  # type: ignore[arg-type]
    if kind == "set_to":
        return SetTo(bundle.bridges, channel, weight * amount, strength, units)  # type: ignore[arg-type]
    raise ValueError(f"{kind!r} is no kind of change: use delta, set_to, toward or vector")


def make_fixed(bundle: Bundle, vector: Any, strength: Any) -> Source:
    """A source that adds a dense vector of one's own."""
    vector, strength = arguments.vector(vector, bundle.bridges.d_dense), arguments.number("strength", strength)
    arguments.check_product("vector", vector, strength)
    return Fixed(vector, strength)

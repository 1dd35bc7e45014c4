"""intervene(): move a sparse channel and let the dense model follow (paper A.4).

A handle holds edits (`interventions.editing.hooks`), each a source at a site. Entering it attaches their hooks to the
model.

Order: edits act where they sit in the model, so a stream edit is seen by whatever reads later, whatever the order of
`with` blocks or of a sum. At one and the same place edits add up in the order in which they were attached; it matters
only for where="stream": `set_to` reads the stream, and `delta` its scale, as the edits before them have left it.
"""

from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from bridges.sites import Site
from interventions.bundle.bundle import Bundle, check_raw, get_bundle, uncompiled
from interventions.bundle.channels import Channel, resolve
from interventions.bundle.passes import is_entered
from interventions.editing import arguments, given
from interventions.editing.build import acting, make_fixed, make_source
from interventions.editing.entered import Entered, one_pass
from interventions.editing.hooks import Edit, Hook, lens_hooks
from interventions.editing.saved import load_edits, save_edits


class Intervention:
    """A handle that changes nothing by itself.

    A context manager: attaches on enter, removes only its own hooks, also after an exception, in whatever order handles
    are left. Entered twice it applies twice, and each exit takes one of them away. `a + b` applies both.

    It acts on the passes of the thread (or asyncio task) that entered it, and of what copies its context; other threads
    may call the model meanwhile, under handles of their own or none. Under a handle a model from `torch.compile` runs
    uncompiled. Every pass must run each edit: where one did not, as the model was changed inside the block, that pass
    raises RuntimeError.

    Leaving a block without an exception raises IndexError for a position that no pass inside it had reached, and
    RuntimeError where the model ran only in threads that the handle does not reach.
    """

    def __init__(self, dense: nn.Module, edits: tuple[Edit, ...]) -> None:
        self.dense, self.edits = dense, edits
        self._entered: list[Entered] = []

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "a handle belongs to a model in this process and cannot be pickled or copied: keep it with "
            "handle.save(folder), and read it with Intervention.load(folder, dense)"
        )

    def __repr__(self) -> str:
        return f"<intervention: {'; '.join(map(str, self.edits))}>"

    def hooks(self) -> list[tuple[str, Hook]]:
        """Hooks for `dense.run_with_hooks(tokens, fwd_hooks=handle.hooks())`, one pass of a TransformerLens model.

        There is no exit that could report a position that was never reached, so the pass itself raises IndexError.
        TransformerLens attaches them for all threads, so only one thread may run the model with them at a time.
        Raises ValueError for a plain Hugging Face model, which knows no such hooks.
        """
        if isinstance(self.dense, PreTrainedModel):
            raise ValueError("a plain Hugging Face model has no run_with_hooks: enter the handle with `with`")
        check_raw(self.dense)
        return [pair for edit in self.edits for pair in lens_hooks(edit, one_pass(edit), self.dense)]

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
        dense = uncompiled(dense)
        check_raw(dense)
        return cls(dense, load_edits(Path(path), get_bundle(dense)))

    def __add__(self, other: "Intervention") -> "Intervention":
        if other.dense is not self.dense:
            raise ValueError("the two interventions belong to different models: build both on the same one")
        return Intervention(self.dense, self.edits + other.edits)

    def __enter__(self) -> "Intervention":
        check_raw(self.dense)
        self._entered.append(Entered(self.dense, self.edits))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        here = [entered for entered in self._entered if is_entered(entered)]
        entered = (here or self._entered)[-1]  # a handle may be left by another thread than it was entered by
        self._entered.remove(entered)
        entered.close()
        if kind is None:
            entered.check()


def intervene(
    dense: nn.Module,
    channel: given.Channels,
    *,
    delta: given.Amount | None = None,
    set_to: given.Amount | None = None,
    toward: given.Tokens | None = None,
    strength: given.Number = 1.0,
    positions: given.Positions | None = None,
    steps: given.Steps = "all",
    where: given.Where = "read",
    prompt_length: given.Number | None = None,
    units: given.Units = "exact",
) -> Intervention:
    """An intervention that moves sparse channels of a dense model from `load_dense` or `load_hf`.

    channel: a name from channels.json, an address such as "attn.1.read.146", or a Channel; several as a list, or as a
        mapping to weights, which multiply delta, set_to or (for toward) the strength.
    delta: change of the channel's value, in the unit of `Channel.value` of a read; a number, or one per batch row.
    set_to: the value to which the channel moves, from the one that the encoder reads in the dense stream at each token
        (`interventions.editing.vectors.encoded_value`); likewise.
    toward: counterfactual tokens [batch, pos], aligned with the prompt token by token, padding included; generated
        tokens have no counterfactual and stay as they are.
    strength: scales the change: 1 is all of it, 0 leaves the model as without the handle.
    positions: where in the sequence; everywhere when None. Absolute, with a KV cache or without: 0 is a row's first
        real token, generated tokens go on counting; where the model is given position_ids, these. Numbers (one, or a
        list, range, set, array or tensor) and slices (an open end takes in generated tokens) may be negative: from the
        end of the row's prompt. A boolean mask [pos] or [batch, pos] is laid over the tokens as passed, padding
        included, and leaves later ones alone. A callable takes all tokens so far [batch, pos] to such a mask;
        whether it takes a token must not depend on later ones.
    steps: "prompt", "generated" or "all" tokens. The first generated token is chosen at the prompt's last token, which
        "generated" leaves alone: positions=slice(-1, None) edits every token at which a new one is chosen.
    where: "read", only the next sublayer's input, or "stream", everything downstream; `output_hidden_states` shows it.
    units: "exact", by each token's own scales, or "paper", by their averages over held-out text (A.4).
    prompt_length: columns of the prompt, padding included. `generate` tells it by itself, however it feeds the prompt.
        Passes of your own need it where the edit depends on the prompt's end and a pass goes on with a KV cache, or
        with the tokens of an earlier pass in the same block; otherwise a pass is a prompt.

    Padding is known from the attention mask that the model is given, also by `generate`; it is never edited. Where
    tokens look padded and there is no mask, what counts positions is refused.
    Beam search works; per-row arguments then need a row per beam, and with a cache a callable is refused.

    Raises KeyError for an unknown channel, IndexError for a position beyond the context (and on leaving the handle for
    one that was not reached), ValueError for anything else that does not fit.
    """
    dense = uncompiled(dense)
    bundle = get_bundle(dense)
    check_raw(dense)
    kinds = {"delta": delta, "set_to": set_to, "toward": toward}
    named = [kind for kind, value in kinds.items() if value is not None]
    if len(named) != 1:
        raise ValueError("give exactly one of delta, set_to, toward")
    chosen = [(_resolved(c, bundle), weight) for c, weight in _weighted(channel)]
    acts = acting(bundle, positions, steps, where, prompt_length)
    bundle.bridges.check_scales()
    return Intervention(
        dense,
        tuple(
            acts(
                Site(c.site, bundle.shape.n_layers),
                make_source(bundle, c, named[0], kinds[named[0]], strength, weight, units),
            )
            for c, weight in chosen
        ),
    )


def intervene_vector(
    dense: nn.Module,
    site: given.AnySite,
    vector: given.Vector,
    *,
    strength: given.Number = 1.0,
    positions: given.Positions | None = None,
    steps: given.Steps = "all",
    where: given.Where = "read",
    prompt_length: given.Number | None = None,
) -> Intervention:
    """The same handle for a dense stream vector of one's own: [d_dense], or one per token [batch, pos, d_dense].

    site: its number, or its label such as "attn.1". Baselines and controls go through here, so that they share every
    code path with `intervene`. Gradients reach the vector. Errors as for `intervene`.
    """
    dense = uncompiled(dense)
    bundle = get_bundle(dense)
    check_raw(dense)
    acts = acting(bundle, positions, steps, where, prompt_length)
    source = make_fixed(bundle, vector, strength)
    return Intervention(dense, (acts(arguments.site(site, bundle.shape.n_layers), source),))


def _weighted(channels: Any) -> list[tuple[Any, int | float]]:
    """Channels with their weights; ValueError for none, and for what is no channel."""
    if isinstance(channels, str | Channel):
        return [(channels, 1)]
    if not isinstance(channels, Mapping | Sequence | Set) or isinstance(channels, bytes):
        raise ValueError(f"channel={channels!r}: give a name, an address such as 'attn.1.read.7', or several of them")
    if not channels:
        raise ValueError("channel is empty: name at least one")
    if isinstance(channels, Mapping):
        return [(name, arguments.number(f"the weight of {name!r}", weight)) for name, weight in channels.items()]
    return [(channel, 1) for channel in channels]


def _resolved(channel: Any, bundle: Bundle) -> Channel:
    if not isinstance(channel, str | Channel):
        raise ValueError(f"channel {channel!r} is no channel: give a name or an address such as 'attn.1.read.7'")
    resolved = resolve(channel, bundle.channels, bundle.shape) if isinstance(channel, str) else channel
    arguments.check_channel(resolved, bundle.shape)
    return resolved

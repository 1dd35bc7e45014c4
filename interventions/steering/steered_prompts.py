"""P(counterfactual answer) of a task's prompts under many edits, in few passes of the dense model.

1. Prompts are grouped by their length and by their first token that differs from the counterfactual. What comes before
   that token is the same under every edit, so each group's keys and values there are computed once.
2. Edits are stacked as further batch rows. Every pass goes through `intervene_vector`, as a single edit would.
3. Only the logits behind the last token are made.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import DynamicCache, GPT2LMHeadModel

from bridges.run_folder import Run
from interventions.bundle.bundle import Bundle, check_raw, get_bundle, watched
from interventions.editing.hooks import Where
from interventions.editing.intervene import intervene_vector
from interventions.tasks.base import TaskBatch, since_difference

Vectors = Float[Tensor, "prompt pos d_dense"]
"""The change of the dense stream at every token of the prompts: one edit at full strength."""

_TOKENS = 8192  # of a pass; more no longer stay in a CPU core's cache
_ENTRIES = 2**24  # of the edits in memory at a time


class Prompts(NamedTuple):
    """Prompts to steer, their counterfactuals, and the answer that steering should produce."""

    tokens: Int[Tensor, "prompt pos"]
    counterfactual: Int[Tensor, "prompt pos"]
    target: Int[Tensor, " prompt"]
    own_answer: Int[Tensor, " prompt"]
    last: Int[Tensor, " prompt"]

    @property
    def differ(self) -> Bool[Tensor, "prompt pos"]:
        """The tokens that differ from the counterfactual."""
        return self.tokens != self.counterfactual

    @property
    def open(self) -> Bool[Tensor, "prompt pos"]:
        """The tokens from the first that differs to the last: those where an edit can be anything but zero."""
        return since_difference(self.tokens, self.counterfactual, self.last)


def prompts_of(batch: TaskBatch) -> Prompts:
    """Member 0 of every pair, steered towards member 1."""
    return Prompts(batch.tokens[:, 0], batch.tokens[:, 1], batch.answers[:, 1], batch.answers[:, 0], batch.last)


class Answers(NamedTuple):
    """Probabilities behind the last token, under the softmax over the whole vocabulary."""

    target: Float[Tensor, "*edits prompt"]
    """P(counterfactual answer)."""
    two_way: Float[Tensor, "*edits prompt"]
    """P(counterfactual answer) / (P(counterfactual answer) + P(own answer))."""


def plain_model(dense: nn.Module) -> GPT2LMHeadModel:
    """The Hugging Face model inside one from `load_dense`, itself steerable: it runs several times as fast.

    Raises ValueError for a model without bridges, or with processed weights.
    """
    bundle = get_bundle(dense)
    check_raw(dense)
    return steerable(bundle.run)


def steerable(run: Run) -> GPT2LMHeadModel:
    """The dense model of an opened run, as `intervene` takes it."""
    hf: Any = run.dense.hf
    if getattr(hf, "bundle", None) is None:
        hf.bundle = Bundle(run.folder, hf, run.bridges, watched(hf), run)
    return hf


def logits_at(
    hf: GPT2LMHeadModel, tokens: Int[Tensor, "row pos"], positions: Int[Tensor, " row"]
) -> Float[Tensor, "row vocab"]:
    """Logits behind one token of each row; only the columns that are asked for are unembedded."""
    columns, place = positions.unique(return_inverse=True)
    logits = hf(input_ids=tokens, logits_to_keep=columns, use_cache=False).logits
    return logits[torch.arange(len(positions), device=positions.device), place]


class _Group(NamedTuple):
    """Prompts of one length whose edits begin at the same token."""

    rows: Int[Tensor, " row"]
    start: int
    stop: int
    prefix: list[tuple[Tensor, Tensor]]
    """Keys and values of each layer at the tokens before `start`."""


class SteeredPrompts:
    """Answers to the same prompts under edits at one site."""

    @torch.no_grad()
    def __init__(self, hf: GPT2LMHeadModel, prompts: Prompts, site: int, where: Where) -> None:
        self.hf, self.prompts, self.site, self.where = hf, prompts, site, where
        self._groups = list(self._grouped())
        self.base = Answers(torch.zeros(len(prompts.last)), torch.zeros(len(prompts.last)))
        """Without an edit."""
        for group in self._groups:
            for all_rows, some in zip(self.base, self._pass(group, None, 0), strict=True):
                all_rows[group.rows.cpu()] = some

    @torch.no_grad()
    def answers(self, edits: Iterable[Vectors], strengths: Sequence[int | float]) -> Answers:
        """Answers [strength, edit, prompt] under every edit at every strength.

        An edit must be zero before the first token that differs from the counterfactual.
        """
        parts = [self._chunk(torch.stack(chunk), strengths) for chunk in self._chunks(edits)]
        return Answers(*(torch.cat(part, 1) for part in zip(*parts, strict=True)))

    def _chunk(self, edits: Float[Tensor, "edit prompt pos d_dense"], strengths: Sequence[int | float]) -> Answers:
        shape = (len(strengths), len(edits), len(self.prompts.last))
        answers = Answers(*(unsteered.expand(shape).clone() for unsteered in self.base))
        for group in self._groups:
            at_once = max(1, _TOKENS // (len(group.rows) * (group.stop - group.start)))
            group_edits = edits[:, group.rows, : group.stop]
            for number, strength in enumerate(strengths):
                if strength == 0:
                    continue
                passes = [self._pass(group, part, strength) for part in group_edits.split(at_once)]
                for all_rows, some in zip(answers, zip(*passes, strict=True), strict=True):
                    all_rows[number][:, group.rows.cpu()] = torch.cat(some).unflatten(0, (len(edits), -1))
        return answers

    def _pass(
        self, group: _Group, edits: Float[Tensor, "edit row pos d_dense"] | None, strength: int | float
    ) -> Answers:
        """Answers of a group, a row for each edit and prompt."""
        repeats = 1 if edits is None else len(edits)
        rows = group.rows.repeat(repeats)
        arguments: dict[str, Any] = {
            "input_ids": self.prompts.tokens[rows, group.start : group.stop],
            "past_key_values": _repeated(group.prefix, repeats),
            "use_cache": False,
            "logits_to_keep": 1,
        }
        if edits is None:
            logits = self.hf(**arguments).logits
        else:
            with intervene_vector(self.hf, self.site, edits.flatten(0, 1), strength=strength, where=self.where):
                logits = self.hf(**arguments).logits
        p = logits[:, -1].float().softmax(-1)
        target, own = (
            p.gather(1, ids[rows][:, None])[:, 0].cpu() for ids in (self.prompts.target, self.prompts.own_answer)
        )
        return Answers(target, target / (target + own))

    def _grouped(self) -> Iterator[_Group]:
        starts, stops = self.prompts.open.to(torch.uint8).argmax(1), self.prompts.last + 1
        for start, stop in sorted(set(zip(starts.tolist(), stops.tolist(), strict=True))):
            rows = ((starts == start) & (stops == stop)).nonzero().flatten()
            prefix: list[tuple[Tensor, Tensor]] = []
            if start:
                filled = self.hf(input_ids=self.prompts.tokens[rows, :start], use_cache=True, logits_to_keep=1)
                prefix = [(layer.keys, layer.values) for layer in filled.past_key_values.layers]
            yield _Group(rows, start, stop, prefix)

    def _chunks(self, edits: Iterable[Vectors]) -> Iterator[list[Vectors]]:
        size = max(1, _ENTRIES // (self.prompts.tokens.numel() * self.hf.config.n_embd))
        waiting = iter(edits)
        while chunk := list(islice(waiting, size)):
            yield chunk


def _repeated(prefix: list[tuple[Tensor, Tensor]], times: int) -> DynamicCache | None:
    """A KV cache of the prefix, its rows repeated. A pass appends to its cache, so each gets one of its own."""
    if not prefix:
        return None
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(prefix):
        cache.update(keys.repeat(times, 1, 1, 1), values.repeat(times, 1, 1, 1), layer)
    return cache

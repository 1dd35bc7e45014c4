"""P(counterfactual answer) of a task's prompts under many edits, in few passes of the dense model.

1. Prompts are grouped by the number of tokens from the first that differs from the counterfactual to the last. What
   comes before that token or before the site is the same under every edit and computed once
   (`interventions.steering.suffix`).
2. Edits and strengths are further dimensions of a pass, as many as make it large enough.
3. Only the logits behind the last token are made.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from bridges.run_folder import Run
from interventions.bundle.bundle import Bundle, check_raw, get_bundle, watched
from interventions.editing.hooks import Where
from interventions.steering.suffix import Suffix, suffix_of
from interventions.tasks.base import TaskBatch, since_difference

Vectors = Float[Tensor, "prompt pos d_dense"]
"""The change of the dense stream at every token of the prompts: one edit at full strength."""

_TOKENS = 8192  # of a pass; more no longer stay in a CPU core's cache
_ROWS = 32  # of an unedited pass
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


def plain_model(dense: nn.Module) -> PreTrainedModel:
    """The Hugging Face model inside one from `load_dense`, itself steerable: it runs several times as fast.

    Raises ValueError for a model without bridges, or with processed weights.
    """
    bundle = get_bundle(dense)
    check_raw(dense)
    return steerable(bundle.run)


def steerable(run: Run) -> PreTrainedModel:
    """The dense model of an opened run, as `intervene` takes it."""
    hf: Any = run.dense.hf
    if getattr(hf, "bundle", None) is None:
        hf.bundle = Bundle(run.folder, hf, run.bridges, watched(hf), run)
    return hf


def logits_at(
    hf: PreTrainedModel, tokens: Int[Tensor, "row pos"], positions: Int[Tensor, " row"]
) -> Float[Tensor, "row vocab"]:
    """Logits behind one token of each row; only the columns that are asked for are unembedded."""
    columns, place = positions.unique(return_inverse=True)
    logits = hf(input_ids=tokens, logits_to_keep=columns, use_cache=False).logits
    return logits[torch.arange(len(positions), device=positions.device), place]


class _Group(NamedTuple):
    """Prompts of which as many tokens are edited."""

    rows: Int[Tensor, " row"]
    columns: Int[Tensor, "row pos"]
    """The tokens that an edit is given for."""
    suffix: Suffix


class SteeredPrompts:
    """Answers to the same prompts under edits at one site."""

    @torch.no_grad()
    def __init__(self, hf: PreTrainedModel, prompts: Prompts, site: int, where: Where) -> None:
        self.hf, self.prompts, self.site, self.where = hf, prompts, site, where
        self._groups = list(self._grouped())
        self.base = Answers(torch.zeros(len(prompts.last)), torch.zeros(len(prompts.last)))
        """Without an edit."""
        for group in self._groups:
            logits = group.suffix.logits(None, torch.ones(1))[0, 0]
            for all_rows, of_group in zip(self.base, self._answers(group, logits), strict=True):
                all_rows[group.rows.cpu()] = of_group

    @cached_property
    @torch.no_grad()
    def reach(self) -> float:
        """Mean P(counterfactual answer) of the counterfactual prompts themselves: what there is to reach."""
        given = self.prompts
        parts = zip(*(part.split(_ROWS) for part in (given.counterfactual, given.last, given.target)), strict=True)
        p = [
            logits_at(self.hf, tokens, last).float().softmax(-1).gather(1, target[:, None])
            for tokens, last, target in parts
        ]
        return float(torch.cat(p).mean())

    def p_at(self, share: float) -> float:
        """Mean P(counterfactual answer) at a share of the way from the unsteered prompts to their counterfactuals.

        Where many tokens may follow, as in ordinary text, the counterfactual prompts' own P is far from 1.
        """
        base = float(self.base.target.mean())
        return base + share * max(self.reach - base, 0.0)

    @torch.no_grad()
    def answers(self, edits: Iterable[Vectors], strengths: Sequence[int | float]) -> Answers:
        """Answers [strength, edit, prompt] under every edit at every strength.

        An edit must be zero before the first token that differs from the counterfactual.
        """
        parts = [self._chunk(chunk, strengths) for chunk in self._chunks(edits)]
        return Answers(*(torch.cat(part, 1) for part in zip(*parts, strict=True)))

    def _chunk(self, edits: Sequence[Vectors], strengths: Sequence[int | float]) -> Answers:
        shape = (len(strengths), len(edits), len(self.prompts.last))
        answers = Answers(*(unsteered.expand(shape).clone() for unsteered in self.base))
        steered = [number for number, strength in enumerate(strengths) if strength]
        for group in self._groups:
            width = len(group.rows) * group.suffix.tokens_at_once
            group_edits = torch.stack([edit[group.rows[:, None], group.columns] for edit in edits])
            for numbers in _split(steered, max(1, _TOKENS // width)):
                scales = torch.tensor([float(strengths[number]) for number in numbers])
                passes = [
                    self._answers(group, group.suffix.logits(part, scales))
                    for part in group_edits.split(max(1, _TOKENS // (width * len(numbers))))
                ]
                for all_rows, of_group in zip(answers, zip(*passes, strict=True), strict=True):
                    at = torch.tensor(numbers)[:, None, None], torch.arange(len(edits))[:, None], group.rows.cpu()
                    all_rows[at] = torch.cat(of_group, 1)
        return answers

    def _answers(self, group: _Group, logits: Float[Tensor, "*edits row vocab"]) -> Answers:
        p = logits.float().softmax(-1)
        target, own = (
            p.gather(-1, ids[group.rows].expand(p.shape[:-1])[..., None])[..., 0].cpu()
            for ids in (self.prompts.target, self.prompts.own_answer)
        )
        return Answers(target, target / (target + own))

    def _grouped(self) -> Iterator[_Group]:
        starts, stops = self.prompts.open.to(torch.uint8).argmax(1), self.prompts.last + 1
        together = self.hf.config.model_type == "gpt2"
        kinds: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        for start, stop in sorted(set(zip(starts.tolist(), stops.tolist(), strict=True))):
            kinds.setdefault((stop - start,) if together else (start, stop), []).append((start, stop))
        for ends in kinds.values():
            rows = [((starts == start) & (stops == stop)).nonzero().flatten() for start, stop in ends]
            parts = [(self.prompts.tokens[r, :stop], start) for r, (start, stop) in zip(rows, ends, strict=True)]
            suffix = suffix_of(self.hf, parts, self.site, self.where)
            joined = torch.cat(rows)
            back = torch.arange(suffix.tokens_at_once, 0, -1, device=joined.device)
            yield _Group(joined, stops[joined][:, None] - back, suffix)

    def _chunks(self, edits: Iterable[Vectors]) -> Iterator[list[Vectors]]:
        size = max(1, _ENTRIES // (self.prompts.tokens.numel() * self.hf.config.hidden_size))
        waiting = iter(edits)
        while chunk := list(islice(waiting, size)):
            yield chunk


def _split(numbers: list[int], size: int) -> Iterator[list[int]]:
    return (numbers[first : first + size] for first in range(0, len(numbers), size))

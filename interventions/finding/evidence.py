"""The evidence of a named channel: on held-out natural text, does its value say where the task's feature is?

1. Tokens of the run's held-out files are marked by the task's predicate (`interventions.tasks.predicates`), which
   Python's own tokenizer decides.
2. The channel is read twice: as the encoder reads it off the dense model's stream, and in the sparse model. A
   logistic probe of the same dense stream is fitted beside it.
3. The probe and every threshold come from selection files, and all figures from others, in contexts that the task's
   templates do not have, and in all.
"""

import logging
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bridges.hybrid import residuals
from bridges.run_folder import Run
from interventions.bundle.channels import Channel, residual_reads
from interventions.bundle.evidence import Detection, Evidence, Excerpt, MarkedTokens, Readings
from interventions.editing.vectors import encoded_value
from interventions.finding.detection import auc, best_threshold, fit_probe
from interventions.tasks.base import PromptSplit
from interventions.tasks.marked_text import MarkedText, marked_texts
from interventions.tasks.names import NATURAL
from interventions.tasks.of_run import HeldOutTexts, held_out_texts
from interventions.tasks.predicates import INSIDE, OUTSIDE, PREDICATES, TWIN
from sparse_model.data.prepare import corpus_config

logger = logging.getLogger(__name__)

_FEWEST, _PLENTY = 30, 300
_TOKENS_OF_FILE = (1024, 8192)
_MORE = 4
_ROWS = 32
_EXAMPLES = 5
_BEFORE, _BEHIND = 18, 5
_SPLITS: tuple[PromptSplit, PromptSplit] = ("selection", "evaluation")
_NAMES = {INSIDE: "inside", TWIN: "twin", OUTSIDE: "outside"}


def channel_evidence(
    run: Run, channel: Channel, *, tokens: int = 32_768, texts: HeldOutTexts | None = None
) -> Evidence | None:
    """Detection figures of a channel of a run; None, with the reason logged, where there can be none.

    tokens: of each split, selection and evaluation; four times as many where they hold the feature seldom.
    texts: files that nothing was trained on; None: the run's own held-out files, or some of the standard library.

    Raises what `held_out_texts` raises.
    """
    task = _task(channel)
    if task not in PREDICATES:
        logger.info("channel %s: no predicate for task %s, so there is no evidence", channel.name, task)
        return None
    held_out = texts or held_out_texts(corpus_config(run.config, run.samples))
    splits, counts = _marked(run, task, held_out, tokens)
    if _fewest(counts) < _FEWEST:
        logger.warning(
            "channel %s: there is no evidence, for %s give under %d tokens %s in contexts that no template of %s has",
            channel.name,
            held_out.words,
            _FEWEST,
            PREDICATES[task].inside,
            task,
        )
        return None
    selection, evaluation = (_read(run, channel, splits[split]) for split in _SPLITS)
    return _judged(task, held_out.words, counts, selection, evaluation)


def with_evidence(run: Run, channel: Channel) -> Channel:
    """A channel with its evidence; without, and with the reason logged, where the text for it cannot be had."""
    if _task(channel) not in PREDICATES:
        return replace(channel, evidence=channel_evidence(run, channel))  # says why there is none
    try:
        texts = held_out_texts(corpus_config(run.config, run.samples))
    except (OSError, ValueError) as error:
        logger.warning("channel %s: there is no evidence, for there is no natural text: %s", channel.name, error)
        return channel
    return replace(channel, evidence=channel_evidence(run, channel, texts=texts))


def _task(channel: Channel) -> str:
    return str(channel.selection.get("task")).removesuffix(NATURAL)


def _marked(
    run: Run, task: str, held_out: HeldOutTexts, tokens: int
) -> tuple[dict[PromptSplit, MarkedText], dict[str, MarkedTokens]]:
    """The marked tokens of either split: a little of every file, and where that is not enough, more."""
    for most, of_file in zip((tokens, _MORE * tokens), _TOKENS_OF_FILE, strict=True):
        splits = marked_texts(task, held_out.texts, run.tokenizer, run.config.sparse.n_ctx, most, of_file)
        counts = {str(split): _counted(text) for split, text in splits.items()}
        if _fewest(counts) >= _PLENTY:
            break
    return splits, counts


def _fewest(counts: dict[str, MarkedTokens]) -> int:
    return min(min(count.new_inside, count.outside) for count in counts.values())


def _counted(text: MarkedText) -> MarkedTokens:
    def count(label: int, kept: Tensor | bool = True) -> int:
        return int(((text.label == label) & kept).sum())

    return MarkedTokens(
        files=text.files,
        inside=count(INSIDE),
        twin=count(TWIN),
        outside=count(OUTSIDE),
        new_inside=count(INSIDE, text.new),
        new_twin=count(TWIN, text.new),
    )


class _Read(NamedTuple):
    """What is read of the marked tokens of a split."""

    text: MarkedText
    label: Int[Tensor, " token"]
    new: Bool[Tensor, " token"]
    encoder: Float[Tensor, " token"]
    sparse: Float[Tensor, " token"]
    stream: Float[Tensor, "token d_dense"]
    """The dense model's."""


@torch.no_grad()
def _read(run: Run, channel: Channel, text: MarkedText) -> _Read:
    marked = text.label >= 0
    encoder, sparse, stream = [], [], []
    for tokens, kept in zip(text.tokens.split(_ROWS), marked.split(_ROWS), strict=True):
        tokens = tokens.to(run.bridges.rms_sparse.device)
        dense = residuals(run.dense, tokens)[channel.site]
        encoder.append(encoded_value(run.bridges, channel, dense)[0].cpu()[kept])
        sparse.append(channel.value(residual_reads(run.sparse, tokens, channel.site)).cpu()[kept])
        stream.append(dense.float().cpu()[kept])
    values = map(torch.cat, (encoder, sparse, stream))
    return _Read(text, text.label[marked], text.new[marked], *values)


def _judged(task: str, words: str, counts: dict[str, MarkedTokens], selection: _Read, evaluation: _Read) -> Evidence:
    predicate = PREDICATES[task]
    sign = 1 if predicate.member == 0 else -1
    probe = fit_probe(selection.stream, selection.label == INSIDE)
    chosen, values = (
        {"encoder": sign * read.encoder, "sparse": sign * read.sparse, "probe": log_odds}
        for read, log_odds in ((selection, probe.left_out), (evaluation, probe.model(evaluation.stream)))
    )
    kept = selection.new  # thresholds are those of the figures that the verdict is about
    thresholds = {name: best_threshold(v[kept], (selection.label == INSIDE)[kept]) for name, v in chosen.items()}

    def readings(kept: Bool[Tensor, " token"]) -> Readings:
        label = evaluation.label[kept]
        return Readings(**{name: _detection(v[kept], label, thresholds[name]) for name, v in values.items()})

    return Evidence(
        task=task,
        inside=predicate.inside,
        twin=predicate.twin,
        sign=sign,
        text=words,
        **counts,
        new=readings(evaluation.new),
        all=readings(torch.ones_like(evaluation.new)),
        top=_excerpts(evaluation, values["encoder"]),
        bottom=_excerpts(evaluation, values["encoder"], lowest=True),
    )


def _detection(values: Float[Tensor, " n"], label: Int[Tensor, " n"], threshold: float) -> Detection:
    inside, twin, outside = (values[label == kind] for kind in (INSIDE, TWIN, OUTSIDE))
    called = values >= threshold
    hits = int((called & (label == INSIDE)).sum())
    return Detection(
        auc=auc(inside, values[label != INSIDE]),
        auc_twin=auc(inside, twin) if len(twin) else None,
        threshold=threshold,
        precision=hits / max(1, int(called.sum())),
        recall=hits / len(inside),
        inside=float(inside.mean()),
        twin=float(twin.mean()) if len(twin) else None,
        outside=float(outside.mean()),
    )


def _excerpts(read: _Read, values: Float[Tensor, " token"], *, lowest: bool = False) -> tuple[Excerpt, ...]:
    """Where the values are largest, once a row, and once of rows that are alike up to there."""
    rows = torch.full(read.text.label.shape, -torch.inf)
    rows[read.text.label >= 0] = -values if lowest else values
    peak, where = rows.max(1)
    found: dict[tuple[int, ...], Excerpt] = {}
    for row in peak.argsort(descending=True, stable=True).tolist():
        column = int(where[row])
        ids = read.text.tokens[row].tolist()
        before = tuple(ids[max(0, column - _BEFORE) : column])
        excerpt = Excerpt(
            value=float(-peak[row] if lowest else peak[row]),
            label=_NAMES[int(read.text.label[row, column])],
            before=before,
            token=ids[column],
            behind=tuple(ids[column + 1 : column + 1 + _BEHIND]),
        )
        found.setdefault((*before, ids[column]), excerpt)
        if len(found) == _EXAMPLES:
            break
    return tuple(found.values())

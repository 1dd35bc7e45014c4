"""The report's channel pages: activation on code and by task class, dense direction, and what steering does."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from bridges.run_folder import Run
from bridges.sites import Site
from interventions.bundle.channels import FILE, Channel, residual_reads
from interventions.bundle.evidence import Excerpt
from interventions.charts import BLUE, ORANGE, Chart, Series, finite, numbers
from interventions.looking import examples as lens
from interventions.report.generations import Continuation, continuations
from interventions.report.texts import MEMBERS, HeldOut, Text, heads, inline, prompts, visible
from interventions.tasks.base import TaskBatch, since_difference
from interventions.tasks.of_run import recorded_task
from sparse_model.io.commands import command_line

LENS_TOKENS = 8
"""Tokens at either end of the logit lens."""
_DOCUMENTS = 4
_SHOWN_PAIRS = 2
_PAIRS = 64
_BINS = 40


class TokenSpan(NamedTuple):
    """One token of an example, coloured."""

    text: str
    """The token alone; line ends and control characters are made visible."""
    title: str
    """Activation and token id."""
    shade: int
    """Of the colour: tenths of the largest |activation| among the channel's examples, with the activation's sign."""


class Example(NamedTuple):
    """A piece of text coloured by a channel."""

    title: str
    spans: list[TokenSpan]


class Shown(NamedTuple):
    """An excerpt of the evidence as text."""

    value: float
    label: str
    before: str
    token: str
    behind: str


class LensToken(NamedTuple):
    """A token of the dense vocabulary, and the direction's logit for it."""

    text: str
    logit: float


class ChannelPage(NamedTuple):
    """A named channel and where it is active."""

    channel: Channel
    label: str
    """What reads at its site."""
    largest: float
    """Largest |activation| of the examples."""
    top: list[Shown]
    """Of the evidence; none where there is none."""
    bottom: list[Shown]
    examples: list[Example]
    histogram: Chart | None
    lens: tuple[list[LensToken], list[LensToken]] | None
    """Tokens that the direction raises most, and lowers most; None for bridges without scales."""
    continuations: list[Continuation]
    notes: list[str]
    """Why there are no prompts, where there are none."""


def activations(
    run: Run, channel: Channel, tokens: Int[Tensor, " pos"]
) -> tuple[Float[Tensor, " pos"], Float[Tensor, "pos index"]]:
    """A channel's activation at each token (`Channel.value`), and that of each of its indices."""
    device = next(run.sparse.parameters()).device
    with torch.no_grad():
        nodes = residual_reads(run.sparse, tokens[None].to(device), channel.site)[0].cpu()
    return channel.value(nodes), nodes[:, list(channel.indices)]


def channel_pages(run: Run, dense: Any, channels: dict[str, Channel], documents: HeldOut) -> list[ChannelPage]:
    """A page for each channel; `dense` is the run's, from `load_dense`.

    A channel that does not fit the run's models is a ValueError that names channels.json.
    """
    return [_page(run, dense, channel, documents, number) for number, channel in enumerate(channels.values(), 1)]


def _page(run: Run, dense: Any, channel: Channel, documents: HeldOut, number: int) -> ChannelPage:
    if not all(0 <= index < run.sparse.d_model for index in channel.indices):
        raise ValueError(
            f"{run.folder / FILE}: channel {channel.name!r} has indices {channel.indices}, but the sparse stream "
            f"has {run.sparse.d_model} channels: find it again with "
            + command_line("find-channel", "--run", run.folder)
        )
    batch, notes = _batch(run, channel)
    texts = heads(run, documents, _DOCUMENTS)
    if batch:
        texts = [*prompts(run, batch, _SHOWN_PAIRS), *texts]
    values = [activations(run, channel, text.tokens) for text in texts]
    largest = max(float(whole.abs().max()) for whole, _ in values)
    scaled = bool(torch.isfinite(run.bridges.rms_sparse).all())
    if not scaled:
        notes.append("The bridges have no scales (bridges.scales.measure_scales), so nothing is steered.")
    return ChannelPage(
        channel=channel,
        label=Site(channel.site, run.sparse.n_layers).label,
        largest=largest,
        top=_excerpts(run, channel.evidence.top if channel.evidence else ()),
        bottom=_excerpts(run, channel.evidence.bottom if channel.evidence else ()),
        examples=[
            Example(text.title, _spans(run.tokenizer, text, channel, whole, parts, largest))
            for text, (whole, parts) in zip(texts, values, strict=True)
        ],
        histogram=_histogram(run, channel, batch, number) if batch else None,
        lens=logit_lens(run, dense, channel) if scaled else None,
        continuations=continuations(run, dense, channel, batch, texts[-_DOCUMENTS:], largest) if scaled else [],
        notes=notes,
    )


def _excerpts(run: Run, excerpts: Sequence[Excerpt]) -> list[Shown]:
    parts = [[visible(run.tokenizer, ids) for ids in (one.before, (one.token,), one.behind)] for one in excerpts]
    return [Shown(one.value, one.label, *texts) for one, texts in zip(excerpts, parts, strict=True)]


def _batch(run: Run, channel: Channel) -> tuple[TaskBatch | None, list[str]]:
    """Evaluation pairs of a channel's task; or none, and the reason."""
    name = channel.selection.get("task")
    if name is None:
        return None, ["No task is recorded for this channel, so there are none of its prompts to show."]
    try:
        task = recorded_task(run, name, channel.selection.get("prompts", {}))
        return task.sample_up_to(_PAIRS, split="evaluation", seed=run.config.seed), []
    except (LookupError, ValueError, OSError) as error:
        return None, [f"There are no prompts of its task to show: {error.args[0]}"]


def _spans(
    tokenizer: PreTrainedTokenizerFast,
    text: Text,
    channel: Channel,
    whole: Float[Tensor, " pos"],
    parts: Float[Tensor, "pos index"],
    largest: float,
) -> list[TokenSpan]:
    spans = []
    for token, value, each in zip(text.tokens.tolist(), whole.tolist(), parts.tolist(), strict=True):
        title = f"{value:+.3f} · token {token}"
        if len(each) > 1 and any(each):
            title += " · " + ", ".join(f"{i}: {x:+.2f}" for i, x in zip(channel.indices, each, strict=True) if x)
        spans.append(TokenSpan(visible(tokenizer, token), title, shade(value, largest)))
    return spans


def shade(value: float, largest: float) -> int:
    """Tenths of the largest magnitude, signed; at least one for anything but zero."""
    if not value or not largest:
        return 0
    tenths = max(1, round(10 * abs(value) / largest))
    return tenths if value > 0 else -tenths


def _histogram(run: Run, channel: Channel, batch: TaskBatch, number: int) -> Chart:
    """Activations of both classes, from the first token in which a pair's members differ to the last."""
    mask = since_difference(batch.tokens[:, 0], batch.tokens[:, 1], batch.last)
    device = next(run.sparse.parameters()).device
    values = []
    for member in (0, 1):
        with torch.no_grad():
            read = residual_reads(run.sparse, batch.tokens[:, member].to(device), channel.site).cpu()
        values.append(channel.value(read)[mask].numpy())
    both = np.concatenate(values)
    edges = np.histogram_bin_edges(both, _BINS) if both.min() < both.max() else np.linspace(-1, 1, _BINS + 1)
    shares = [np.histogram(part, edges)[0] / len(part) for part in values]
    # A step needs its right edge: the last bin's height is repeated there.
    heights = [numbers([*share.tolist(), float(share[-1])]) for share in shares]
    zeros = ", ".join(f"{(part == 0).mean():.0%} of the {MEMBERS[member]}s'" for member, part in enumerate(values))
    return Chart(
        id=f"histogram-{number}",
        title="By class",
        caption=f"Share of the tokens of either prompt of {len(batch.last)} evaluation pairs, from the first that "
        f"differs to the last. Exactly zero are {zeros}.",
        x=numbers(edges.tolist()),
        x_title="activation",
        y_title="share of tokens",
        series=[
            Series(MEMBERS[0], heights[0], ORANGE, "steps"),
            Series(MEMBERS[1], heights[1], BLUE, "steps"),
        ],
    )


def logit_lens(run: Run, dense: Any, channel: Channel) -> tuple[list[LensToken], list[LensToken]]:
    """What a channel's dense direction adds to the logits, as `interventions.looking.examples.logit_lens` has it."""

    def shown(found: Sequence[lens.LensToken]) -> list[LensToken]:
        return [LensToken(inline(run.tokenizer, one.token), finite(one.logit, 3) or 0.0) for one in found]

    raised, lowered = lens.logit_lens(dense, channel, count=LENS_TOKENS)
    return shown(raised), shown(lowered)

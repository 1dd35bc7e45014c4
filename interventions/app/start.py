"""Where the page starts: a range of delta, and on the channel's first prompt the smallest delta that flips its answer.

1. The range comes from the class means that the channel was found with.
2. The prompt is member 0 of the first evaluation pair of the channel's task, the answer to reach that of member 1.
3. Deltas of both signs, twenty each, are tried at every token of the prompt, all in one pass; of those under which the
   answer to reach is the likeliest next token, the smallest is where the page starts. Where none is, the page starts
   where that answer is likeliest, and says so.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from markupsafe import Markup
from torch import Tensor, nn

from bridges.run_folder import Run
from interventions.app.live import ONE_AT_A_TIME, encode_prompt, own_batch
from interventions.bundle.bundle import get_bundle
from interventions.bundle.channels import Channel
from interventions.editing.intervene import intervene
from interventions.report.texts import inline
from interventions.steering.steered_prompts import plain_model

RUNGS = 20
"""Deltas of either sign that are tried, up to the range's end."""
_UNKNOWN_LARGEST = 10.0
"""Range of delta where nothing was measured: before AbsTopK the sparse reads have an RMS of 1."""
_WIDEST = 6
"""Largest delta in differences of the class means. One is what a counterfactual changes where the prompts differ; the
same amount at every token, and in one sublayer's input only, takes a few to outweigh what the other sublayers see."""


class DeltaRange(NamedTuple):
    """Deltas worth trying, in units of the channel's post-norm activation."""

    largest: float
    """The range is -largest .. largest."""
    means: tuple[float, float] | None
    """The channel's mean in classes 0 and 1 on the selection prompts; None where nothing was measured."""


class Start(NamedTuple):
    """What the page shows first for a channel."""

    delta: float
    words: str
    """Why this delta, as HTML."""


def delta_range(channel: Channel) -> DeltaRange:
    """Deltas worth trying, from the class means that the channel was found with."""
    means = _class_means(channel)
    difference = means[1] - means[0] if means else 0.0
    if not difference:
        return DeltaRange(_UNKNOWN_LARGEST, means)
    return DeltaRange(_rounded_up(_WIDEST * abs(difference)), means)


@torch.no_grad()
def start_of(dense: nn.Module, channel: Channel) -> Start:
    """The delta at which the page starts with a channel, measured on the first of its own prompts with where="read"."""
    run: Run = get_bundle(dense).run
    batch = own_batch(run, channel)
    if batch is None:
        return Start(0.0, "Where to start was not measured: the channel has no prompts of a task of its own.")
    largest = delta_range(channel).largest
    deltas = [round(sign * rung * largest / RUNGS, 6) for rung in range(1, RUNGS + 1) for sign in (1, -1)]
    prompt, wanted = encode_prompt(run, batch.prompts[0][0]), int(batch.answers[0, 1])
    with ONE_AT_A_TIME:
        hf = plain_model(dense)
        rows = prompt.expand(1 + len(deltas), -1).to(hf.device)
        with intervene(hf, channel, delta=torch.tensor([0.0, *deltas])):
            p = hf(input_ids=rows, logits_to_keep=1, use_cache=False).logits[:, -1].softmax(-1).cpu()
    return _choose(deltas, p, wanted, inline(run.tokenizer, wanted), inline(run.tokenizer, int(p[0].argmax())))


def _choose(deltas: list[float], p: Float[Tensor, "row vocab"], wanted: int, answer: str, unsteered: str) -> Start:
    """The smallest delta that works, given each one's next-token probabilities behind the unsteered ones."""
    likeliest = p.argmax(-1).tolist()
    if likeliest[0] == wanted:
        words = Markup("Unsteered, the first of its prompts already ends in <code>{}</code>, the answer to reach.")
        return Start(0.0, words.format(answer))
    working = [delta for delta, token in zip(deltas, likeliest[1:], strict=True) if token == wanted]
    if working:
        delta, step = min(working, key=abs), min(map(abs, deltas))
        words = Markup(
            "{}, the smallest in steps of {:g}, turns <code>{}</code> into <code>{}</code> at the first of its prompts."
        )
        return Start(delta, words.format(_signed(delta), step, unsteered, answer))
    best = int(p[1:, wanted].argmax())
    words = Markup(
        "No delta up to ±{:g} turns <code>{}</code> into <code>{}</code> at the first of its prompts; {} comes "
        "closest, with p = {:.3f}."
    )
    closest = _signed(deltas[best]), float(p[1 + best, wanted])
    return Start(deltas[best], words.format(max(deltas), unsteered, answer, *closest))


def _signed(x: float) -> str:
    return f"{x:+g}".replace("-", "−")


def _class_means(channel: Channel) -> tuple[float, float] | None:
    """Means in the unit of `Channel.value`; None where they were not measured, or not of these indices."""
    values = []
    for member in (0, 1):
        means = channel.statistics.get(f"mean_member_{member}")
        if not isinstance(means, list) or len(means) != len(channel.weights):
            return None
        total = sum(w * x for w, x in zip(channel.weights, means, strict=True))
        values.append(total / sum(w * w for w in channel.weights))
    return (values[0], values[1]) if all(map(math.isfinite, values)) else None


def _rounded_up(x: float) -> float:
    """The next of 1, 2, 5, 10, ..."""
    power = 10.0 ** math.floor(math.log10(x))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= x)

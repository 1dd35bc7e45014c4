"""What steering a channel does to text: greedy continuations of the dense model, unsteered and steered side by side."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from bridges.run_folder import Run
from interventions.bundle.channels import Channel
from interventions.editing.intervene import Intervention, intervene
from interventions.report.texts import MEMBERS, Text, visible
from interventions.tasks.base import TaskBatch

NEW_TOKENS = 16
"""Tokens of a continuation."""
_TASK_PROMPTS = 2
_CODE_PROMPTS = 2
_CODE_TOKENS = 32


class Version(NamedTuple):
    """One continuation."""

    title: str
    text: str
    changed: bool
    """Whether it differs from the unsteered one."""


class Continuation(NamedTuple):
    """A prompt with its continuations, the unsteered one first."""

    title: str
    prompt: str
    variants: list[Version]


def continuations(
    run: Run, dense: Any, channel: Channel, batch: TaskBatch | None, code: Sequence[Text], largest: float
) -> list[Continuation]:
    """Prompts of both classes moved to their counterfactual, and held-out code moved by half of `largest` each way.

    Read edits at full strength. The move towards a counterfactual ends with the prompt; the fixed one goes on over
    generated tokens.
    """
    shown = []
    n_ctx = run.config.sparse.n_ctx
    for pair in range(_TASK_PROMPTS if batch else 0):
        assert batch is not None
        member = pair % 2
        length = int(batch.last[pair]) + 1
        prompt, other = (batch.tokens[pair, m, :length] for m in (member, 1 - member))
        steered = [("toward the counterfactual", intervene(dense, channel, toward=other[None]))]
        shown.append(_continuation(run, dense, f"Evaluation pair {pair + 1}, {MEMBERS[member]}", prompt, steered))
    for text in code[:_CODE_PROMPTS]:
        deltas = (-largest / 2, largest / 2)
        steered = [(f"delta {d:+.2f}".replace("-", "−"), intervene(dense, channel, delta=d)) for d in deltas]
        prompt = text.tokens[: min(_CODE_TOKENS, max(1, n_ctx - NEW_TOKENS))]
        shown.append(_continuation(run, dense, f"{text.title}, beginning", prompt, steered))
    return shown


def _continuation(
    run: Run, dense: Any, title: str, prompt: Int[Tensor, " pos"], steered: list[tuple[str, Intervention]]
) -> Continuation:
    plain = _greedy(run, dense, prompt)
    variants = [Version("unsteered", plain, False)]
    for name, handle in steered:
        with handle:
            text = _greedy(run, dense, prompt)
        variants.append(Version(name, text, text != plain))
    return Continuation(title, visible(run.tokenizer, prompt.tolist()), variants)


@torch.no_grad()
def _greedy(run: Run, dense: Any, prompt: Int[Tensor, " pos"]) -> str:
    room = run.dense.n_ctx - len(prompt)
    if room < 1:
        return "(the prompt fills the context)"
    out = dense.generate(prompt[None], max_new_tokens=min(NEW_TOKENS, room), do_sample=False, verbose=False)
    return visible(run.tokenizer, out[0, len(prompt) :].tolist())

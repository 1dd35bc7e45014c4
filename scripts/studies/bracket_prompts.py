"""The prompts of bracket_counting with any number of names in the list, and how often each token is to count."""

import random
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from interventions.circuits.attention import first_differences
from interventions.circuits.node_model import NodeEdit, NodeModel, device_of
from interventions.tasks.base import PromptSplit, TaskBatch
from interventions.tasks.catalogue import get_task
from sparse_model.config import require
from sparse_model.data.generated_python import NOUNS

SHORT = 3
"""Names in every list of the training text."""


def batches(
    tokenizer: PreTrainedTokenizerFast,
    numbers: Sequence[int],
    *,
    pairs: int,
    split: PromptSplit,
    seed: int,
    n_ctx: int,
    openers: tuple[str, str] = ("[", "[["),
) -> dict[int, TaskBatch]:
    """The same pairs with so many names in their lists; longer lists begin with the names of the shorter ones.

    Leads are those of the task's own prompts, of which the ones that fit the context with the most names are taken.
    """
    most = max(numbers)
    require(most < len(NOUNS), "numbers", most, f"there are {len(NOUNS)} names: at most {len(NOUNS) - 1} in a list")
    rng = random.Random(f"brackets/{split}/{seed}")
    task = get_task("bracket_counting", tokenizer, max_tokens=n_ctx)
    leads = [text.rpartition("\n")[0] for text, _ in task.sample(16 * pairs, split=split, seed=seed).prompts]
    answers = [tokenizer.encode(text, add_special_tokens=False)[-1] for text in ("x]", "x]]")]
    taken = []
    for lead in leads:
        names = rng.sample(NOUNS, most + 1)
        if max(map(len, _encoded(tokenizer, lead, names, most, openers))) <= n_ctx:
            taken.append((lead, names))
    require(
        len(taken) >= pairs,
        "numbers",
        most,
        f"{len(taken)} prompts of {pairs} fit into {n_ctx} tokens with so many names: ask for fewer names",
    )
    return {n: _batch(tokenizer, taken[:pairs], n, openers, answers) for n in numbers}


def _texts(lead: str, names: list[str], number: int, openers: tuple[str, str]) -> tuple[str, str]:
    inside = ", ".join(names[1 : number + 1])
    first, second = (f"{lead}\n{names[0]} = {opener}{inside}" for opener in openers)
    return first, second


def _encoded(
    tokenizer: PreTrainedTokenizerFast, lead: str, names: list[str], number: int, openers: tuple[str, str]
) -> list[list[int]]:
    end = tokenizer.eos_token_id
    texts = _texts(lead, names, number, openers)
    return [[end, *tokenizer.encode(text, add_special_tokens=False)] for text in texts]


def _batch(
    tokenizer: PreTrainedTokenizerFast,
    taken: list[tuple[str, list[str]]],
    number: int,
    openers: tuple[str, str],
    answers: list[int],
) -> TaskBatch:
    rows = [_encoded(tokenizer, lead, names, number, openers) for lead, names in taken]
    require(all(len(a) == len(b) for a, b in rows), "tokenizer", openers, "the two openers must be as many tokens each")
    width, end = max(len(a) for a, _ in rows), tokenizer.eos_token_id
    return TaskBatch(
        tokens=torch.tensor([[ids + [end] * (width - len(ids)) for ids in pair] for pair in rows]),
        answers=torch.tensor(answers).expand(len(rows), 2).clone(),
        last=torch.tensor([len(a) - 1 for a, _ in rows]),
        prompts=[_texts(lead, names, number, openers) for lead, names in taken],
    )


def times(batch: TaskBatch, short: int, number: int) -> Float[Tensor, "row pos"]:
    """How often each token of prompts with `short` names counts where there are to be `number`.

    Names count number/short times, commas (number - 1)/(short - 1) times: what follows the opener, in turn.
    """
    since = torch.arange(batch.tokens.shape[-1]) - first_differences(batch)[:, None]
    inside = (since > 0) & (torch.arange(batch.tokens.shape[-1]) <= batch.last[:, None])
    counts = torch.ones(since.shape)
    counts[inside & (since % 2 == 1)] = number / short
    counts[inside & (since % 2 == 0)] = (number - 1) / (short - 1)
    return counts.repeat_interleave(2, 0)


@torch.no_grad()
def margins(model: NodeModel, batch: TaskBatch, edit: NodeEdit | None = None) -> Float[Tensor, "pair 2"]:
    """Logit of `]]` less that of `]` behind both prompts of each pair."""
    device = device_of(model)
    logits = model.logits(batch.tokens.flatten(0, 1).to(device), edit, batch.last.repeat_interleave(2).to(device))
    return margins_of(logits[:, 0], batch)


def margins_of(logits: Float[Tensor, "row vocab"], batch: TaskBatch) -> Float[Tensor, "pair 2"]:
    """The same from logits at the last tokens."""
    flat, double = batch.answers[0].tolist()
    return (logits[:, double] - logits[:, flat]).unflatten(0, (-1, 2)).cpu()

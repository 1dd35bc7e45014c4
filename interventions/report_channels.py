"""The report's channel pages: each channel's activation, token by token, on prompts of its task and held-out text."""

import random
from itertools import islice
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from bridges.run import Run
from bridges.sites import Site
from interventions.channels import FILE, Channel, read_nodes
from interventions.tasks import get_task
from sparse_model.corpus import iter_documents
from sparse_model.generated import generate_document
from sparse_model.prepare import corpus_config

_MOST_TOKENS = 96  # of a document; a few hundred coloured tokens are a page
_DOCUMENTS = 3
_PAIRS = 2
_VISIBLE = {c: 0x2400 + c for c in range(32) if chr(c) not in "\n\t"} | {ord("\n"): "↵\n"}


class TokenSpan(NamedTuple):
    """One token of an example, coloured."""

    text: str
    """The token alone; line ends and control characters are made visible."""
    title: str
    """Activation and token id."""
    activation: float
    opacity: float
    """Of the colour: |activation| relative to the largest among the channel's examples."""


class Example(NamedTuple):
    """A piece of text coloured by a channel."""

    title: str
    spans: list[TokenSpan]


class ChannelPage(NamedTuple):
    """A named channel and where it is active."""

    channel: Channel
    label: str
    """What reads at its site."""
    largest: float
    """Largest |activation| of the examples."""
    examples: list[Example]
    note: str
    """Why there are no prompts, where there are none."""


class Text(NamedTuple):
    """An example before a channel colours it."""

    title: str
    tokens: Int[Tensor, " pos"]


def activations(
    run: Run, channel: Channel, tokens: Int[Tensor, " pos"]
) -> tuple[Float[Tensor, " pos"], Float[Tensor, "pos index"]]:
    """A channel's activation at each token (`Channel.value`), and that of each of its indices."""
    device = next(run.sparse.parameters()).device
    with torch.no_grad():
        nodes = read_nodes(run.sparse, tokens[None].to(device), channel.site)[0].cpu()
    return channel.value(nodes), nodes[:, list(channel.indices)]


def channel_pages(run: Run, channels: dict[str, Channel]) -> list[ChannelPage]:
    """A page for each channel. One that does not fit the run's models is a ValueError that names channels.json."""
    documents = _documents(run) if channels else []
    pages = []
    for channel in channels.values():
        if not all(0 <= index < run.sparse.d_model for index in channel.indices):
            raise ValueError(
                f"{run.folder / FILE}: channel {channel.name!r} has indices {channel.indices}, but the sparse stream "
                f"has {run.sparse.d_model} channels: find it again with scripts/find_channel.py"
            )
        prompts, note = _prompts(run, channel)
        texts = [*prompts, *documents]
        values = [activations(run, channel, text.tokens) for text in texts]
        largest = max(float(whole.abs().max()) for whole, _ in values)
        examples = [
            Example(text.title, _spans(run.tokenizer, text.tokens, channel, whole, parts, largest))
            for text, (whole, parts) in zip(texts, values, strict=True)
        ]
        pages.append(ChannelPage(channel, Site(channel.site, run.sparse.n_layers).label, largest, examples, note))
    return pages


def _spans(
    tokenizer: PreTrainedTokenizerFast,
    tokens: Int[Tensor, " pos"],
    channel: Channel,
    whole: Float[Tensor, " pos"],
    parts: Float[Tensor, "pos index"],
    largest: float,
) -> list[TokenSpan]:
    spans = []
    for token, value, each in zip(tokens.tolist(), whole.tolist(), parts.tolist(), strict=True):
        text = _decode(tokenizer, token).translate(_VISIBLE)
        title = f"{value:+.3f} · token {token}"
        if len(each) > 1 and any(each):
            title += " · " + ", ".join(f"{i}: {x:+.2f}" for i, x in zip(channel.indices, each, strict=True) if x)
        spans.append(TokenSpan(text, title, value, abs(value) / largest if largest else 0.0))
    return spans


def _decode(tokenizer: PreTrainedTokenizerFast, token: int) -> str:
    text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def _prompts(run: Run, channel: Channel) -> tuple[list[Text], str]:
    """Evaluation prompts of a channel's task, both members of each pair; or none, and the reason."""
    name = channel.selection.get("task")
    if name is None:
        return [], "No task is recorded for this channel, so there are none of its prompts to show."
    try:
        task = get_task(name, run.tokenizer, max_tokens=run.config.sparse.n_ctx)
        batch = task.sample(_PAIRS, split="evaluation", seed=run.config.seed)
    except (KeyError, ValueError) as error:
        return [], f"There are no prompts of its task to show: {error.args[0]}"
    prompts = []
    for pair in range(_PAIRS):
        for member in (0, 1):
            answer = _decode(run.tokenizer, int(batch.answers[pair, member]))
            title = f"Evaluation prompt {pair + 1}, member {member}; right answer: {answer}"
            prompts.append(Text(title, batch.tokens[pair, member, : int(batch.last[pair]) + 1]))
    return prompts, ""


def _documents(run: Run) -> list[Text]:
    """The heads of the first held-out documents; generated ones where the corpus can no longer be read."""
    try:
        kind, documents = (
            "Held-out document",
            list(islice(iter_documents(corpus_config(run.config), "val"), _DOCUMENTS)),
        )
    except (OSError, ValueError):
        rng = random.Random(run.config.seed)
        kind, documents = "Generated document", [generate_document(rng) for _ in range(_DOCUMENTS)]
    longest = min(_MOST_TOKENS, run.config.sparse.n_ctx)
    texts = []
    for number, document in enumerate(documents, 1):
        ids = run.tokenizer.encode(document, add_special_tokens=False, split_special_tokens=True)
        texts.append(Text(f"{kind} {number}", torch.tensor([run.tokenizer.eos_token_id, *ids][:longest])))
    return texts

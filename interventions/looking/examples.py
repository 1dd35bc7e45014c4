"""Where in a text a channel is most active, and what its dense direction says to the vocabulary."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bridges.run_folder import Run
from interventions.bundle.bundle import get_bundle
from interventions.bundle.channels import Channel, resolve
from interventions.editing.vectors import channel_direction
from interventions.looking.activations import Source, activations

_BEFORE, _AFTER = 18, 5  # tokens around an example; what comes later cannot have mattered
_ROWS = 32


class Example(NamedTuple):
    """A token at which a channel is active, with those around it."""

    value: float
    tokens: Int[Tensor, " pos"]
    peak: int
    """Which of the tokens it is."""
    text: str
    """The tokens before it, the token itself in guillemets, and those behind."""

    def __str__(self) -> str:
        return f"{self.value:+.3f}  {self.text!r}"


class LensToken(NamedTuple):
    """A token, and what a direction adds to its logit."""

    token: int
    text: str
    logit: float


def top_examples(
    dense: nn.Module,
    place: str | Channel,
    corpus: Int[Tensor, "row pos"],
    *,
    count: int = 10,
    lowest: bool = False,
    source: Source = "sparse",
) -> list[Example]:
    """Where a channel or node is most active in rows of tokens, at most once a row, the strongest first.

    corpus: such as `prepare_corpus(run.config, run.tokenizer).val`. lowest: where it is most negative instead.
    Raises what `activations` raises.
    """
    run: Run = get_bundle(dense).run
    values = torch.cat([activations(dense, rows.long(), place, source=source).cpu() for rows in corpus.split(_ROWS)])
    peak, where = (-values if lowest else values).max(1)
    examples = []
    for row in peak.argsort(descending=True, stable=True)[:count].tolist():
        if peak[row] <= 0:
            break
        column = int(where[row])
        start = max(0, column - _BEFORE)
        tokens = corpus[row, start : column + 1 + _AFTER].cpu().long()
        examples.append(_example(run, float(values[row, column]), tokens, column - start))
    return examples


def _example(run: Run, value: float, tokens: Int[Tensor, " pos"], peak: int) -> Example:
    before, itself, behind = (run.sparse.to_string(part) for part in tokens.tensor_split([peak, peak + 1]))
    return Example(value, tokens, peak, f"{before}«{itself}»{behind}")


@torch.no_grad()
def logit_lens(dense: nn.Module, channel: str | Channel, *, count: int = 8) -> tuple[list[LensToken], list[LensToken]]:
    """Tokens whose logits one unit of a channel raises most, and lowers most, if it reaches the unembedding as it is.

    Of the decoder's direction, through the final norm's response to a small change at its mean scale over held-out
    text. Raises KeyError for an unknown channel, ValueError for bridges without scales.
    """
    bundle = get_bundle(dense)
    run: Run = bundle.run
    run.bridges.check_scales()
    if isinstance(channel, str):
        channel = resolve(channel, bundle.channels, bundle.shape)
    logits = _direct_logits(run, channel_direction(run.bridges, channel))
    order = logits.argsort(descending=True)

    def tokens(ids: Int[Tensor, " token"]) -> list[LensToken]:
        return [LensToken(i, str(run.tokenizer.decode([i])), float(logits[i])) for i in ids.tolist()]

    return tokens(order[:count]), tokens(order.flip(0)[:count])


def _direct_logits(run: Run, vector: Float[Tensor, " d_dense"]) -> Float[Tensor, " vocab"]:
    anatomy, last = run.dense.anatomy, 2 * run.dense.n_layers
    norm = anatomy.read_norm(last)
    return anatomy.head.weight.float() @ norm.response(vector, run.bridges.norm_scale(last, norm)).float()

"""Generation, token by token, for every model that gives the logits behind what it was given."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

NextLogits = Callable[[Int[Tensor, "batch pos"]], Float[Tensor, "batch d_vocab"]]
"""The logits behind the tokens given: first those of the prompt, then one new token a row."""


class Step(NamedTuple):
    """One step of a generation."""

    logits: Float[Tensor, "batch d_vocab"]
    """What the tokens were taken from."""
    tokens: Int[Tensor, " batch"]
    """The token that each row goes on with."""


def take_tokens(
    logits: Float[Tensor, "batch d_vocab"], temperature: float, generator: torch.Generator | None = None
) -> Int[Tensor, " batch"]:
    """The most likely token of every row at temperature 0, else one drawn; a generator draws on its own device."""
    if temperature == 0:
        return logits.argmax(-1)
    p = (logits / temperature).softmax(-1)
    drawn = torch.multinomial(p.to(generator.device) if generator else p, 1, generator=generator)[:, 0]
    return drawn.to(logits.device)


def generate_steps(
    next_logits: NextLogits,
    tokens: Int[Tensor, "batch pos"],
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> Iterator[Step]:
    """Endless steps behind `tokens`; whoever asks decides when to stop, and a step that nobody asks for is not run."""
    given = tokens
    while True:
        logits = next_logits(given)
        step = Step(logits, take_tokens(logits, temperature, generator))
        yield step
        given = step.tokens[:, None]

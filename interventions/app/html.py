"""What the page shows. Prompts, tokens and names are untrusted: Markup.format escapes whatever it is given.

The continuations are values of gradio's own HighlightedText. The table of next tokens is HTML: gradio's Label rounds to
whole percents, and no component of it puts two distributions side by side.
"""

from typing import Any, NamedTuple

from markupsafe import Markup

from bridges.sites import Site
from interventions.app.live import (
    Comparison,
    Generation,
    Sampling,
    channel_named,
    compare,
    delta_range,
    example_problem,
)
from interventions.bundle.bundle import get_bundle

TITLE = "sparse-bridges"
NEW, OTHER = "generated", "otherwise than unsteered"
"""Categories of a continuation's text."""


class Continuation(NamedTuple):
    """A prompt and what follows it."""

    label: str
    parts: list[tuple[str, str | None]]
    """Text and its category; None for the prompt."""


NOTHING = Continuation("", [])


class Answer(NamedTuple):
    """What the page shows for its controls."""

    html: str
    unsteered: Continuation = NOTHING
    steered: Continuation = NOTHING


def answer(
    dense: Any,
    prompt: str,
    channel: str,
    delta: int | float | None,
    where: Any,
    new_tokens: int | None,
    sample: bool,
    temperature: int | float | None,
    seed: int | None,
) -> Answer:
    """What the page shows for its controls: a comparison, or one sentence on what is wrong with them."""
    try:
        if delta is None or new_tokens is None or temperature is None or seed is None:
            raise ValueError("a number is missing: fill in delta, the new tokens, the temperature and the seed")
        sampling = Sampling(temperature=temperature, seed=seed) if sample else None
        comparison = compare(dense, prompt, channel or "", delta, where=where, new_tokens=new_tokens, sampling=sampling)
        return Answer(next_token(comparison), *continuations(comparison))
    except (ValueError, LookupError) as error:
        message = error.args[0] if isinstance(error, LookupError) and error.args else error
        return Answer(Markup('<div class="sb"><p class="error" role="alert">{}</p></div>').format(str(message)))


def heading(run: str) -> str:
    return Markup(
        '<div class="sb"><h1>{}</h1><p class="quiet">The dense model of <code>{}</code>, moved along a channel of its '
        "sparse model, beside itself.</p></div>"
    ).format(TITLE, run)


def about(dense: Any, name: str) -> str:
    """What is known of a channel."""
    channel = channel_named(dense, name)
    means = delta_range(channel).means
    site = Site(channel.site, get_bundle(dense).shape.n_layers).label
    indices = ", ".join(f"{i} ({signed(w)})" for i, w in zip(channel.indices, channel.weights, strict=True))
    parts = [f"{site}.read: {indices}"]
    if channel.description:
        parts.append(channel.description)
    if means:
        parts.append(f"mean in class 0: {signed(means[0])}, in class 1: {signed(means[1])}")
    problem = example_problem(dense, channel)
    if problem:
        parts.append(f"no prompts of its own task: {problem}")
    lines = Markup("<br>").join(parts)
    return Markup('<div class="sb"><p class="quiet">{}</p></div>').format(lines)


def next_token(comparison: Comparison) -> str:
    """The two distributions of the next token as HTML."""
    rows = comparison.top()
    before, after = (max(rows, key=lambda row: row[side]) for side in (2, 3))
    verdict = Markup("The most likely next token is {} ({}), steered {} ({}).").format(
        token(before.text), number(before.unsteered), token(after.text), number(after.steered)
    )
    table = Markup("").join(
        Markup(
            '<tr><th scope="row">{}</th><td class="bars" aria-hidden="true"><span class="bar plain" '
            'style="--p:{}"></span><span class="bar moved" style="--p:{}"></span></td>'
            '<td class="number">{}</td><td class="number">{}</td></tr>'
        ).format(
            token(row.text), f"{row.unsteered:.4f}", f"{row.steered:.4f}", number(row.unsteered), number(row.steered)
        )
        for row in rows
    )
    return Markup(
        '<div class="sb"><p class="verdict" role="status">{}</p><p class="quiet">KL(unsteered ‖ steered) of the next '
        "token: {} nats</p><h2>Next token</h2><table><thead><tr><th>token</th><th>probability</th>"
        '<th class="number"><span class="key plain"></span>unsteered</th>'
        '<th class="number"><span class="key moved"></span>steered</th></tr></thead><tbody>{}</tbody></table></div>'
    ).format(verdict, f"{comparison.kl:.3f}", table)


def continuations(comparison: Comparison) -> tuple[Continuation, Continuation]:
    """The unsteered and the steered continuation; the steered one is marked from where it departs."""
    plain, moved = comparison.unsteered_generation, comparison.steered_generation
    pairs = zip(plain.text, moved.text, strict=False)
    same = next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(plain.text), len(moved.text)))
    return (
        _continuation("Unsteered", comparison.prompt_text, plain, len(plain.text)),
        _continuation("Steered", comparison.prompt_text, moved, same),
    )


def _continuation(title: str, prompt: str, generation: Generation, same: int) -> Continuation:
    ends = {"length": "", "end of text": ": ended its text", "context": ": stopped at the context's end"}
    parts = [(prompt, None), (generation.text[:same], NEW), (generation.text[same:], OTHER)]
    return Continuation(title + ends[generation.ended], [part for part in parts if part[0]])


def token(text: str) -> Markup:
    return Markup("<code>{}</code>").format(text)


def number(p: float) -> str:
    """A probability."""
    return "<0.001" if 0 < p < 0.0005 else f"{p:.3f}"


def signed(x: float) -> str:
    return f"{x:+.2f}".replace("-", "−")

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
    example_problem,
)
from interventions.app.start import Start, delta_range
from interventions.bundle.bundle import get_bundle
from interventions.report.texts import inline

TITLE = "sparse-bridges"
NEW, OTHER = "generated", "otherwise than unsteered"
"""Categories of a continuation's text."""


_SIDES = {"plain": "unsteered", "moved": "steered", "chance": "random"}
"""Classes of the three models' bars and columns, with their words."""


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
    random: Continuation = NOTHING


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
        handle = f"intervene(dense, {channel!r}, delta={delta:.10g}, where={where!r})"
        return Answer(next_token(comparison, handle), *continuations(comparison))
    except (ValueError, LookupError) as error:
        message = error.args[0] if isinstance(error, LookupError) and error.args else error
        return Answer(Markup('<div class="sb"><p class="error" role="alert">{}</p></div>').format(str(message)))


def heading(run: str) -> str:
    return Markup(
        '<div class="sb"><h1>{}</h1><p class="quiet">The dense model of <code>{}</code>, moved along a channel of its '
        "sparse model; beside it itself, and itself moved as far along a random direction.</p></div>"
    ).format(TITLE, run)


def about(dense: Any, name: str, start: Start) -> str:
    """Where the page starts with a channel, and what is known of it."""
    channel = channel_named(dense, name)
    means = delta_range(channel).means
    site = Site(channel.site, get_bundle(dense).shape.n_layers).label
    indices = ", ".join(f"{i} ({signed(w)})" for i, w in zip(channel.indices, channel.weights, strict=True))
    parts = [start.words, f"{site}.read: {indices}"]
    if channel.description:
        parts.append(channel.description)
    if means:
        parts.append(f"mean in class 0: {signed(means[0])}, in class 1: {signed(means[1])}")
    problem = example_problem(dense, channel)
    if problem:
        parts.append(f"no prompts of its own task: {problem}")
    lines = Markup("<br>").join(parts)
    return Markup('<div class="sb"><p class="quiet">{}</p></div>').format(lines)


def next_token(comparison: Comparison, handle: str) -> str:
    """The distributions of the next token as HTML; `handle` is the call that steers so."""
    rows = comparison.top()
    table = Markup("").join(
        Markup('<tr><th scope="row">{}</th><td class="bars" aria-hidden="true">{}</td>{}</tr>').format(
            token(row.text),
            Markup("").join(
                Markup('<span class="bar {}" style="--p:{}"></span>').format(side, f"{p:.4f}")
                for side, p in zip(_SIDES, row[2:], strict=True)
            ),
            Markup("").join(Markup('<td class="number">{}</td>').format(number(p)) for p in row[2:]),
        )
        for row in rows
    )
    heads = Markup("").join(
        Markup('<th class="number"><span class="key {}"></span>{}</th>').format(side, words)
        for side, words in _SIDES.items()
    )
    return Markup(
        '<div class="sb"><p class="verdict" role="status">{}</p><p class="quiet">KL(unsteered ‖ steered) of the next '
        'token: {} nats; along the random direction {} nats</p><p class="quiet">In Python: <code>{}</code></p>'
        "<h2>Next token</h2><table><thead><tr><th>token</th><th>probability</th>{}</tr></thead>"
        "<tbody>{}</tbody></table></div>"
    ).format(_verdict(comparison), f"{comparison.kl:.3f}", f"{comparison.random_kl:.3f}", handle, heads, table)


def _verdict(comparison: Comparison) -> Markup:
    """The likeliest next token of each."""
    best = (getattr(comparison, side).max(-1) for side in ("unsteered", "steered", "random"))
    found = [(token(inline(comparison.tokenizer, int(at))), number(float(p))) for p, at in best]
    words = "The most likely next token is {} ({}), steered {} ({}), along a random direction as long {} ({})."
    return Markup(words).format(*(part for pair in found for part in pair))


def continuations(comparison: Comparison) -> tuple[Continuation, Continuation, Continuation]:
    """The continuations; the steered ones are marked from where they depart from the unsteered one."""
    plain = comparison.unsteered_generation

    def departing(title: str, generation: Generation) -> Continuation:
        pairs = zip(plain.text, generation.text, strict=False)
        shorter = min(len(plain.text), len(generation.text))
        same = next((at for at, (a, b) in enumerate(pairs) if a != b), shorter)
        return _continuation(title, comparison.prompt_text, generation, same)

    return (
        _continuation("Unsteered", comparison.prompt_text, plain, len(plain.text)),
        departing("Steered", comparison.steered_generation),
        departing("Random direction", comparison.random_generation),
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

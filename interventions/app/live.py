"""One prompt, steered and unsteered: what the page shows, without the page.

1. The prompt is tokenized as for training: end-of-text, then the text. Nothing in it is a special token.
2. The dense model continues it, plainly and with `intervene(channel, delta=...)` at every token, prompt and
   generated. The first pass of each gives the next-token distribution, so that it and the text always agree.
3. Beside them, one random direction, always the same, at every token as long as the channel's change of the dense
   stream: what an edit of this length does whatever it means.
4. Sampling draws all continuations with the same seed: where the distributions are equal, so are the tokens.
"""

import math
import threading
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from bridges.losses import kl
from bridges.run_folder import Run
from interventions.bundle.bundle import get_bundle
from interventions.bundle.channels import Channel, resolve
from interventions.editing.intervene import Intervention, intervene
from interventions.editing.seen import Seen
from interventions.editing.units import Units
from interventions.editing.vectors import Source
from interventions.editing.where import Where
from interventions.report.generations import NEW_TOKENS
from interventions.report.texts import inline, visible
from interventions.steering.rivals import random_directions
from interventions.steering.steered_prompts import plain_model
from interventions.tasks.base import TaskBatch
from interventions.tasks.names import TASK_NAMES
from interventions.tasks.of_run import recorded_task
from sparse_model.model.generation import generate_steps

Ended = Literal["length", "end of text", "context"]

_TOP = 10
_EXAMPLES = 6
_RANDOM_SEED = 0

# Hooks belong to the model: a second thread's pass would be steered by the first one's.
ONE_AT_A_TIME = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn instead of taking the most likely one."""

    temperature: int | float = 1.0
    """Divides the logits; above 0."""
    seed: int = 0
    """Of both continuations; 0 .. 2^63 - 1."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature={self.temperature:g}: give a number above 0, or take the most likely token")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed}: give a whole number from 0 to 2^63 - 1")


class Likely(NamedTuple):
    """A possible next token."""

    token: int
    text: str
    """As the report writes it, on one line: what cannot be seen has a sign. Untrusted: escape it."""
    unsteered: float
    steered: float
    random: float
    """Probabilities under the softmax over the whole vocabulary."""


class Generation(NamedTuple):
    """A continuation."""

    tokens: tuple[int, ...]
    text: str
    """As the report writes it: line ends and control characters have a sign. Untrusted: escape it."""
    ended: Ended
    """length: as many tokens as asked for; end of text: the last token is the model's end; context: no room left."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """What steering a channel does to one prompt."""

    prompt: Int[Tensor, " pos"]
    """Its tokens, end-of-text first."""
    prompt_text: str
    """Without the end-of-text; line ends and control characters have a sign. Untrusted: escape it."""
    unsteered: Float[Tensor, " vocab"]
    steered: Float[Tensor, " vocab"]
    random: Float[Tensor, " vocab"]
    """Probabilities of the next token; `random` under a random direction of the channel's length."""
    kl: float
    random_kl: float
    """KL(unsteered || steered) of the next token, nats, and that of the random direction."""
    unsteered_generation: Generation
    steered_generation: Generation
    random_generation: Generation
    tokenizer: PreTrainedTokenizerFast

    def top(self, count: int = _TOP) -> list[Likely]:
        """The tokens that are likeliest in either distribution, at most `count`.

        Ordered by probability relative to the distribution's own likeliest token: both of these come first.
        """
        both, every = (
            torch.stack(p) for p in ([self.unsteered, self.steered], [self.unsteered, self.steered, self.random])
        )
        shares = both / both.amax(1, keepdim=True)
        order = shares.amax(0).argsort(descending=True, stable=True)[:count]
        return [Likely(t, inline(self.tokenizer, t), *every[:, t].tolist()) for t in order.tolist()]


def compare(
    dense: nn.Module,
    prompt: str,
    channel: str,
    delta: int | float,
    *,
    where: Where = "read",
    new_tokens: int = NEW_TOKENS,
    sampling: Sampling | None = None,
) -> Comparison:
    """Steer a dense model from `load_dense` at every token of a prompt and of what it generates, beside itself.

    The same is done along a random direction of the same length.

    channel: a name of the run or an address such as "mlp.1.read.107"; delta, where: as for `intervene`.
    new_tokens: at most so many; generation also ends with the document or the context. 0 asks for none.
    sampling: None takes the most likely token.

    With delta=0 all are exactly equal. Safe to call from several threads, which then wait for each other.

    Raises KeyError for an unknown channel; ValueError for an empty prompt, one that does not fit into the context, a
    delta that is not finite or so large that the logits are not, and for whatever `intervene` refuses.
    """
    if not math.isfinite(delta):
        raise ValueError(f"delta={delta}: give a finite number")
    if new_tokens < 0:
        raise ValueError(f"new_tokens={new_tokens}: give 0 or more")
    run: Run = get_bundle(dense).run
    ids = encode_prompt(run, prompt)
    with ONE_AT_A_TIME:
        hf = plain_model(dense)
        handle = intervene(hf, channel, delta=delta, where=where)
        plain, plain_tokens = _continue(hf, run, ids, new_tokens, sampling)
        with handle:
            steered, steered_tokens = _continue(hf, run, ids, new_tokens, sampling)
        with random_control(handle):
            random, random_tokens = _continue(hf, run, ids, new_tokens, sampling)
    return Comparison(
        prompt=ids,
        prompt_text=visible(run.tokenizer, ids[1:].tolist()),
        unsteered=plain.softmax(-1),
        steered=steered.softmax(-1),
        random=random.softmax(-1),
        kl=max(0.0, float(kl(plain, steered))),
        random_kl=max(0.0, float(kl(plain, random))),
        unsteered_generation=_generation(run, ids, plain_tokens, new_tokens),
        steered_generation=_generation(run, ids, steered_tokens, new_tokens),
        random_generation=_generation(run, ids, random_tokens, new_tokens),
        tokenizer=run.tokenizer,
    )


@dataclass(frozen=True)
class _EqualLength:
    """A direction of its own, at every token as long as the change that a source makes there."""

    source: Source
    unit: Float[Tensor, " d_dense"]

    @property
    def units(self) -> Units:
        return self.source.units

    @property
    def is_nothing(self) -> bool:
        return self.source.is_nothing

    def direction(self) -> Float[Tensor, " d_dense"] | None:
        own = self.source.direction()
        return None if own is None else own.norm() * self.unit.to(own)

    def __call__(self, seen: Seen, stream: Float[Tensor, "batch pos d_dense"]) -> Float[Tensor, "#batch #pos d_dense"]:
        change = self.source(seen, stream)
        return change.norm(dim=-1, keepdim=True) * self.unit.to(change)


def random_control(handle: Intervention) -> Intervention:
    """A handle along a random direction of the dense stream, always the same, and everywhere as long."""
    generator = torch.Generator().manual_seed(_RANDOM_SEED)
    unit = random_directions(1, get_bundle(handle.dense).bridges.d_dense, generator)[0]
    edits = tuple(replace(edit, source=_EqualLength(edit.source, unit)) for edit in handle.edits)
    return Intervention(handle.dense, edits)


def encode_prompt(run: Run, prompt: str) -> Int[Tensor, " pos"]:
    """End-of-text and the prompt's tokens; what looks like a special token is text.

    Raises ValueError for an empty prompt, one that is no valid Unicode, and one longer than the context.
    """
    if not prompt:
        raise ValueError("the prompt is empty: type some text")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the prompt is not valid Unicode at character {error.start}: type it again") from error
    ids = run.tokenizer.encode(prompt, add_special_tokens=False, split_special_tokens=True)
    n_ctx = run.dense.n_ctx
    if 1 + len(ids) > n_ctx:
        raise ValueError(
            f"the prompt has {len(ids)} tokens, the model's context has room for {n_ctx - 1} after the end-of-text "
            "token: shorten it"
        )
    return torch.tensor([run.tokenizer.eos_token_id, *ids])


@torch.no_grad()
def _continue(
    hf: PreTrainedModel, run: Run, prompt: Int[Tensor, " pos"], new_tokens: int, sampling: Sampling | None
) -> tuple[Float[Tensor, " vocab"], list[int]]:
    """Logits behind the prompt, and the tokens that follow it."""
    generator = torch.Generator().manual_seed(sampling.seed) if sampling else None
    room = min(new_tokens, run.dense.n_ctx - len(prompt))
    cache: Any = None

    def next_logits(given: Int[Tensor, "one pos"]) -> Float[Tensor, "one vocab"]:
        nonlocal cache
        out: Any = hf(input_ids=given.to(hf.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        if not torch.isfinite(out.logits).all():
            raise ValueError("the model's logits are no longer finite numbers: use a smaller delta")
        return out.logits[:, -1].double().cpu()

    steps = generate_steps(next_logits, prompt[None], sampling.temperature if sampling else 0.0, generator)
    first, token = next(steps)
    tokens = [int(token)][:room]
    while len(tokens) < room and tokens[-1] != run.tokenizer.eos_token_id:
        tokens.append(int(next(steps).tokens))
    return first[0].float(), tokens


def _generation(run: Run, prompt: Int[Tensor, " pos"], tokens: list[int], asked: int) -> Generation:
    ended: Ended = "length" if len(tokens) == asked else "context"
    if tokens and tokens[-1] == run.tokenizer.eos_token_id:
        ended = "end of text"
    return Generation(tuple(tokens), visible(run.tokenizer, tokens), ended)


def channel_named(dense: nn.Module, name: str) -> Channel:
    """A channel by name or address. Raises KeyError for an unknown one, ValueError for an address out of range."""
    bundle = get_bundle(dense)
    return resolve(name, bundle.channels, bundle.shape)


def example_prompts(dense: nn.Module, channel: Channel, count: int = _EXAMPLES) -> list[str]:
    """Prompts to try a channel on: those of the task it was found on, else one of each task; at most `count`.

    They are of the evaluation templates, which neither training nor the channel's search has seen. A task that the
    run's tokenizer or context cannot present gives none.
    """
    run: Run = get_bundle(dense).run
    batch = own_batch(run, channel, count)
    if batch is not None:
        # Members 0 and 1 in turn, so that there are prompts to move either way.
        return list(dict.fromkeys(prompts[pair % 2] for pair, prompts in enumerate(batch.prompts)))
    prompts: dict[str, None] = {}
    for name in TASK_NAMES:
        if len(prompts) == count:
            break
        other = _task_batch(run, name, {}, 1)
        if not isinstance(other, str):
            prompts[other.prompts[0][0]] = None
    return list(prompts)


def own_batch(run: Run, channel: Channel, count: int = _EXAMPLES) -> TaskBatch | None:
    """Evaluation pairs of the task that a channel was found on; None where there are none (see `example_problem`)."""
    task = channel.selection.get("task")
    found = _task_batch(run, task, channel.selection.get("prompts", {}), count) if isinstance(task, str) else ""
    return None if isinstance(found, str) else found


def example_problem(dense: nn.Module, channel: Channel) -> str:
    """Why there are no prompts of the task that a channel was found on; empty where there are, or where it has none."""
    task = channel.selection.get("task")
    if not isinstance(task, str):
        return ""
    found = _task_batch(get_bundle(dense).run, task, channel.selection.get("prompts", {}), 1)
    return found if isinstance(found, str) else ""


def _task_batch(run: Run, name: str, record: dict[str, Any], count: int) -> TaskBatch | str:
    """Evaluation pairs of a task, or why there are none."""
    try:
        return recorded_task(run, name, record).sample_up_to(count, split="evaluation", seed=0)
    except (ValueError, LookupError, OSError) as error:
        return str(error.args[0] if error.args else error)

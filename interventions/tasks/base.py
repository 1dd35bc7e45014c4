"""What a binary next-token task is, how its prompt pairs are made, and how logits are scored on them.

1. A `TaskSpec` holds templates per split. A template is two prompts, equal but for the feature, in the slot
   language of `sparse_model.data.generated_python.Pattern`; filling it gives a `PromptPair`.
2. A `Task` is a spec bound to a tokenizer. It keeps a filling only if both prompts have the same number of
   tokens and both answers are one token, alone and within the text that naturally follows.
3. `Task.sample` stacks such pairs into a `TaskBatch`; `task_loss`, `pair_accuracy` and `answer_probabilities`
   score logits on it (paper, Table 1 and A.5).
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import softplus
from transformers import PreTrainedTokenizerFast

from sparse_model.data.generated_python import Pattern, indented

PromptSplit = Literal["train", "selection", "evaluation"]
PROMPT_SPLITS: tuple[PromptSplit, ...] = get_args(PromptSplit)
Strings = tuple[str, str]

DEFAULT_MAX_TOKENS = 64
_ATTEMPTS = 64
_FIELD_SEPARATOR = "\0"

# What precedes a task's own lines. Evaluation leads put a plain call next to a sum, which no document does.
LEADS: Mapping[PromptSplit, tuple[str, ...]] = {
    "train": ("$s8", "$n8 = $s8"),
    "selection": ("$s8\n$n8 = $s9", "$n8 = $s8\n$v8($n8)"),
    "evaluation": ("$v8($n8)\n$n9 = $n8 + $n7", "$n9 = $n8 + $n7\n$v8($n9)"),
}


class CannotPresent(ValueError):
    """A tokenizer or a context cannot present a task: no filling gives aligned prompts with single-token answers."""


class PromptPair(NamedTuple):
    """Two prompts that differ only in the feature."""

    prompt: Strings
    """The prompts of member 0 and member 1."""
    answer: Strings
    """The right answer of each; the other member's answer is the wrong one."""
    completion: Strings
    """Text that naturally follows each prompt; starts with the right answer."""
    alternatives: tuple[Strings, ...] = ()
    """Answers to use instead, in order, where the tokenizer splits `answer`."""


class Template(NamedTuple):
    """Prompts, completions and answers with slots. `@` stands for a lead (see `with_leads`)."""

    prompts: Strings
    completions: Strings
    answers: tuple[Strings, ...]
    """The preferred answers first, then the alternatives."""


class TaskBatch(NamedTuple):
    """Tokenized pairs; member 0 and 1 of a pair have the same number of tokens."""

    tokens: Int[Tensor, "pair 2 pos"]
    """End-of-text token, then the prompt, padded on the right with end-of-text."""
    answers: Int[Tensor, "pair 2"]
    """Id of each member's right answer; the wrong one is the other member's."""
    last: Int[Tensor, " pair"]
    """Position of the last prompt token, where the answer is predicted."""
    prompts: list[Strings]
    """The prompts as text."""

    def to(self, device: torch.device | str) -> "TaskBatch":
        """The batch with its tensors on `device`."""
        return TaskBatch(self.tokens.to(device), self.answers.to(device), self.last.to(device), self.prompts)


def with_leads(*templates: Template) -> dict[PromptSplit, tuple[Template, ...]]:
    """Each template once per lead of each split; the lead replaces the line `@`, indented as that line is."""
    return {
        split: tuple(_lead_in(template, lead) for template in templates for lead in leads)
        for split, leads in LEADS.items()
    }


def _lead_in(template: Template, lead: str) -> Template:
    first, second = (_replace_marker(prompt, lead) for prompt in template.prompts)
    return template._replace(prompts=(first, second))


def _replace_marker(prompt: str, lead: str) -> str:
    before, _, after = prompt.partition("@")
    indent = before.rpartition("\n")[2]
    return before + indented(lead, indent) + after


def within_function(template: Template) -> Template:
    """The template as lines of a function body; for answers that do not depend on the indentation."""

    def inner(texts: Strings) -> Strings:
        return indented(texts[0], "    "), indented(texts[1], "    ")

    first, second = inner(template.prompts)
    header = "def $v7($n6):\n    "
    return Template((header + first, header + second), inner(template.completions), template.answers)


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """A task before it meets a tokenizer."""

    name: str
    channel: str
    """Name to propose for a channel that carries the feature."""
    description: str
    """One sentence: what the model must decide between, and from what."""
    templates: Mapping[PromptSplit, tuple[Template, ...]]
    """No template occurs in two splits."""

    def make(self, rng: random.Random, template: Template) -> PromptPair:
        """`template` with its slots filled from `rng`, the same in both members."""
        pairs = (template.prompts, template.completions, *template.answers)
        texts = _FIELD_SEPARATOR.join(text for pair in pairs for text in pair)
        filled = Pattern(texts).fill(rng).split(_FIELD_SEPARATOR)
        prompt, completion, answer, *alternatives = zip(filled[::2], filled[1::2], strict=True)
        return PromptPair(prompt, answer, completion, tuple(alternatives))


class _Encoded(NamedTuple):
    tokens: tuple[list[int], list[int]]
    answers: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task bound to a tokenizer; `get_task` makes one."""

    spec: TaskSpec
    tokenizer: PreTrainedTokenizerFast
    max_tokens: int = DEFAULT_MAX_TOKENS
    """Longest prompt, the end-of-text token included."""

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def description(self) -> str:
        return self.spec.description

    @property
    def record(self) -> dict[str, Any]:
        """Where the prompts come from, as results keep it: `prompts` is generated, natural or file."""
        return {"prompts": "generated"}

    def available(self, split: PromptSplit) -> int | None:
        """How many pairs `split` has; None for templates, which do not run out."""
        return None

    def at_most(self, n_pairs: int, *splits: PromptSplit) -> int:
        """`n_pairs`, or as many as each of the splits has. Raises CannotPresent where one has none."""
        return n_pairs

    def sample_up_to(self, n_pairs: int, *, split: PromptSplit, seed: int) -> TaskBatch:
        """`n_pairs` pairs, or all that there are. Raises what `at_most` and `sample` raise."""
        return self.sample(self.at_most(n_pairs, split), split=split, seed=seed)

    def sample(self, n_pairs: int, *, split: PromptSplit, seed: int) -> TaskBatch:
        """`n_pairs` pairs from the templates of `split`; the same arguments give the same batch.

        Fillings that are too long, unaligned, or whose answers are not single tokens are drawn again.

        Raises:
            ValueError: n_pairs < 1; an unknown split.
            CannotPresent: a template without a usable filling (the message names the task, the reason, the remedy).
        """
        if n_pairs < 1:
            raise ValueError(f"n_pairs={n_pairs}: must be at least 1")
        if split not in self.spec.templates:
            raise ValueError(f"split={split!r}: use one of {', '.join(self.spec.templates)}")
        rng = random.Random(f"{self.name}/{split}/{seed}")
        templates = self.spec.templates[split]
        drawn = [self._draw(rng, templates[rng.randrange(len(templates))]) for _ in range(n_pairs)]
        encoded = [one for _, one in drawn]
        end_of_text = self._end_of_text()
        width = max(len(one.tokens[0]) for one in encoded)
        padded = [[member + [end_of_text] * (width - len(member)) for member in one.tokens] for one in encoded]
        return TaskBatch(
            tokens=torch.tensor(padded),
            answers=torch.tensor([one.answers for one in encoded]),
            last=torch.tensor([len(one.tokens[0]) - 1 for one in encoded]),
            prompts=[pair.prompt for pair, _ in drawn],
        )

    def _draw(self, rng: random.Random, template: Template) -> tuple[PromptPair, _Encoded]:
        reason = ""
        for _ in range(_ATTEMPTS):
            pair = self.spec.make(rng, template)
            encoded = self._encode_pair(pair)
            if isinstance(encoded, _Encoded):
                return pair, encoded
            reason = encoded
        raise CannotPresent(
            f"task {self.name!r}: {_ATTEMPTS} fillings of one template failed with tokenizer"
            f" {self._tokenizer_name()}; the last one because {reason}"
        )

    def _encode_pair(self, pair: PromptPair) -> _Encoded | str:
        """The pair's tokens and answers, or the reason why this tokenizer cannot present it."""
        end_of_text = self._end_of_text()
        first, second = (self._encode(prompt) for prompt in pair.prompt)
        if len(first) != len(second):
            return (
                f"its prompts {pair.prompt} have {len(first)} and {len(second)} tokens and cannot be aligned;"
                " use a tokenizer that splits words from punctuation, such as train_tokenizer()'s"
            )
        if 1 + len(first) > self.max_tokens:
            return (
                f"a prompt has {1 + len(first)} tokens, over max_tokens={self.max_tokens}; raise max_tokens"
                " (the model's n_ctx permitting) or use a tokenizer with a larger vocabulary"
            )
        for answer in (pair.answer, *pair.alternatives):
            ids = [
                self._answer_id(tokens, *texts)
                for tokens, *texts in zip((first, second), pair.prompt, answer, pair.completion, strict=True)
            ]
            if ids[0] is not None and ids[1] is not None and ids[0] != ids[1]:
                return _Encoded(([end_of_text, *first], [end_of_text, *second]), (ids[0], ids[1]))
        return (
            f"its answers {pair.answer} (or {pair.alternatives}) are not two different single tokens after"
            f" {pair.prompt}; use a tokenizer that has them, such as train_tokenizer()'s, or another task"
        )

    def _answer_id(self, tokens: list[int], prompt: str, answer: str, completion: str) -> int | None:
        """The answer's id, if it is one token after the prompt both alone and within the completion."""
        alone = self._encode(prompt + answer)
        if len(alone) != len(tokens) + 1 or alone[:-1] != tokens:
            return None
        return alone[-1] if self._encode(prompt + completion)[: len(alone)] == alone else None

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _end_of_text(self) -> int:
        end_of_text = self.tokenizer.eos_token_id
        if not isinstance(end_of_text, int):
            raise ValueError(f"tokenizer {self._tokenizer_name()} has no end-of-text token; set its eos_token")
        return end_of_text

    def _tokenizer_name(self) -> str:
        name = self.tokenizer.name_or_path or type(self.tokenizer).__name__
        return f"{name!r} ({len(self.tokenizer)} tokens)"


def since_difference(
    first: Int[Tensor, "prompt pos"], second: Int[Tensor, "prompt pos"], last: Int[Tensor, " prompt"]
) -> Bool[Tensor, "prompt pos"]:
    """Mask of the tokens from the first in which two prompts differ to the last of the prompt."""
    pos = torch.arange(first.shape[1], device=first.device)
    return ((first != second).cumsum(1) > 0) & (pos <= last[:, None])


def _right_and_wrong(
    scores: Float[Tensor, "pair 2 pos vocab"], batch: TaskBatch
) -> tuple[Float[Tensor, "pair 2"], Float[Tensor, "pair 2"]]:
    """The scores of the right and the wrong answer of each member at its last prompt position."""
    rows = torch.arange(len(batch.last), device=scores.device)
    at_last = scores[rows, :, batch.last]
    both = rearrange([batch.answers, batch.answers.flip(1)], "answer pair member -> pair member answer")
    right, wrong = at_last.gather(-1, both).unbind(-1)
    return right, wrong


def log_odds(logits: Float[Tensor, "pair 2 pos vocab"], batch: TaskBatch) -> Float[Tensor, "pair 2"]:
    """log(P(right answer) / P(wrong answer)) of each member at its last prompt position, nats."""
    right, wrong = _right_and_wrong(logits, batch)
    return right - wrong


def task_loss(logits: Float[Tensor, "pair 2 pos vocab"], batch: TaskBatch) -> Float[Tensor, ""]:
    """Two-way cross-entropy at the last position: mean over pairs and members of log(1 + e^(wrong-right))."""
    return softplus(-log_odds(logits, batch)).mean()


def pair_accuracy(logits: Float[Tensor, "pair 2 pos vocab"], batch: TaskBatch) -> Float[Tensor, ""]:
    """Share of pairs both of whose members prefer their right answer to the wrong one (a tie is wrong)."""
    right, wrong = _right_and_wrong(logits, batch)
    return (right > wrong).all(dim=1).to(logits.dtype).mean()


def answer_probabilities(
    logits: Float[Tensor, "pair 2 pos vocab"], batch: TaskBatch
) -> tuple[Float[Tensor, "pair 2"], Float[Tensor, "pair 2"]]:
    """Probability of each member's right and wrong answer under the softmax over the whole vocabulary."""
    right, wrong = _right_and_wrong(logits.log_softmax(-1), batch)
    return right.exp(), wrong.exp()

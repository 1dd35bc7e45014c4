"""What a steering edit does besides steering: unrelated text, other tasks, and text generated under it.

A steering edit differs from token to token and has no value on other text. Side effects are those of the fixed vector
that stands for it, its mean over the tokens where it is not zero, added at every token of whatever the model is given,
generated tokens included. A control is measured as such a vector too.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from bridges.losses import kl
from bridges.run_folder import Run
from interventions.circuits.task_scores import solves
from interventions.editing.intervene import intervene_vector
from interventions.steering.experiment import Experiment
from interventions.steering.steered_prompts import Prompts, Vectors, logits_at
from interventions.tasks.base import CannotPresent, TaskBatch, pair_accuracy
from interventions.tasks.catalogue import get_task, list_tasks
from interventions.tasks.names import NATURAL
from sparse_model.model.generation import generate_steps

Vector = Float[Tensor, " d_dense"]
_TOKENS = 2048  # of a pass
_ENTRIES = 2**25  # of the unsteered logits that are kept


class SideEffects(NamedTuple):
    """Figures of the dense model with a fixed vector at every token."""

    norm: float
    """Length of the vector."""
    p_target: float
    """Mean P(counterfactual answer) of the evaluation prompts."""
    kl: float
    """KL(unsteered || steered) on held-out text of the run's corpus, nats per token."""
    pair_accuracy: dict[str, float]
    """Of the other tasks that the unsteered model solves."""
    perplexity: float
    """Of text sampled behind the evaluation prompts under the edit, by the unsteered model."""
    perplexity_counterfactual: float
    """The same text by the unsteered model behind the counterfactual prompts: a wanted change of the answer is no
    surprise there."""


def fixed_vector(edit: Vectors) -> Vector:
    """An edit's mean over the tokens where it is not zero; zero where it is zero everywhere."""
    moved = edit.norm(dim=-1) > 0
    return edit[moved].mean(0) if moved.any() else edit.new_zeros(edit.shape[-1])


def mean_effects(effects: Sequence[SideEffects]) -> SideEffects:
    """Field by field."""
    accuracies = {task: sum(e.pair_accuracy[task] for e in effects) / len(effects) for task in effects[0].pair_accuracy}
    figures = {
        name: sum(getattr(e, name) for e in effects) / len(effects)
        for name in SideEffects._fields
        if name != "pair_accuracy"
    }
    return SideEffects(pair_accuracy=accuracies, **figures)


class Bystanders:
    """Text, tasks and prompts on which the side effects of vectors at one site are measured."""

    @torch.no_grad()
    def __init__(
        self,
        hf: PreTrainedModel,
        run: Run,
        prompts: Prompts,
        site: int,
        plan: Experiment,
        text: Int[Tensor, "block pos"],
    ) -> None:
        self.hf, self.prompts, self.site, self.where = hf, prompts, site, plan.where
        self.seed = plan.seed or 0
        self.text = [part.long().to(hf.device) for part in text.split(max(1, _TOKENS // text.shape[1]))]
        room = sum(part.numel() for part in self.text) * hf.config.vocab_size <= _ENTRIES
        self._unsteered = [hf(input_ids=part, use_cache=False).logits if room else None for part in self.text]
        self.tasks = {
            name: batch
            for name, batch in _task_batches(run, plan.task_pairs, self.seed).items()
            if name != str(plan.task).removesuffix(NATURAL) and solves(self._pair_accuracy(batch.to(hf.device)))
        }
        self.new_tokens = min(plan.new_tokens, hf.config.max_position_embeddings - int(prompts.last.max()))

    @torch.no_grad()
    def measure(self, vector: Vector | None) -> SideEffects:
        """The side effects of a vector; None for the unsteered model."""
        with self._edited(vector):
            accuracies = {name: self._pair_accuracy(batch.to(self.hf.device)) for name, batch in self.tasks.items()}
            generated = self._sample()
        return SideEffects(
            norm=0.0 if vector is None else float(vector.norm()),
            p_target=self.p_target(self.prompts, vector),
            kl=self.kl(vector),
            pair_accuracy=accuracies,
            perplexity=self._perplexity(self.prompts.tokens, generated),
            perplexity_counterfactual=self._perplexity(self.prompts.counterfactual, generated),
        )

    def _edited(self, vector: Vector | None) -> AbstractContextManager:
        return nullcontext() if vector is None else intervene_vector(self.hf, self.site, vector, where=self.where)

    @torch.no_grad()
    def p_target(self, prompts: Prompts, vector: Vector | None) -> float:
        """Mean P(counterfactual answer) of prompts with a vector at every token."""
        with self._edited(vector):
            p = logits_at(self.hf, prompts.tokens, prompts.last).softmax(-1)
        return float(p.gather(1, prompts.target[:, None]).mean())

    @torch.no_grad()
    def kl(self, vector: Vector | None) -> float:
        """KL(unsteered || steered) on the text, nats per token."""
        total = 0.0
        for tokens, kept in zip(self.text, self._unsteered, strict=True):
            unsteered = self.hf(input_ids=tokens, use_cache=False).logits if kept is None else kept
            with self._edited(vector):
                total += float(kl(unsteered, self.hf(input_ids=tokens, use_cache=False).logits)) * len(tokens)
        return total / sum(len(tokens) for tokens in self.text)

    def _pair_accuracy(self, batch: TaskBatch) -> float:
        logits = logits_at(self.hf, batch.tokens.flatten(0, 1), batch.last.repeat_interleave(2))
        return float(pair_accuracy(logits.unflatten(0, (-1, 2))[:, :, None], batch._replace(last=batch.last * 0)))

    def _sample(self) -> Int[Tensor, "prompt new"]:
        """Tokens drawn one after the other behind every prompt, with the same random numbers each time."""
        generator = torch.Generator().manual_seed(self.seed)
        tokens = pad(self.prompts.tokens, (0, self.new_tokens))
        last, row = self.prompts.last, torch.arange(len(tokens), device=tokens.device)
        drawn: list[Tensor] = []

        def next_logits(_: Tensor) -> Float[Tensor, "prompt vocab"]:
            """Without a cache: the prompts end at different columns."""
            return logits_at(self.hf, tokens[:, : int(last.max()) + len(drawn) + 1], last + len(drawn))

        for step in islice(generate_steps(next_logits, tokens, 1.0, generator), self.new_tokens):
            tokens[row, last + len(drawn) + 1] = step.tokens
            drawn.append(step.tokens)
        return torch.stack(drawn, 1)

    def _perplexity(self, prompts: Int[Tensor, "prompt pos"], generated: Int[Tensor, "prompt new"]) -> float:
        """exp of the unsteered model's mean loss on generated tokens behind prompts of equal lengths."""
        count = generated.shape[1]
        # Column c of a row predicts column c + 1.
        places = self.prompts.last[:, None] + torch.arange(count, device=prompts.device)
        tokens = pad(prompts, (0, count)).scatter(1, places + 1, generated)
        losses = []
        for part in range(0, len(tokens), 16):
            rows = slice(part, part + 16)
            logits = self.hf(input_ids=tokens[rows, : int(places.max()) + 1], use_cache=False).logits
            behind = logits.gather(1, places[rows, :, None].expand(-1, -1, logits.shape[-1]))
            losses.append(
                torch.nn.functional.cross_entropy(behind.flatten(0, 1), generated[rows].flatten(), reduction="none")
            )
        return float(torch.cat(losses).mean().exp())


def _task_batches(run: Run, pairs: int, seed: int) -> dict[str, TaskBatch]:
    """Evaluation prompts of every task that the tokenizer and the context can present."""
    batches = {}
    for name in list_tasks():
        try:
            task = get_task(name, run.tokenizer, max_tokens=run.config.sparse.n_ctx)
            batches[name] = task.sample(pairs, split="evaluation", seed=seed)
        except CannotPresent:
            continue
    return batches

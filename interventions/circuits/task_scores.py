"""Which tasks a model solves, on templates that neither pruning nor selection uses."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerFast

from interventions.circuits.gates import at_answer
from interventions.circuits.node_model import NodeModel, as_nodes, device_of
from interventions.tasks.base import CannotPresent, Task, TaskBatch, answer_probabilities, pair_accuracy, task_loss
from interventions.tasks.catalogue import TaskName, get_task, list_tasks
from interventions.tasks.names import PromptKind
from interventions.tasks.reports import folder_tasks, models_in
from sparse_model.data.tokenizer import load_tokenizer

SOLVED = 0.9
"""Pair accuracy from which a task counts as solved."""


def solves(accuracy: float) -> bool:
    """Whether a task with this pair accuracy counts as solved."""
    return accuracy >= SOLVED


class TaskScore(NamedTuple):
    """A model on a task's evaluation pairs, as it is: uncalibrated."""

    pair_accuracy: float
    """Share of pairs both of whose members prefer their right answer."""
    p_right: float
    """Mean probability of the right answer over the whole vocabulary."""
    loss: float
    """Two-way task loss, nats."""

    @property
    def solved(self) -> bool:
        """Whether the task counts as solved."""
        return solves(self.pair_accuracy)


@torch.no_grad()
def score_task(model: NodeModel, batch: TaskBatch) -> TaskScore:
    """A model on a batch of pairs."""
    batch = batch.to(device_of(model))
    logits = model.logits(batch.tokens.flatten(0, 1), None, batch.last.repeat_interleave(2)).unflatten(0, (-1, 2))
    batch = at_answer(batch)
    right, _ = answer_probabilities(logits, batch)
    return TaskScore(float(pair_accuracy(logits, batch)), float(right.mean()), float(task_loss(logits, batch)))


def score_tasks(
    models: Mapping[str, NodeModel],
    tokenizer: PreTrainedTokenizerFast,
    *,
    max_tokens: int,
    pairs: int,
    seed: int,
    only: Sequence[TaskName | Task] = (),
) -> dict[str, dict[str, TaskScore] | str]:
    """Every task's score by model (or of `only` these); the reason where the tokenizer cannot present the task.

    pairs: or as many as a task has. Raises what `get_task` raises, ValueError for fewer than one pair.
    """
    scores: dict[str, dict[str, TaskScore] | str] = {}
    for given in only or list_tasks():
        task = given if isinstance(given, Task) else get_task(given, tokenizer, max_tokens=max_tokens)
        try:
            batch = task.sample_up_to(pairs, split="evaluation", seed=seed)
        except CannotPresent as error:
            scores[task.name] = str(error)
            continue
        scores[task.name] = {label: score_task(model, batch) for label, model in models.items()}
    return scores


def solved_tasks(
    folder: str | Path,
    *,
    pairs: int = 128,
    seed: int = 0,
    tasks: Sequence[TaskName | Task] = (),
    prompts: PromptKind = "generated",
    device: str = "cpu",
) -> dict[str, dict[str, TaskScore] | str]:
    """Every task's score by model, of the dense and the sparse model in a run folder or the one that it has.

    tasks: only these, by name or file; unset: all that have such prompts. Natural ones are of held-out files.
    The reason where the tokenizer cannot present the task. Nothing is saved. Raises FileNotFoundError for a folder
    with neither model, and what `get_task` raises.
    """
    folder = Path(folder)
    models = {label: as_nodes(model) for label, model in models_in(folder, device).items()}
    n_ctx = min(model.shape.n_ctx for model in models.values())
    named = [task for task in tasks if not isinstance(task, Task)]
    bound = [task for task in tasks if isinstance(task, Task)]
    if named or not bound:
        bound += folder_tasks(folder, n_ctx, named, prompts)
    return score_tasks(
        models, load_tokenizer(folder / "tokenizer"), max_tokens=n_ctx, pairs=pairs, seed=seed, only=bound
    )

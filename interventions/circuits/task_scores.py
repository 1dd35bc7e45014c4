"""Which tasks a model solves, on templates that neither pruning nor selection uses."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerFast

from bridges.dense import load_gpt2
from interventions.circuits.gates import at_answer
from interventions.circuits.node_model import NodeModel, as_nodes, device_of
from interventions.tasks.base import CannotPresent, TaskBatch, answer_probabilities, pair_accuracy, task_loss
from interventions.tasks.catalogue import get_task, list_tasks
from sparse_model.data.tokenizer import load_tokenizer
from sparse_model.model.checkpoint import load_sparse

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
    only: Sequence[str] = (),
) -> dict[str, dict[str, TaskScore] | str]:
    """Every task's score by model (or of `only` these); the reason where the tokenizer cannot present the task.

    Raises KeyError for an unknown task, ValueError for fewer than one pair.
    """
    scores: dict[str, dict[str, TaskScore] | str] = {}
    for name in only or list_tasks():
        try:
            batch = get_task(name, tokenizer, max_tokens=max_tokens).sample(pairs, split="evaluation", seed=seed)
        except CannotPresent as error:
            scores[name] = str(error)
            continue
        scores[name] = {label: score_task(model, batch) for label, model in models.items()}
    return scores


def solved_tasks(folder: str | Path, *, pairs: int = 128, seed: int = 0) -> dict[str, dict[str, TaskScore] | str]:
    """Every task's score by model, of the dense and the sparse model in a run folder or the one that it has.

    The reason where the tokenizer cannot present the task. Nothing is saved. Raises FileNotFoundError for a folder
    with neither model.
    """
    folder = Path(folder)
    models = _models_in(folder)
    n_ctx = min(model.shape.n_ctx for model in models.values())
    return score_tasks(models, load_tokenizer(folder / "tokenizer"), max_tokens=n_ctx, pairs=pairs, seed=seed)


def _models_in(folder: Path) -> dict[str, NodeModel]:
    models: dict[str, NodeModel] = {}
    if (folder / "dense").is_dir():
        models["dense"] = as_nodes(load_gpt2(folder / "dense"))
    if (folder / "sparse").is_dir():
        models["sparse"] = as_nodes(load_sparse(folder / "sparse").eval())
    if not models:
        raise FileNotFoundError(f"{folder} has neither dense/ nor sparse/: name the folder of a finished training")
    return models

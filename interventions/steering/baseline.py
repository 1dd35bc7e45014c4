"""How well the unsteered dense model does what is to be steered."""

import torch
from torch import nn

from interventions.bundle.bundle import get_bundle
from interventions.steering.experiment import resolved
from interventions.steering.experiment_config import Experiment
from interventions.tasks.base import answer_probabilities, pair_accuracy
from interventions.tasks.of_run import run_task


@torch.no_grad()
def dense_accuracy(dense: nn.Module, experiment: Experiment) -> dict[str, float]:
    """`pair_accuracy`, `p_right` and `p_wrong` of the unsteered dense model on an experiment's evaluation prompts.

    Raises what `resolved` raises.
    """
    bundle = get_bundle(dense)
    run, plan = bundle.run, resolved(experiment, bundle)
    task = run_task(run, str(plan.task))
    batch = task.sample(plan.pairs, split="evaluation", seed=plan.seed or 0).to(run.dense.hf.device)
    logits = run.dense(batch.tokens.flatten(0, 1)).unflatten(0, batch.tokens.shape[:2])
    right, wrong = answer_probabilities(logits, batch)
    return {
        "pair_accuracy": float(pair_accuracy(logits, batch)),
        "p_right": float(right.mean()),
        "p_wrong": float(wrong.mean()),
    }

"""The first stage of a steering experiment: its models, prompts, text and sets of channels, before anything is steered.

The strengths are chosen here too, on selection prompts, and with them the experiment has nothing left open.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from bridges.run_folder import Run
from interventions.bundle.bundle import get_bundle
from interventions.bundle.channels import Channel, resolve
from interventions.editing.hooks import Where
from interventions.steering.experiment import (
    Experiment,
    chosen_strengths,
    default_strengths,
    patching_choices,
    resolved,
)
from interventions.steering.rivals import difference_of_means
from interventions.steering.steered_prompts import Prompts, plain_model, prompts_of
from interventions.steering.strengths import Dosing
from interventions.tasks.base import TaskBatch
from interventions.tasks.of_run import run_task
from sparse_model.data.prepare import prepare_corpus


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What an experiment works with."""

    run: Run
    hf: PreTrainedModel
    """The dense model that is steered."""
    plan: Experiment
    """With nothing left open."""
    seed: int
    task: str
    channel: Channel
    sets: dict[str, list[int]]
    """The channels that are moved, by their number."""
    reference: str
    """The set whose norm and number of channels the drawn controls have."""
    patching_sets: dict[str, list[int]]
    """The sets that the sparse model alone names, by their number of channels."""
    chosen: dict[str, float]
    """The strengths that were chosen on selection prompts, by edit."""
    evaluation: TaskBatch
    selection: TaskBatch
    train: Int[Tensor, "train_block pos"]
    """Text of the run's corpus, for the ridge regression."""
    held_out: Int[Tensor, "block pos"]

    @property
    def site(self) -> int:
        """Where the dense model is edited."""
        return self.channel.site

    @property
    def prompts(self) -> Prompts:
        """The prompts that are steered."""
        return prompts_of(self.evaluation)


def prepare_setting(dense: nn.Module, experiment: Experiment, *, progress: bool = False) -> Setting:
    """The setting of an experiment on a model from `load_dense`.

    Raises what `resolved` and `prepare_corpus` raise, and ValueError for a task that the tokenizer cannot present.
    """
    bundle = get_bundle(dense)
    hf, run = plain_model(dense), bundle.run
    plan = resolved(experiment, bundle)
    assert plan.channel is not None
    assert plan.task is not None
    assert plan.seed is not None
    channel = resolve(plan.channel, bundle.channels, bundle.shape)
    task = run_task(run, plan.task)
    evaluation, selection = (
        task.sample(plan.pairs, split=split, seed=plan.seed).to(hf.device) for split in ("evaluation", "selection")
    )
    patching_sets, chosen = _frozen(channel, plan)
    if "difference_of_means" not in chosen:
        chosen["difference_of_means"] = _means_strength(run, selection, channel.site, plan.where)
    seed, plan = plan.seed, replace(plan, strengths=plan.strengths or default_strengths(chosen))
    sets = {str(len(channels)): list(channels) for channels in plan.sets}
    train, held_out = _text(run, plan, hf.device, progress)
    return Setting(
        run=run,
        hf=hf,
        plan=plan,
        seed=seed,
        task=task.name,
        channel=channel,
        sets=sets,
        reference="4" if "4" in sets else max(sets, key=int),
        patching_sets=patching_sets,
        chosen=chosen,
        evaluation=evaluation,
        selection=selection,
        train=train,
        held_out=held_out,
    )


def _frozen(channel: Channel, plan: Experiment) -> tuple[dict[str, list[int]], dict[str, float]]:
    """What find-channel chose for this task and a read edit: sets by patching, and strengths by edit."""
    if plan.task != channel.selection.get("task") or plan.where != "read":
        return {}, {}
    sets, strengths = patching_choices(channel, plan.sizes)
    chosen = chosen_strengths(channel, plan.sets) | {f"by_patching {n}": s for n, s in strengths.items()}
    if "difference_of_means" in channel.selection:
        chosen["difference_of_means"] = channel.selection["difference_of_means"]["strength"]
    return sets, chosen


def _means_strength(run: Run, selection: TaskBatch, site: int, where: Where) -> float:
    """The strength of the difference of means, by the rule that chooses those of sets: a fair rival."""
    edit = difference_of_means(run.dense, selection, site, prompts_of(selection))
    return Dosing(run, selection, site, where).edit_doses([edit])[0].strength


def _text(
    run: Run, plan: Experiment, device: torch.device, progress: bool
) -> tuple[Int[Tensor, "train_block pos"], Int[Tensor, "block pos"]]:
    """Training text for the ridge regression, and held-out text."""
    blocks = prepare_corpus(run.config, run.tokenizer, progress=progress)
    train, held_out = (
        part[: max(1, count // part.shape[1])].long().to(device)
        for part, count in ((blocks.train, plan.ridge_tokens), (blocks.val, plan.text_tokens))
    )
    return train, held_out

"""The third stage of a steering experiment: what the edits do to the answers, and to everything else."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interventions.steering.arms import Drawn, Edits
from interventions.steering.result import Curve
from interventions.steering.rivals import along
from interventions.steering.search import EqualSearch, search_equally
from interventions.steering.setting import Setting
from interventions.steering.side_effects import Bystanders, fixed_vector, mean_effects
from interventions.steering.steered_prompts import SteeredPrompts, Vectors
from sparse_model.io.progress import progress_bar

_SIDE_EFFECT_DRAWS = 5


@dataclass(frozen=True, kw_only=True)
class EditCurves:
    """Mean P(counterfactual answer) at every strength, of the edits of which there is one each."""

    p: dict[str, Curve]
    two_way: dict[str, Curve]
    """Normalised over the two answers."""
    low: dict[str, Curve]
    high: dict[str, Curve]
    """Ends of the 95 % bootstrap interval over prompts."""


@dataclass(frozen=True, kw_only=True)
class RandomCurves:
    """The same of what is drawn at random: means and percentiles over the draws."""

    drawn: dict[str, Curve]
    """By field of `Steering`, such as `random_p95`."""
    own_length_p95: dict[str, Curve]
    """95th percentile of random directions as long as each set's edit, and as the difference of means."""


@torch.no_grad()
def edit_curves(setting: Setting, steered: SteeredPrompts, edits: Edits) -> EditCurves:
    """What the edits do of which there is one each."""
    named = edits.named()
    answers = steered.answers(named.values(), setting.plan.strengths)
    low, high = bootstrap(answers.target, setting.plan.resamples, setting.seed)
    values = (answers.target.mean(2), answers.two_way.mean(2), low, high)
    p, two_way, low_ends, high_ends = (dict(zip(named, curves.T.tolist(), strict=True)) for curves in values)
    return EditCurves(p=p, two_way=two_way, low=low_ends, high=high_ends)


@torch.no_grad()
def random_curves(
    setting: Setting, steered: SteeredPrompts, edits: Edits, drawn: Drawn, *, progress: bool = False
) -> RandomCurves:
    """What the controls do that are drawn; random directions also as long as every other set's edit."""

    def means(name: str, vectors: Iterable[Vectors], count: int) -> Float[Tensor, "strength draw"]:
        bar = progress_bar(vectors, f"{setting.task}: {name}", count, leave=False, unit="edit", disable=not progress)
        # Without iter(), the tests' type checker takes the bar for a collection and uses up an edit looking into it.
        return steered.answers(iter(bar), setting.plan.strengths).target.mean(2)

    curves: dict[str, Curve] = {}
    counts = {"random": setting.plan.draws, "random_channels": setting.plan.draws}
    for name, vectors in drawn.edits().items():
        values = means(name, vectors, counts.get(name, setting.plan.maps))
        curves[f"{name}_mean"] = values.mean(1).tolist()
        curves[f"{name}_p95"] = percentile(values, 95)
        if name == "random":
            curves["random_p05"] = percentile(values, 5)
    own_length = {}
    for name, edit in (edits.sets | {"difference_of_means": edits.difference_of_means}).items():
        if name != setting.reference:
            directions = along(drawn.directions, edit.norm(dim=-1, keepdim=True))
            own_length[name] = percentile(means("random", directions, setting.plan.draws), 95)
    return RandomCurves(drawn=curves, own_length_p95=own_length | {setting.reference: curves["random_p95"]})


def percentile(values: Float[Tensor, "strength draw"], percent: int) -> Curve:
    """A percentile over the draws, at every strength."""
    return values.quantile(percent / 100, dim=1).tolist()


def search_all(setting: Setting, *, progress: bool = False) -> tuple[float, dict[str, dict[str, list[float]]]]:
    """The norm of the equal search, and what it finds for ours and for every control."""
    plan = setting.plan
    search = EqualSearch(
        setting.run, setting.selection, setting.evaluation, setting.site, plan.where, sorted(map(int, setting.sets))
    )
    found = search_equally(
        search, setting.task, draws=plan.searches, pairs=plan.pairs, seed=setting.seed, progress=progress
    )
    return search.norm, found


@torch.no_grad()
def side_effects(
    setting: Setting, edits: Mapping[str, Vectors], drawn: Drawn, *, progress: bool = False
) -> dict[str, dict[str, Any]]:
    """`SideEffects` of edits at the strengths that they are wanted at, and of what they are to be compared with."""
    bystanders = Bystanders(setting.hf, setting.run, setting.prompts, setting.site, setting.plan, setting.held_out)
    fixed = {name: fixed_vector(edit) for name, edit in edits.items()}
    length = fixed[setting.reference].norm()
    names = progress_bar(fixed, f"{setting.task}: side effects", leave=False, disable=not progress)
    effects = {"unsteered": bystanders.measure(None)} | {name: bystanders.measure(fixed[name]) for name in names}
    directions = drawn.directions[:_SIDE_EFFECT_DRAWS].to(length)
    effects["random"] = mean_effects([bystanders.measure(length * direction) for direction in directions])
    return {name: figures._asdict() for name, figures in effects.items()}


def bootstrap(
    values: Float[Tensor, "*curves prompt"], resamples: int, seed: int
) -> tuple[Float[Tensor, "*curves"], Float[Tensor, "*curves"]]:
    """2.5th and 97.5th percentile of the mean over prompts drawn with replacement, the same prompts for all curves."""
    count = values.shape[-1]
    drawn = torch.randint(count, (resamples, count), generator=torch.Generator().manual_seed(seed))
    weights = torch.zeros(resamples, count).scatter_add_(1, drawn, torch.ones(resamples, count)) / count
    ends = (values @ weights.T).quantile(torch.tensor([0.025, 0.975]), dim=-1)
    return ends[0], ends[1]

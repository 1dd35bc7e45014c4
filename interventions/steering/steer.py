"""Steering experiments: strength curves in the dense model, with their controls (paper A.4, Figure 9).

1. Evaluation prompts of a task, whose templates neither training nor selection saw, are steered towards their
   counterfactuals: every channel of a set moves by strength times its per-token difference in the sparse model.
2. The controls (`interventions.steering.edits`) do without the channels' meaning, the bridge or the sparse model. One
   set is the reference: the drawn controls have its number of channels and, token by token, its edit's norm. Random
   directions are repeated with the norm of every other set and of the difference of means.
3. What each set does to everything else is measured at its quiet strength (`interventions.steering.side_effects`).
4. A channel that was searched for among several is compared with what the same search finds through other decoders.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from interventions.bundle.bundle import get_bundle
from interventions.bundle.channels import resolve
from interventions.editing.hooks import Where
from interventions.steering import edits as steering_edits
from interventions.steering.experiment import Experiment, chosen_strengths, default_strengths, resolved
from interventions.steering.result import Curve, Steering, quiet_strength
from interventions.steering.search import searched_again
from interventions.steering.side_effects import Bystanders, fixed_vector, mean_effects
from interventions.steering.steered_prompts import SteeredPrompts, Vectors, plain_model, prompts_of
from interventions.steering.strengths import Dosing
from interventions.tasks.catalogue import get_task
from sparse_model.data.prepare import prepare_corpus

_SIDE_DRAWS = 5


@torch.no_grad()
def steer(dense: nn.Module, experiment: Experiment, *, progress: bool = True) -> Steering:
    """Run an experiment on a model from `load_dense`; the same experiment gives the same result.

    Raises what `resolved` and `prepare_corpus` raise, and ValueError for a task that the tokenizer cannot present.
    """
    study = _Study(dense, experiment, progress)
    edits = study.edits()
    drawn, directions, norms = study.drawn(edits[study.reference])
    answers = study.steered.answers(edits.values(), study.plan.strengths)
    curves = dict(zip(edits, answers.target.mean(2).T.tolist(), strict=True))
    two_way = dict(zip(edits, answers.two_way.mean(2).T.tolist(), strict=True))
    low, high = bootstrap(answers.target, study.plan.resamples, study.seed)
    result = Steering(
        task=study.task.name,
        strength=[float(s) for s in study.plan.strengths],
        channels={name: curves[name] for name in study.sets},
        two_way={name: two_way[name] for name in study.sets},
        **drawn,
        difference_of_means=curves["difference_of_means"],
        prompts=study.plan.pairs,
        random_draws=study.plan.draws,
        where=study.plan.where,
        site=study.site,
        sets=study.sets,
        channels_low=dict(zip(study.sets, low.T.tolist(), strict=False)),
        channels_high=dict(zip(study.sets, high.T.tolist(), strict=False)),
        ridge={name: curves[f"ridge {name}"] for name in study.sets},
        exact_patch=curves["exact_patch"],
        reference=study.reference,
        norms={name: steering_edits.mean_norm(edit) for name, edit in edits.items()} | norms,
        ridge_fit=study.ridge_fit(),
        side_effects={},
        experiment=json.loads(json.dumps(asdict(study.plan))),
        model=study.model(),
        random_own_p95=study.random_own(edits, directions) | {study.reference: drawn["random_p95"]},
        chosen=study.chosen,
        searched=study.searched(),
    )
    names = (*study.sets, "difference_of_means")
    quiet = {name: quiet_strength(result, name) * edits[name] for name in names}
    return result._replace(side_effects=study.side_effects(quiet, directions[:_SIDE_DRAWS]))


class _Study:
    """An experiment's prompts, text, models and edits."""

    def __init__(self, dense: nn.Module, experiment: Experiment, progress: bool) -> None:
        bundle = get_bundle(dense)
        self.hf, self.run, self.progress = plain_model(dense), bundle.run, progress
        plan = resolved(experiment, bundle)
        assert plan.channel is not None
        assert plan.task is not None
        assert plan.seed is not None
        self.seed = plan.seed
        self.channel = resolve(plan.channel, bundle.channels, bundle.shape)
        self.site = self.channel.site
        self.task = get_task(plan.task, self.run.tokenizer, max_tokens=self.run.config.sparse.n_ctx)
        self.evaluation, self.selection = (
            self.task.sample(plan.pairs, split=split, seed=self.seed).to(self.hf.device)
            for split in ("evaluation", "selection")
        )
        self.prompts = prompts_of(self.evaluation)
        chosen = chosen_strengths(self.channel, plan.sets) | {"difference_of_means": self.means_strength(plan.where)}
        self.plan = plan = replace(plan, strengths=plan.strengths or default_strengths(chosen))
        self.chosen = {name: strength for name, strength in chosen.items() if strength in plan.strengths}
        self.sets = {str(len(one)): list(one) for one in plan.sets}
        self.reference = "4" if "4" in self.sets else max(self.sets, key=int)
        blocks = prepare_corpus(self.run.config, self.run.tokenizer, progress=progress)
        self.train, self.held_out = (
            part[: max(1, count // part.shape[1])].long().to(self.hf.device)
            for part, count in ((blocks.train, plan.ridge_tokens), (blocks.val, plan.text_tokens))
        )
        self.columns = self.run.bridges.directions(self.site)
        self.changes = steering_edits.activation_changes(self.run, self.site, self.prompts)
        streams = [
            steering_edits.stream_at(model, self.train, self.site) for model in (self.run.sparse, self.run.dense)
        ]
        self.ridge = steering_edits.fit_ridge(streams[0], streams[1])
        self.steered = SteeredPrompts(self.hf, self.prompts, self.site, plan.where)

    def means_strength(self, where: Where) -> float:
        """The strength of the difference of means, by the rule that chooses those of sets: a fair rival."""
        on, at = self.selection, self.site
        edit = steering_edits.difference_of_means(self.run.dense, on, at, prompts_of(on))
        return Dosing(self.run, on, at, where).edit_doses([edit])[0].strength

    def through(self, columns: steering_edits.Columns, name: str) -> Vectors:
        """A set's edit through the columns of some decoder."""
        return steering_edits.channel_edit(
            self.changes, columns, self.run.bridges.rms_sparse[self.site], self.sets[name]
        )

    def edits(self) -> dict[str, Vectors]:
        """The sets' edits, then the controls of which there is one each."""
        run, site = self.run, self.site
        edits = {name: self.through(self.columns, name) for name in self.sets}
        edits |= {f"ridge {name}": self.through(self.ridge.columns, name) for name in self.sets}
        return edits | {
            "difference_of_means": steering_edits.difference_of_means(run.dense, self.selection, site, self.prompts),
            "exact_patch": steering_edits.exact_patch(self.hf, run.dense, site, self.prompts, self.plan.where),
        }

    def drawn(self, edit: Vectors) -> tuple[dict[str, Curve], Float[Tensor, "draw d_dense"], dict[str, float]]:
        """Percentiles of the controls that are drawn; the random directions; norms of those that were scaled."""
        plan, norm, generator = self.plan, edit.norm(dim=-1, keepdim=True), torch.Generator().manual_seed(self.seed)
        used, count = {c for one in self.sets.values() for c in one}, len(self.sets[self.reference])
        directions = steering_edits.random_directions(plan.draws, edit.shape[-1], generator)
        others = steering_edits.random_channels(self.columns, used, count, plan.draws, generator)
        shuffled, untrained = self.decoders(generator)
        found = {
            **self._percentiles("random", steering_edits.along(directions, norm), plan.draws, (5, 95)),
            **self._percentiles("random_channels", steering_edits.along(others, norm), plan.draws),
        }
        norms = {}
        for name, decoders in (("shuffled", shuffled), ("untrained", untrained)):
            raw = [self.through(columns, self.reference) for columns in decoders]
            norms[name] = sum(map(steering_edits.mean_norm, raw)) / len(raw)
            found |= self._percentiles(name, (steering_edits.scaled(one, norm) for one in raw), plan.maps)
        return found, directions, norms

    def decoders(self, generator: torch.Generator) -> tuple[Iterator[steering_edits.Columns], ...]:
        """Shuffled decoders, and untrained bridges."""
        shuffled = steering_edits.shuffled_columns(self.columns, self.plan.maps, generator)
        return shuffled, steering_edits.untrained_columns(self.run.bridges, self.plan.maps, self.seed)

    def searched(self) -> dict[str, list[float]]:
        """What the search for one channel finds through other decoders; nothing where there was no such search."""
        candidates = self.channel.selection.get("candidates", [])
        if not candidates or self.plan.where != "read" or self.plan.task != self.channel.selection["task"]:
            return {}
        count = self.plan.maps
        maps = chain(*self.decoders(torch.Generator().manual_seed(self.seed)))
        bar = tqdm(maps, "searched again", 2 * count, leave=False, disable=not self.progress)
        found = searched_again(self.run, candidates, self.site, self.selection, self.evaluation, iter(bar))
        return {"shuffled": found[:count], "untrained": found[count:]}

    def random_own(self, edits: dict[str, Vectors], directions: Float[Tensor, "draw d_dense"]) -> dict[str, Curve]:
        """95th percentile of the random directions, as long as each edit but the reference's."""
        return {
            name: self._percentiles(
                "random",
                steering_edits.along(directions, edits[name].norm(dim=-1, keepdim=True)),
                self.plan.draws,
            )["random_p95"]
            for name in (*self.sets, "difference_of_means")
            if name != self.reference
        }

    def _percentiles(
        self, name: str, edits: Iterable[Vectors], count: int, percentiles: tuple[int, ...] = (95,)
    ) -> dict[str, Curve]:
        bar = tqdm(edits, f"{self.task.name}: {name}", count, leave=False, unit="edit", disable=not self.progress)
        # Without iter(), the tests' type checker takes the bar for a collection and uses up an edit looking into it.
        means = self.steered.answers(iter(bar), self.plan.strengths).target.mean(2)
        ends = {f"{name}_p{q:02}": means.quantile(q / 100, dim=1).tolist() for q in percentiles}
        return {f"{name}_mean": means.mean(1).tolist(), **ends}

    def ridge_fit(self) -> dict[str, float]:
        """How well the regression predicts the dense stream on held-out text, beside the trained decoder."""
        return steering_edits.ridge_report(self.run, self.site, self.ridge, self.held_out)

    def side_effects(
        self, edits: dict[str, Vectors], directions: Float[Tensor, "draw d_dense"]
    ) -> dict[str, dict[str, Any]]:
        """`SideEffects` of the sets and the difference of means, and of what they are to be compared with."""
        bystanders = Bystanders(self.hf, self.run, self.prompts, self.site, self.plan, self.held_out)
        fixed = {name: fixed_vector(edit) for name, edit in edits.items()}
        length = fixed[self.reference].norm()
        names = tqdm(fixed, f"{self.task.name}: side effects", leave=False, disable=not self.progress)
        found = {"unsteered": bystanders.measure(None)} | {name: bystanders.measure(fixed[name]) for name in names}
        found["random"] = mean_effects([bystanders.measure(length * one) for one in directions.to(length)])
        return {name: effects._asdict() for name, effects in found.items()}

    def model(self) -> dict[str, int | float]:
        """What tells the run from others."""
        config = self.run.config
        return {
            "layers": self.run.dense.n_layers,
            "d_dense": self.run.dense.d_model,
            "d_sparse": self.run.sparse.d_model,
            "nonzero_fraction": config.sparsity.nonzero_fraction,
            "seed": config.seed,
        }


def bootstrap(
    values: Float[Tensor, "*curves prompt"], resamples: int, seed: int
) -> tuple[Float[Tensor, "*curves"], Float[Tensor, "*curves"]]:
    """2.5th and 97.5th percentile of the mean over prompts drawn with replacement, the same prompts for all curves."""
    count = values.shape[-1]
    drawn = torch.randint(count, (resamples, count), generator=torch.Generator().manual_seed(seed))
    weights = torch.zeros(resamples, count).scatter_add_(1, drawn, torch.ones(resamples, count)) / count
    ends = (values @ weights.T).quantile(torch.tensor([0.025, 0.975]), dim=-1)
    return ends[0], ends[1]

"""One search through every basis of a dense site, then effect against norm and against what else an edit does.

Every basis goes through the same stages. Selection prompts decide everything, evaluation prompts nothing:

1. Candidates: the 16 latents with the largest first-order effect on the dense model's log P(counterfactual answer),
   gradient times change. The sparse channels enter a second time with the candidates that the sparse model names.
2. Sets, greedily: of size 1 the candidate that steers best at half of the equal norm and at all of it, then one more
   at a time.
3. The equal norm is the largest of the ladder at which 95 % of random directions, as long at every token that the exact
   patch moves, leave P(counterfactual answer) quiet. The equal effects are half and nine tenths of the way from the
   prompts' own P to that of their counterfactuals: the norm at which each set first reaches them on selection prompts.
4. On evaluation prompts: P at every norm of the ladder. An edit has no value on other text, so side effects are
   those of its mean vector over the selection prompts, added at every token: that vector's own P, KL on other text, the
   other tasks and the perplexity of generated text, where it reaches the equal effects on selection prompts.

A norm is the mean length of an edit over the tokens that it moves. The ladder's unit is that of the exact patch, the
dense model's own counterfactual, at the place that is edited.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bridges.run_folder import Run
from interventions.bases.bases import Basis, Place, directions, make_bases
from interventions.bases.coders import Trained, train_coders
from interventions.bases.comparison_config import Comparison
from interventions.bases.result import OURS, TARGETS, Bases, Effects, Row
from interventions.steering.edits import Changes, channel_edit, mean_norm
from interventions.steering.experiment_config import CANDIDATES
from interventions.steering.rivals import along, exact_patch, random_directions
from interventions.steering.search import attribution, greedy_sets
from interventions.steering.setting import Setting, prepare_setting
from interventions.steering.side_effects import Bystanders, fixed_vector
from interventions.steering.steered_prompts import Prompts, SteeredPrompts, Vectors, prompts_of
from interventions.steering.strengths import QUIET
from interventions.steering.suffix import FamilySuffix
from sparse_model.data.prepare import prepare_corpus
from sparse_model.io.progress import progress_bar

LADDER = tuple(round(2 ** (i / 3 - 3), 4) for i in range(16))
"""Norms that are tried, .125 to 4, the exact patch's being 1."""
EXACT = "exact patch"


@torch.no_grad()
def compare_bases(dense: nn.Module, comparison: Comparison, *, progress: bool = True) -> Bases:
    """Compare the sparse channels with other bases of their site, on a model from `load_dense`.

    Raises what `prepare_setting` raises, and ValueError for a `kept` that the autoencoders' width does not allow.
    """
    setting = prepare_setting(dense, comparison.experiment(), progress=progress)
    tokens = comparison.coder_tokens or _bridge_tokens(setting.run)
    trained = _train(setting, comparison, tokens, progress)
    bases = make_bases(setting.run, setting.site, setting.train, trained, setting.seed)
    places = {basis.place: _Stand.at(setting, basis.place) for basis in bases.values()}
    own = places[Place(setting.site, "read")]
    equal, random = _equal_norm(own, comparison.draws)
    rows = [own.row(EXACT, [], own.exact), *_found(setting, comparison, bases, places, equal)]
    rows += [
        own.row(name, [], (make(own.selection.prompts), make(own.evaluation.prompts)))
        for name, make in directions(setting.run.dense, setting.site, setting.selection).items()
    ]
    bar = progress_bar(rows, f"{setting.task}: bases", unit="set", leave=False, disable=not progress)
    return Bases(
        task=setting.task,
        site=setting.site,
        prompts=setting.plan.pairs,
        ladder=list(LADDER),
        unit={f"{place.site} {place.where}": stand.unit for place, stand in places.items()},
        equal=equal,
        unsteered=float(own.evaluation.base.target.mean()),
        random_p95=random,
        rows=[pending.measured(equal) for pending in bar],
        coders={
            name: {"nmse": one.nmse, "unused": float(one.unused), "tokens": float(tokens)}
            for name, one in trained.items()
        },
        comparison=json.loads(json.dumps(asdict(replace(comparison, pairs=setting.plan.pairs)))),
        digest=setting.channel.digest,
    )


def _bridge_tokens(run: Run) -> int:
    """How many tokens the joint training saw, on one process."""
    config = run.config
    return config.steps * config.batch_size * config.accumulate * config.sparse.n_ctx


def _train(setting: Setting, comparison: Comparison, tokens: int, progress: bool) -> dict[str, Trained]:
    run, site = setting.run, setting.site
    text = prepare_corpus(run.config, run.tokenizer, samples=run.samples, progress=progress).train
    is_mlp = site % 2 == 1 and site < 2 * run.dense.n_layers
    return train_coders(
        run,
        site,
        text,
        setting.held_out,
        kept=comparison.kept,
        transcoder=is_mlp,
        tokens=tokens,
        seed=setting.seed,
        progress=progress,
    )


@dataclass(frozen=True, kw_only=True)
class _Stand:
    """One place of the dense model, with the prompts that are steered there and everything that is measured."""

    setting: Setting
    place: Place
    selection: SteeredPrompts
    evaluation: SteeredPrompts
    exact: tuple[Tensor, Tensor]
    """The exact patch, on selection and evaluation prompts, whose lengths differ."""
    unit: float
    """Its norm on selection prompts."""
    bystanders: Bystanders

    @classmethod
    def at(cls, setting: Setting, place: Place) -> "_Stand":
        site, where = place
        batches = [prompts_of(batch) for batch in (setting.selection, setting.evaluation)]
        selection, evaluation = (SteeredPrompts(setting.hf, prompts, site, where) for prompts in batches)
        exact = [_exact(setting, place, prompts) for prompts in batches]
        plan = replace(setting.plan, where=where)
        return cls(
            setting=setting,
            place=place,
            selection=selection,
            evaluation=evaluation,
            exact=(exact[0], exact[1]),
            unit=mean_norm(exact[0]),
            bystanders=Bystanders(setting.hf, setting.run, batches[1], site, plan, setting.held_out),
        )

    def gradient(self) -> Float[Tensor, "prompt pos d_dense"]:
        """Of mean log P(counterfactual answer) on selection prompts, by the change of the stream at every token."""
        prompts = self.selection.prompts
        gradient = torch.zeros(*prompts.tokens.shape, self.setting.run.dense.d_model, device=prompts.tokens.device)
        for last in prompts.last.unique().tolist():
            rows = (prompts.last == last).nonzero().flatten()
            suffix = FamilySuffix(self.setting.hf, prompts.tokens[rows, : last + 1], 0, *self.place)
            with torch.enable_grad():
                change = torch.zeros_like(gradient[rows, : last + 1]).requires_grad_()
                logits = suffix.edited(change[None])[0].log_softmax(-1)
                total = logits.gather(1, prompts.target[rows, None]).sum() / len(prompts.last)
                (part,) = torch.autograd.grad(total, change)
            gradient[rows, : last + 1] = part
        return gradient

    def row(self, name: str, indices: list[int], edits: tuple[Tensor, Tensor]) -> "_Pending":
        """What is to be measured of an edit of selection and evaluation prompts."""
        return _Pending(self, name, indices, *(edit / max(mean_norm(edit), 1e-30) for edit in edits))


def _exact(setting: Setting, place: Place, prompts: Prompts) -> Vectors:
    """The change of what is edited: of the read, or of the output of the sublayer that a transcoder stands for."""
    if place.where == "read":
        return exact_patch(setting.run.dense, place.site, prompts, "read")
    dense = setting.run.dense
    at_output, at_input = (exact_patch(dense, site, prompts, "stream") for site in (place.site, place.site - 1))
    return at_output - at_input


class _Pending(NamedTuple):
    """A row before it is measured; the edits have mean norm 1."""

    stand: _Stand
    name: str
    indices: list[int]
    selection: Tensor
    evaluation: Tensor

    def measured(self, equal: float) -> Row:
        """The row, measured at every norm."""
        stand = self.stand
        norms = [factor * stand.unit for factor in LADDER]
        chosen_on, p = (
            steered.answers([edit], norms).target.mean(2)[:, 0].tolist()
            for steered, edit in ((stand.selection, self.selection), (stand.evaluation, self.evaluation))
        )
        vector = fixed_vector(self.selection)
        fixed_on = [stand.bystanders.p_target(stand.selection.prompts, norm * vector) for norm in norms]

        def effects(factor: float) -> Effects:
            side = stand.bystanders.measure(factor * stand.unit * vector)
            return Effects(factor, side.p_target, side.kl, side.perplexity_counterfactual, side.pair_accuracy)

        targets = {f"{share:g}": stand.selection.p_at(share) for share in TARGETS}
        fixed = {name: first_reached(fixed_on, p_target) for name, p_target in targets.items()}
        return Row(
            basis=self.name,
            latents=max(1, len(self.indices)),
            indices=self.indices,
            site=stand.place.site,
            where=stand.place.where,
            p=p,
            equal=p[LADDER.index(equal)],
            reached={name: first_reached(chosen_on, p_target) for name, p_target in targets.items()},
            p_fixed=[stand.bystanders.p_target(stand.evaluation.prompts, norm * vector) for norm in norms],
            kl=[stand.bystanders.kl(norm * vector) for norm in norms],
            fixed={name: effects(factor) for name, factor in fixed.items() if factor},
        )


def first_reached(p: Sequence[float], target: float) -> float | None:
    """The smallest norm of the ladder at which P reaches a target; None where none does."""
    return next((factor for factor, value in zip(LADDER, p, strict=True) if value >= target), None)


def _equal_norm(stand: _Stand, draws: int) -> tuple[float, list[float]]:
    """The equal norm, and the 95th percentile of random directions on evaluation prompts at every norm."""
    generator = torch.Generator().manual_seed(0)
    drawn = random_directions(draws, stand.setting.run.dense.d_model, generator)
    p95 = []
    for steered, exact in ((stand.selection, stand.exact[0]), (stand.evaluation, stand.exact[1])):
        moved = (exact.norm(dim=-1, keepdim=True) > 0).to(exact)
        norms = [factor * stand.unit for factor in LADDER]
        p = steered.answers(along(drawn.to(exact), moved), norms).target.mean(2)
        p95.append(p.quantile(0.95, dim=1).tolist())
    limit = stand.selection.p_at(QUIET)
    quiet = [factor for i, factor in enumerate(LADDER) if max(p95[0][: i + 1]) <= limit]
    return (quiet[-1] if quiet else LADDER[0]), p95[1]


def _found(
    setting: Setting,
    comparison: Comparison,
    bases: dict[str, Basis],
    places: dict[Place, _Stand],
    equal: float,
) -> Iterator[_Pending]:
    """The sets that the search finds in every basis."""
    gradients = {place: stand.gradient() for place, stand in places.items()}
    named = attribution(setting.run, places[Place(setting.site, "read")].selection.prompts, setting.site).candidates()
    for name, basis in bases.items():
        stand = places[basis.place]
        changes = (basis.changes(stand.selection.prompts), basis.changes(stand.evaluation.prompts))
        candidates = {name: candidates_of(gradients[basis.place], changes[0], basis)}
        if name == OURS:
            candidates[f"{OURS}, own"] = named
        for title, of_search in candidates.items():
            sets = greedy_sets(
                stand.selection, changes[0], basis.columns, of_search, equal * stand.unit, comparison.sizes
            )
            for channels in sets.values():
                edits = (channel_edit(part, basis.columns, channels) for part in changes)
                yield stand.row(title, channels, (next(edits), next(edits)))


def candidates_of(gradient: Float[Tensor, "prompt pos d_dense"], changes: Changes, basis: Basis) -> list[int]:
    """The latents whose change does most for the counterfactual answer, to first order."""
    effects = ((gradient @ basis.columns.T) * changes).sum((0, 1))
    return effects.argsort(descending=True)[:CANDIDATES].tolist()

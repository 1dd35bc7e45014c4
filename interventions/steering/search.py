"""One search for sets of channels at one norm, for ours and for every control alike.

1. Candidates, in the sparse model: the channels of the read with the largest first-order effect on log P(counterfactual
   answer), gradient times difference (attribution patching); 16 of them.
2. The norm, in the dense model: the largest of a ladder at which 95 % of random directions, as long at every token that
   the read moves, leave P(counterfactual answer) quiet.
3. Sets, greedily: of size 1 the candidate that steers best at half of that norm and at all of it, then one more at a
   time. All on selection prompts.
4. P(counterfactual answer) of those sets at that norm, on evaluation prompts. Nothing is chosen there.

The controls change one thing: the columns (shuffled among all channels, or of an untrained bridge), the basis of the
read (a random rotation; all channels together move the same), or the task whose prompts name the candidates.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from bridges.hybrid import advance, residuals
from bridges.run_folder import Run
from bridges.sites import Site
from interventions.bundle.channels import read_gain, residual_reads
from interventions.editing.where import Where
from interventions.steering.edits import Changes, Columns, channel_edit, mean_norm, sparse_changes
from interventions.steering.experiment_config import CANDIDATES
from interventions.steering.result import OURS
from interventions.steering.rivals import along, random_directions, shuffled_columns, untrained_columns
from interventions.steering.steered_prompts import Prompts, SteeredPrompts, Vectors, prompts_of, steerable
from interventions.steering.strengths import QUIET, SEARCH_DRAWS
from interventions.tasks.base import CannotPresent, TaskBatch
from interventions.tasks.catalogue import get_task, list_tasks
from sparse_model.io.progress import progress_bar

SIZES = (1, 2, 4, 8)
NORMS = tuple(round(0.05 * 1.25**i, 4) for i in range(24))
"""Norms that are tried, .05 to 8.5."""

Basis = Float[Tensor, "d_sparse d_sparse"]


class Attribution(NamedTuple):
    """What the sparse model's answer hangs on, to first order: effects are sums of gradient times change."""

    gradient: Float[Tensor, "prompt pos d_sparse"]
    change: Float[Tensor, "prompt pos d_sparse"]

    def candidates(self, basis: Basis | None = None) -> list[int]:
        """The channels, or the axes of another basis, with the largest effects on the counterfactual answer."""
        gradient, change = self if basis is None else (part @ basis for part in self)
        return (gradient * change).sum((0, 1)).argsort(descending=True)[:CANDIDATES].tolist()


@torch.enable_grad()
def attribution(run: Run, prompts: Prompts, site: int) -> Attribution:
    """The gradient of mean log P(counterfactual answer) by the sparse read at a site, and the read's change."""
    sparse, row = run.sparse, torch.arange(len(prompts.last), device=prompts.tokens.device)
    kept: list[Tensor] = []

    def keep(value: Tensor, hook: object) -> Tensor:
        kept.append(value.detach().requires_grad_())
        return kept[0]

    with torch.no_grad():
        change = residual_reads(sparse, prompts.counterfactual, site) - residual_reads(sparse, prompts.tokens, site)
        resid = residuals(sparse, prompts.tokens)[site]
    with sparse.hooks(fwd_hooks=[(Site(site, sparse.n_layers).read_hook, keep)]):
        end = advance(sparse, site, resid)
        logits = sparse.unembed(end[row, prompts.last][:, None], prompts.tokens[row, prompts.last][:, None])
    (gradient,) = torch.autograd.grad(logits[:, 0].log_softmax(-1)[row, prompts.target].mean(), kept[0])
    return Attribution(gradient[..., : sparse.d_model] * read_gain(sparse, site).detach(), change)


class EqualSearch:
    """The search, and its evaluation, at one site for one task."""

    @torch.no_grad()
    def __init__(
        self, run: Run, selection: TaskBatch, evaluation: TaskBatch, site: int, where: Where, sizes: Sequence[int]
    ) -> None:
        self.run, self.site, self.sizes = run, site, [n for n in sizes if n <= CANDIDATES]
        self._prompts = [prompts_of(batch) for batch in (selection, evaluation)]
        self._steered = [SteeredPrompts(steerable(run), prompts, site, where) for prompts in self._prompts]
        self._changes = [sparse_changes(run, site, prompts) for prompts in self._prompts]
        self.attribution = attribution(run, self._prompts[0], site)
        self.columns: Columns = run.bridges.directions(site)
        self.norm = self._quiet_norm()

    def _quiet_norm(self) -> float:
        moved = (self._changes[0] != 0).any(-1, keepdim=True).to(self.columns)
        generator = torch.Generator().manual_seed(0)
        directions = list(along(random_directions(SEARCH_DRAWS, self.columns.shape[1], generator), moved))
        quiet, limit = 0.0, self._steered[0].p_at(QUIET)
        for norm in NORMS:
            if float(self._steered[0].answers(directions, [norm]).target.mean(2)[0].quantile(0.95)) > limit:
                break
            quiet = norm
        return quiet

    @torch.no_grad()
    def p(
        self, candidates: Sequence[int], columns: Columns | None = None, basis: Basis | None = None
    ) -> dict[str, float]:
        """P(counterfactual answer) on evaluation prompts of the set that the search finds of each size."""
        columns = self.columns if columns is None else columns
        selection, evaluation = self._changes
        if basis is not None:
            columns, selection, evaluation = basis.T @ columns, selection @ basis, evaluation @ basis
        sets = greedy_sets(self._steered[0], selection, columns, candidates, self.norm, self.sizes)
        edits = _unit_edits(evaluation, columns, sets.values())
        p = self._steered[1].answers(edits, [self.norm]).target.mean(2)[0].tolist() if sets else []
        return {str(size): value for size, value in zip(sets, p, strict=True)}


def greedy_sets(
    steered: SteeredPrompts,
    changes: Changes,
    columns: Columns,
    candidates: Sequence[int],
    norm: float,
    sizes: Sequence[int],
) -> dict[int, list[int]]:
    """Sets by size: the candidate that steers best at half a norm and at all of it, then one more at a time."""
    found: dict[int, list[int]] = {}
    grown: list[int] = []
    for size in range(1, max(sizes, default=0) + 1):
        left = [c for c in candidates if c not in grown]
        if not left:
            break
        edits = _unit_edits(changes, columns, ([*grown, c] for c in left))
        effects = steered.answers(edits, [norm / 2, norm]).target.mean(2).mean(0)
        grown = [*grown, left[int(effects.argmax())]]
        if size in sizes:
            found[size] = grown
    return found


def _unit_edits(changes: Changes, columns: Columns, sets: Iterable[Sequence[int]]) -> Iterator[Vectors]:
    edits = (channel_edit(changes, columns, channels) for channels in sets)
    return (edit / max(mean_norm(edit), 1e-30) for edit in edits)


def search_equally(
    search: EqualSearch, task: str, *, draws: int, pairs: int, seed: int, progress: bool = False
) -> dict[str, dict[str, list[float]]]:
    """What the search finds with the trained bridge and with every control, by control and size: a value per draw.

    There are as many permuted tasks as the tokenizer can present besides this one, at most `draws`.
    """
    run, generator = search.run, torch.Generator().manual_seed(seed)
    own_candidates = search.attribution.candidates()
    width = run.sparse.d_model

    def values() -> Iterator[tuple[str, dict[str, float]]]:
        yield OURS, search.p(own_candidates)
        for columns in shuffled_columns(search.columns, draws, generator):
            yield "shuffled decoder", search.p(own_candidates, columns)
        for columns in untrained_columns(run.bridges, draws, seed):
            yield "untrained bridge", search.p(own_candidates, columns)
        for _ in range(draws):
            basis = torch.linalg.qr(torch.randn(width, width, generator=generator))[0].to(search.columns)
            yield "rotated basis", search.p(search.attribution.candidates(basis), basis=basis)
        for candidates in _candidates_of_other_tasks(search, task, draws, pairs, seed):
            yield "permuted tasks", search.p(candidates)

    found: dict[str, dict[str, list[float]]] = {}
    for name, by_size in progress_bar(values(), f"{task}: searches", 1 + 4 * draws, leave=False, disable=not progress):
        for size, p in by_size.items():
            found.setdefault(name, {}).setdefault(size, []).append(p)
    return found


def _candidates_of_other_tasks(
    search: EqualSearch, task: str, draws: int, pairs: int, seed: int
) -> Iterator[list[int]]:
    run = search.run
    left = draws
    for name in list_tasks():
        if name == task or not left:
            continue
        try:
            other = get_task(name, run.tokenizer, max_tokens=run.config.sparse.n_ctx)
            batch = other.sample(pairs, split="selection", seed=seed).to(search.columns.device)
        except CannotPresent:
            continue
        left -= 1
        yield attribution(run, prompts_of(batch), search.site).candidates()

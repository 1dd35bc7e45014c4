"""The search that ours and every control go through."""

import copy

import pytest
import torch
from support.steering_runs import TASK

from bridges.run_folder import Run
from interventions.steering.edits import channel_edit, mean_norm, sparse_changes
from interventions.steering.result import OURS
from interventions.steering.search import NORMS, EqualSearch, attribution, search_equally
from interventions.steering.steered_prompts import SteeredPrompts, prompts_of, steerable
from interventions.tasks.catalogue import get_task

SITE = 2


@pytest.fixture
def search(dense, run: Run, monkeypatch: pytest.MonkeyPatch) -> EqualSearch:
    # The tiny model does not solve the task: there is no way to go a share of.
    monkeypatch.setattr(SteeredPrompts, "p_at", lambda steered, share: share)
    task = get_task(TASK, run.tokenizer, max_tokens=64)
    batches = [task.sample(4, split=split, seed=0) for split in ("selection", "evaluation")]
    return EqualSearch(run, *batches, SITE, "read", (1, 2))


def test_attributions_are_patching_effects_to_first_order(dense, run: Run) -> None:
    """Patching one channel of the read a millionth of the way, in the sparse model itself, in double precision."""
    run = run._replace(sparse=copy.deepcopy(run.sparse).double())
    prompts = prompts_of(get_task(TASK, run.tokenizer).sample(4, split="selection", seed=0))
    gradient, change = attribution(run, prompts, SITE)
    predicted = (gradient * change).sum((0, 1))
    row = torch.arange(len(prompts.last))
    for c in predicted.abs().argsort(descending=True)[:3].tolist():
        p = []
        for step in (1e-6, -1e-6):

            def patch(value: torch.Tensor, hook: object, step: float = step, c: int = c) -> torch.Tensor:
                value = value.clone()
                value[..., c] += step * change[..., c]
                return value

            logits = run.sparse.run_with_hooks(prompts.tokens, fwd_hooks=[("blocks.1.attn.hook_in", patch)])
            p.append(logits[row, prompts.last].log_softmax(-1)[row, prompts.target].mean())
        assert float(p[0] - p[1]) / 2e-6 == pytest.approx(float(predicted[c]), rel=1e-3)


@torch.no_grad()
def test_the_search_adds_the_best_candidate_and_measures_it_elsewhere(run: Run, search: EqualSearch) -> None:
    task = get_task(TASK, run.tokenizer, max_tokens=64)
    chosen_on, measured_on = (prompts_of(task.sample(4, split=s, seed=0)) for s in ("selection", "evaluation"))
    columns = run.bridges.directions(SITE)

    def p(prompts, channels: list[int], strength: float) -> float:
        edit = channel_edit(sparse_changes(run, SITE, prompts), columns, channels)
        steered = SteeredPrompts(steerable(run), prompts, SITE, "read")
        return float(steered.answers([edit], [strength / mean_norm(edit)]).target.mean())

    candidates = search.attribution.candidates()[:5]
    assert search.norm in NORMS
    grown: list[int] = []
    for size in ("1", "2"):
        left = [c for c in candidates if c not in grown]
        effects = [sum(p(chosen_on, [*grown, c], part * search.norm) for part in (0.5, 1)) for c in left]
        grown.append(left[max(range(len(left)), key=effects.__getitem__)])
        assert search.p(candidates)[size] == pytest.approx(p(measured_on, grown, search.norm), rel=1e-4)


@torch.no_grad()
def test_all_axes_of_a_rotated_basis_move_what_all_channels_do(run: Run, search: EqualSearch) -> None:
    basis = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0)))[0]
    changes = sparse_changes(run, SITE, search._prompts[0])
    everything = list(range(32))
    rotated = channel_edit(changes @ basis, basis.T @ search.columns, everything)
    torch.testing.assert_close(rotated, channel_edit(changes, search.columns, everything), rtol=1e-3, atol=1e-4)
    swapped = torch.eye(32)[[1, 0, *range(2, 32)]]
    candidates = search.attribution.candidates()
    renamed = [{0: 1, 1: 0}.get(c, c) for c in candidates]
    assert search.attribution.candidates(swapped) == renamed
    assert search.p(renamed, basis=swapped) == pytest.approx(search.p(candidates), rel=1e-4)
    assert search.p(search.attribution.candidates(basis), basis=basis) != pytest.approx(search.p(candidates), rel=1e-6)


def test_every_control_goes_through_the_same_search(run: Run, search: EqualSearch) -> None:
    found = search_equally(search, TASK, draws=2, pairs=4, seed=0)
    assert list(found) == [OURS, "shuffled decoder", "untrained bridge", "rotated basis", "permuted tasks"]
    assert {name: [len(v) for v in by_size.values()] for name, by_size in found.items()} == {
        name: [1, 1] if name == OURS else [2, 2] for name in found
    }
    assert found[OURS] == {n: [p] for n, p in search.p(search.attribution.candidates()).items()}
    assert search_equally(search, TASK, draws=2, pairs=4, seed=0) == found
    for control, by_size in found.items():
        assert control == OURS or by_size["2"] != found[OURS]["2"] * 2, control

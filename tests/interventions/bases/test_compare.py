"""The comparison's figures, by another way than the one that made them."""

import json

import pytest
import torch
from support.steering_runs import SMALL_COMPARISON, TASK, p_target

from bridges.run_folder import Run
from interventions.bases.bases import Place, make_bases
from interventions.bases.compare import LADDER, _equal_norm, _Stand, candidates_of, first_reached
from interventions.bases.result import OURS, TARGETS, Bases, Effects, plot_bases, title, verdict
from interventions.editing.intervene import intervene_vector
from interventions.steering.edits import channel_edit, mean_norm, sparse_changes
from interventions.steering.rivals import exact_patch
from interventions.steering.search import attribution
from interventions.steering.setting import Setting
from interventions.steering.side_effects import fixed_vector
from interventions.steering.steered_prompts import SteeredPrompts, prompts_of


def row_of(result: Bases, basis: str, latents: int = 1):
    return next(row for row in result.rows if row.basis == basis and row.latents == latents)


def test_every_basis_is_compared_at_every_size(result: Bases) -> None:
    searched = [OURS, f"{OURS}, own", "ridge regression", "TopK autoencoder, k 4"]
    searched += ["principal components", "rotated axes"]  # site 2 is read by an attention: no transcoder
    assert [title(row) for row in result.rows] == [
        "exact patch",
        *(f"{name}, {size}" for name in searched for size in SMALL_COMPARISON.sizes),
        "difference of means",
        "difference of means, last token",
        "logistic probe",
    ]
    for row in result.rows:
        assert len(row.p) == len(row.kl) == len(result.ladder) == len(LADDER)
        assert len(set(row.indices)) == (row.latents if row.indices else 0)


@torch.no_grad()
def test_figures_are_those_of_an_edited_pass(result: Bases, run: Run, setting: Setting) -> None:
    row, prompts = row_of(result, OURS, 3), setting.prompts
    edit = channel_edit(sparse_changes(run, setting.site, prompts), run.bridges.directions(setting.site), row.indices)
    columns, selection = run.bridges.directions(setting.site), prompts_of(setting.selection)
    chosen_on = channel_edit(sparse_changes(run, setting.site, selection), columns, row.indices)
    unit = mean_norm(exact_patch(run.dense, setting.site, prompts_of(setting.selection), "read"))
    assert result.unit == {f"{setting.site} read": pytest.approx(unit)}
    for place in (4, 12):
        scaled = edit * (result.ladder[place] * unit / mean_norm(edit))
        with intervene_vector(setting.hf, setting.site, scaled, where="read"):
            p = p_target(setting.hf(prompts.tokens, use_cache=False).logits, prompts).mean()
        assert row.p[place] == pytest.approx(float(p), rel=1e-4)
        mean = fixed_vector(chosen_on) * (result.ladder[place] * unit / mean_norm(chosen_on))
        before = setting.hf(setting.held_out, use_cache=False).logits.double().log_softmax(-1)
        with intervene_vector(setting.hf, setting.site, mean, where="read"):
            after = setting.hf(setting.held_out, use_cache=False).logits.double().log_softmax(-1)
            p_fixed = p_target(setting.hf(prompts.tokens, use_cache=False).logits, prompts).mean()
        assert row.kl[place] == pytest.approx(float((before.exp() * (before - after)).sum(-1).mean()), rel=1e-3)
        assert row.p_fixed[place] == pytest.approx(float(p_fixed), rel=1e-4)
    assert row.equal == row.p[result.ladder.index(result.equal)]


@torch.no_grad()
def test_the_exact_patch_gives_the_counterfactuals_answer(result: Bases, run: Run, setting: Setting) -> None:
    """At norm 1, the dense model with its own counterfactual read, written in by a hook."""
    module = setting.hf.transformer.h[1].ln_1  # what site 2 is read through
    there: list[torch.Tensor] = []
    with module.register_forward_hook(lambda *call: there.append(call[2])):
        setting.hf(setting.prompts.counterfactual, use_cache=False)
    mask = setting.prompts.open[..., None]
    with module.register_forward_hook(lambda *call: torch.where(mask, there[0], call[2])):
        p = p_target(setting.hf(setting.prompts.tokens, use_cache=False).logits, setting.prompts).mean()
    edit = exact_patch(run.dense, setting.site, setting.prompts, "read")
    scale = mean_norm(edit) / result.unit[f"{setting.site} read"]  # the unit is that of selection prompts
    assert scale == pytest.approx(1, rel=0.3)
    with intervene_vector(setting.hf, setting.site, edit, where="read"):
        measured = p_target(setting.hf(setting.prompts.tokens, use_cache=False).logits, setting.prompts).mean()
    assert float(measured) == pytest.approx(float(p), rel=1e-4)


def test_candidates_are_first_order_effects_in_the_dense_model(run: Run, setting: Setting) -> None:
    """The gradient's share of a small edit is what two edited passes differ by."""
    stand = _Stand.at(setting, Place(setting.site, "read"))
    gradient, prompts = stand.gradient(), stand.selection.prompts
    basis = make_bases(run, setting.site, setting.train, {}, 0)["rotated axes"]
    changes = basis.changes(prompts)
    order = candidates_of(gradient, changes, basis)
    predicted = {c: float((gradient * channel_edit(changes, basis.columns, [c])).sum()) for c in (*order[:2], 5)}
    assert sorted(predicted, key=predicted.__getitem__, reverse=True)[0] == order[0]
    for c, value in predicted.items():
        p = []
        for step in (0.02, -0.02):
            with intervene_vector(
                setting.hf, setting.site, step * channel_edit(changes, basis.columns, [c]), where="read"
            ):
                logits = setting.hf(prompts.tokens, use_cache=False).logits
            p.append(float(p_target(logits, prompts).double().log().mean()))
        assert (p[0] - p[1]) / 0.04 == pytest.approx(value, rel=0.05, abs=2e-5), c


def test_sets_are_found_on_selection_prompts(result: Bases, run: Run, setting: Setting) -> None:
    """The best single latent among the candidates, by edited passes of the selection prompts alone."""
    stand = _Stand.at(setting, Place(setting.site, "read"))
    basis = make_bases(run, setting.site, setting.train, {}, 0)[OURS]
    prompts = stand.selection.prompts
    changes = basis.changes(prompts)
    for name, candidates in (
        (OURS, candidates_of(stand.gradient(), changes, basis)),
        (f"{OURS}, own", attribution(run, prompts, setting.site).candidates()),
    ):
        effects = {}
        for c in candidates:
            edit = channel_edit(changes, basis.columns, [c])
            edit = edit / max(mean_norm(edit), 1e-30)
            norms = [result.equal * stand.unit / 2, result.equal * stand.unit]
            effects[c] = float(stand.selection.answers([edit], norms).target.mean())
        assert row_of(result, name).indices == [max(effects, key=effects.__getitem__)]
        assert row_of(result, name, 3).indices[0] == row_of(result, name).indices[0]


def test_the_equal_norm_is_the_largest_quiet_one(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    stand = _Stand.at(setting, Place(setting.site, "read"))
    for threshold in (0.0, 1.0):
        monkeypatch.setattr(SteeredPrompts, "p_at", lambda steered, share, limit=threshold: limit)
        assert _equal_norm(stand, 3)[0] == (LADDER[0] if threshold == 0 else LADDER[-1])


def test_targets_are_reached_at_the_first_norm() -> None:
    curve = [0.1, 0.6, 0.4, 0.9] + [0.2] * 12
    assert [first_reached(curve, target) for target in (*TARGETS, 0.95)] == [LADDER[1], LADDER[3], None]


def test_results_are_json_and_read_back(result: Bases, tmp_path) -> None:
    stored = json.loads(json.dumps({"bases": {TASK: result.plain()}}))
    assert Bases.from_metrics(stored, TASK, tmp_path) == result
    del stored["bases"][TASK]["equal"]
    with pytest.raises(ValueError, match="of another version or damaged, compare again: sparse-bridges compare-bases"):
        Bases.from_metrics(stored, TASK, tmp_path)


def test_the_figure_and_the_verdict(result: Bases, tmp_path) -> None:
    assert plot_bases(result, tmp_path / "bases.png").read_bytes().startswith(b"\x89PNG")
    weak = [row._replace(reached={"0.5": None, "0.9": None}) for row in result.rows]
    assert "3 sparse channels never go 0.5 of the way" in verdict(result._replace(rows=weak))
    strong = [
        row._replace(
            reached={"0.5": float(n), "0.9": None},
            fixed={"0.5": Effects(float(n), 0.5, 1 / n, 2.0, {})},
        )
        for n, row in enumerate(result.rows, 1)
    ]
    said = verdict(result._replace(rows=strong))
    own = strong.index(next(row for row in strong if row.basis == OURS and row.latents == 3)) + 1
    assert f"3 sparse channels go 0.5 of the way to the counterfactual's P at norm {own}; so do 4 of 4 other" in said
    assert "other bases, at 7 (ridge regression) or more." in said
    assert f"with a KL of {1 / own:.3f} on other text, the quietest other, rotated axes, with" in said
    silent = [row._replace(fixed={}) for row in strong]
    assert verdict(result._replace(rows=silent)).endswith("As one vector at every token they never do.")

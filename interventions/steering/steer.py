"""Steering experiments: strength curves in the dense model, with their controls (paper A.4, Figure 9).

Each stage is a value that the next one takes:

1. The setting (`setting`): evaluation prompts of a task, whose templates neither training nor selection saw, the sets
   of channels, and the strengths, chosen on selection prompts.
2. The edits (`arms`): every channel of a set moves by its per-token difference in the sparse model. The controls
   (`rivals`) do without the channels' meaning, the bridge or the sparse model. One set is the reference: the drawn
   controls have its number of channels and, token by token, its edit's norm.
3. The answers under every edit at every strength (`measure`); random directions are repeated with the norm of every
   other set and of the difference of means. One search finds sets at one norm, for the trained bridge and for every
   control (`search`).
4. The result (`result`), and at its chosen strength what each set does to everything else (`side_effects`).
"""

import json
from dataclasses import asdict

import torch
from torch import nn

from bridges.run_folder import Run
from interventions.steering.arms import Drawn, Edits, draw_controls, make_edits
from interventions.steering.edits import mean_norm
from interventions.steering.experiment import Experiment
from interventions.steering.measure import (
    EditCurves,
    RandomCurves,
    edit_curves,
    random_curves,
    search_all,
    side_effects,
)
from interventions.steering.result import Steering, chosen_strength
from interventions.steering.setting import Setting, prepare_setting
from interventions.steering.steered_prompts import SteeredPrompts


@torch.no_grad()
def steer(dense: nn.Module, experiment: Experiment, *, progress: bool = True) -> Steering:
    """Run an experiment on a model from `load_dense`; the same experiment gives the same result.

    Raises what `prepare_setting` raises.
    """
    setting = prepare_setting(dense, experiment, progress=progress)
    edits = make_edits(setting)
    drawn = draw_controls(setting, edits.sets[setting.reference])
    steered = SteeredPrompts(setting.hf, setting.prompts, setting.site, setting.plan.where)
    curves = edit_curves(setting, steered, edits)
    random = random_curves(setting, steered, edits, drawn, progress=progress)
    norm, searched = search_all(setting, progress=progress)
    result = _result(setting, edits, drawn, curves, random, steered.reach)
    result = result._replace(search_norm=norm, searched=searched)
    movable = edits.sets | {"difference_of_means": edits.difference_of_means}
    chosen = {name: chosen_strength(result, name) * edit for name, edit in movable.items()}
    return result._replace(side_effects=side_effects(setting, chosen, drawn, progress=progress))


def _result(
    setting: Setting,
    edits: Edits,
    drawn: Drawn,
    curves: EditCurves,
    random: RandomCurves,
    reach: float,
) -> Steering:
    """Everything but the searches, and the side effects, which are measured at strengths that the result tells."""
    sets, plan = setting.sets, setting.plan
    return Steering(
        task=setting.task,
        strength=[float(s) for s in plan.strengths],
        channels={name: curves.p[name] for name in sets},
        two_way={name: curves.two_way[name] for name in sets},
        **random.drawn,
        difference_of_means=curves.p["difference_of_means"],
        prompts=plan.pairs,
        random_draws=plan.draws,
        where=plan.where,
        site=setting.site,
        sets=sets,
        channels_low={name: curves.low[name] for name in sets},
        channels_high={name: curves.high[name] for name in sets},
        ridge={name: curves.p[f"ridge {name}"] for name in sets},
        paper={name: curves.p[f"paper {name}"] for name in sets},
        by_patching={name: curves.p[f"by_patching {name}"] for name in setting.patching_sets},
        patching_sets=setting.patching_sets,
        exact_patch=curves.p["exact_patch"],
        reference=setting.reference,
        norms={name: mean_norm(edit) for name, edit in edits.named().items()} | drawn.norms(),
        ridge_fit=edits.ridge_fit,
        side_effects={},
        experiment=json.loads(json.dumps(asdict(plan))),
        model=_model(setting.run),
        random_own_p95=random.own_length_p95,
        chosen=setting.chosen,
        search_norm=0.0,
        searched={},
        digest=setting.channel.digest,
        reach=reach,
    )


def _model(run: Run) -> dict[str, int | float]:
    """What tells the run from others."""
    return {
        "layers": run.dense.n_layers,
        "d_dense": run.dense.d_model,
        "d_sparse": run.sparse.d_model,
        "nonzero_fraction": run.config.sparsity.nonzero_fraction,
        "seed": run.config.seed,
    }

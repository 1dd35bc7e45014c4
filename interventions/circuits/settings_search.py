"""Search over the settings of pruning, by optuna's TPE sampler (the paper: CARBS, 256 trials per model and task, A.5).

Each trial prunes once and counts the edges of the circuit at the target loss; the first takes the settings as given
(where they lie in the ranges), so the best is never worse than those. Finished trials are kept in a database and count
when a search is begun again.
"""

import hashlib
import json
import signal
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interventions.circuits.prune_config import PruneConfig
from sparse_model.io.atomic import failed_writes_named
from sparse_model.io.progress import progress_bar
from sparse_model.training.interrupts import stop_signals

if TYPE_CHECKING:
    import optuna

RANGES: dict[str, tuple[float, float]] = {
    "k_coef": (1e-5, 1e-2),
    "lr": (1e-3, 1e-1),
    "init_noise_scale": (1e-3, 1e-1),
    "init_noise_bias": (1e-2, 5e-1),
    "heaviside_temp": (1e-1, 3.0),
    "weight_decay": (1e-5, 1e-1),
    "beta2": (5e-3, 3e-1),
}
"""Lowest and highest value of each setting, drawn evenly in its logarithm; of beta2 it is 1 - beta2 that is drawn."""


def search_config(
    edges: Callable[[PruneConfig], int],
    base: PruneConfig,
    trials: int,
    path: Path,
    key: str,
    *,
    progress: bool = False,
) -> tuple[PruneConfig, int, int]:
    """The settings with the fewest edges among `trials` of them: (settings, edges, trials finished).

    `edges` prunes and counts. `path` is the database; its searches are told apart by `key` (what is pruned) and `base`,
    from which all other settings are taken. Ctrl-C ends it after the running trial, a second one at once.

    Raises ValueError for fewer than one trial and where optuna is not installed, and what `edges` raises.
    """
    if trials < 1:
        raise ValueError(f"search={trials}: at least one trial")
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise ValueError("--search needs optuna: install it with pip install 'sparse-bridges[search]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with failed_writes_named(path):
        return _searched(path, key, base, edges, trials, progress)


def _searched(
    path: Path, key: str, base: PruneConfig, edges: Callable[[PruneConfig], int], trials: int, progress: bool
) -> tuple[PruneConfig, int, int]:
    import optuna

    path.parent.mkdir(parents=True, exist_ok=True)
    settings_digest = hashlib.sha256(json.dumps([key, asdict(base)], sort_keys=True).encode()).hexdigest()[:12]
    study = optuna.create_study(
        storage=f"sqlite:///{path}", study_name=f"{key} {settings_digest}", direction="minimize", load_if_exists=True
    )
    before = _finished(study)
    # A sampler seeded alike would draw the trials of the first session again.
    study.sampler = optuna.samplers.TPESampler(seed=base.seed + 1000 * before)
    if not before:
        study.enqueue_trial({name: _setting(name, getattr(base, name)) for name in RANGES})
    with (
        stop_signals(signal.SIGINT) as caught,
        progress_bar(
            total=trials, initial=min(before, trials), desc="search", unit="trial", disable=not progress
        ) as bar,
    ):

        def ended(study: "optuna.Study", trial: Any) -> None:
            bar.set_postfix(edges=int(study.best_value), refresh=False)
            bar.update()
            if caught:
                study.stop()

        if before < trials:
            study.optimize(lambda t: edges(_drawn_config(t, base)), n_trials=trials - before, callbacks=[ended])
    return _changed(base, study.best_params), int(study.best_value), _finished(study)


def _finished(study: "optuna.Study") -> int:
    return sum(trial.state.name == "COMPLETE" for trial in study.trials)


def _drawn_config(trial: "optuna.Trial", base: PruneConfig) -> PruneConfig:
    return _changed(base, {name: trial.suggest_float(name, *ends, log=True) for name, ends in RANGES.items()})


def _changed(base: PruneConfig, drawn: dict[str, Any]) -> PruneConfig:
    return replace(base, **{name: _setting(name, value) for name, value in drawn.items()})


def _setting(name: str, drawn: Any) -> Any:
    # Its own inverse.
    return 1 - drawn if name == "beta2" else drawn

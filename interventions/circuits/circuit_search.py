"""A task's circuit in a run, in one call: prompts, ablated values, pruning, and on request the controls."""

import dataclasses
import logging
from pathlib import Path

from jaxtyping import Int
from torch import Tensor

from bridges.run_folder import Run, fingerprint, read_metrics
from interventions.bundle.channels import load_channels
from interventions.circuits.ablation import Ablation
from interventions.circuits.circuit import FOLDER, Circuit, make_circuit, read_kept_nodes
from interventions.circuits.controls import control_steps, validate
from interventions.circuits.faithfulness import measure_faithfulness
from interventions.circuits.interchange import channel_nodes
from interventions.circuits.node_model import Kept, ModelKind, NodeModel, as_nodes, count_edges
from interventions.circuits.prune_config import PruneConfig
from interventions.circuits.pruning import Pruned, prune, reference_ablation, splits
from interventions.circuits.pruning_seeds import choose, consensus, prune_seeds, pruning_steps, summaries
from interventions.circuits.settings_search import RANGES, search_config
from interventions.tasks.base import Task
from interventions.tasks.catalogue import TaskName
from interventions.tasks.names import PromptKind
from interventions.tasks.of_run import recorded_task, run_task
from interventions.tasks.record import TaskFigures
from sparse_model.data.prepare import prepare_corpus
from sparse_model.io.commands import command_line
from sparse_model.io.progress import Bar, progress_bar
from sparse_model.io.reading import typed

logger = logging.getLogger(__name__)


def find_circuit(
    run: Run,
    task: TaskName,
    config: PruneConfig | None = None,
    *,
    prompts: PromptKind = "generated",
    model: ModelKind = "sparse",
    controls: bool = False,
    search: int = 0,
    start_from: str | Path | None = None,
    seeds: int = 3,
    agreed: bool = False,
    evaluation_pairs: int = 128,
    progress: bool = False,
    bar: Bar | None = None,
) -> Circuit:
    """The circuit of a task in a run's sparse (or dense) model; nothing is saved (see `save_circuit`).

    It says how it does on evaluation prompts (`Circuit.faithfulness`); one that misses its target there is `failed`.

    task: one of the twenty, or a file of pairs (`interventions.tasks.files`).
    config: settings of the pruning; None: their defaults.
    prompts: generated from templates, or natural, from held-out files.
    controls: also run the controls, as `with_controls` does; without them the claim is uncontrolled.
    search: trials of a search over the settings for the fewest edges. They are kept in RUN/circuits/search.db.
    seeds: prunings that it is chosen from, see `pruning_seeds`; the config's seed is the first.
    agreed: take the consensus of the prunings in place of the best of them.
    evaluation_pairs: of templates that neither pruning nor selection saw.
    start_from: a warm start, the .json file of a circuit whose nodes begin kept, all others deleted.
    bar: a progress bar of more than this call, in place of its own, see `circuit_bar`.

    Raises what `run_task` raises, ValueError for a task that the model does not solve (see `prune`), and what
    `read_kept_nodes`, `search_config` and `prepare_corpus` raise.
    """
    config, nodes = config or PruneConfig(), _model(run, model)
    bound = run_task(run, task, prompts)
    config = _fitted(config, bound)
    if agreed and seeds < 2:
        raise ValueError(f"seeds={seeds}: a consensus needs at least two prunings")
    start = read_kept_nodes(start_from, nodes.shape) if start_from else None
    ablation = reference_ablation(nodes, _held_out(run, progress), config)
    if search:
        config = _searched(run, nodes, bound, ablation, config, search, progress)
    prunings = prune_seeds(nodes, bound, ablation, config, seeds, start=start, progress=progress, bar=bar)
    common = consensus(nodes, bound, ablation, prunings)
    taken = common if agreed and common else choose(prunings)
    pruned, config = taken.pruned, taken.config
    _report_gates(pruned, config)
    evaluation = bound.sample_up_to(evaluation_pairs, split="evaluation", seed=config.seed)
    circuit = make_circuit(
        nodes,
        pruned.kept,
        tied_qk=config.tied_qk,
        task=bound.name,
        prompts=bound.record,
        fingerprint=fingerprint(run),
        loss=pruned.loss,
        unpruned_loss=pruned.unpruned_loss,
        calibration=pruned.calibration,
        ablation=ablation,
        config=dataclasses.asdict(config),
        faithfulness=measure_faithfulness(nodes, pruned.kept, ablation, pruned.calibration, evaluation, config),
        seeds=summaries(prunings, common, taken),
        ngram_floor=_floor(run.folder, bound.name),
    )
    return with_controls(run, circuit, progress=progress, bar=bar) if controls else circuit


def circuit_bar(config: PruneConfig, seeds: int, *, controls: bool) -> Bar:
    """A progress bar of all prunings, and of the controls where they follow: the time left is that of all together."""
    total = seeds * pruning_steps(config) + (control_steps(config) if controls else 0)
    return progress_bar(total=total, unit="step", leave=False)


def with_controls(
    run: Run,
    circuit: Circuit,
    *,
    draws: int = 20,
    evaluation_pairs: int = 128,
    progress: bool = False,
    bar: Bar | None = None,
) -> Circuit:
    """A circuit that `find_circuit` found in the run, with its controls: `Circuit.controls`.

    draws: random sets of nodes that necessity and interchange are compared with.
    evaluation_pairs: of templates that neither pruning nor selection saw.
    """
    belongs, of_this_run = circuit.fingerprint, fingerprint(run)
    if belongs != of_this_run:
        raise ValueError(
            f"the circuit for {circuit.task} is of another model ({belongs}; {run.folder} is {of_this_run}): open the "
            "run that it was found in"
        )
    config = PruneConfig(**circuit.config)
    task = recorded_task(run, circuit.task, circuit.prompts)
    evaluation = task.sample_up_to(evaluation_pairs, split="evaluation", seed=config.seed)
    result = validate(
        _model(run, circuit.model),
        circuit,
        *splits(task, config),
        evaluation,
        _held_out(run, progress),
        config,
        channels=_named_nodes(run, circuit.task) if circuit.model == "sparse" else {},
        draws=draws,
        progress=progress,
        bar=bar,
    )
    return dataclasses.replace(circuit, controls=result.to_dict())


def _fitted(config: PruneConfig, task: Task) -> PruneConfig:
    """The settings with no more pairs than the task has."""
    pool = task.at_most(config.pool, "train")
    selection_pairs = task.at_most(config.selection_pairs, "selection")
    return dataclasses.replace(config, pool=pool, pairs=min(config.pairs, pool), selection_pairs=selection_pairs)


def _floor(folder: Path, task: str) -> float | None:
    """Pair accuracy of a table of trigrams on the evaluation prompts, where `solved-tasks` has counted it."""
    tasks = typed(
        dict[str, TaskFigures],
        read_metrics(folder).get("tasks", {}),
        folder / "metrics.json",
        f"run {command_line('solved-tasks', folder)} again",
    )
    return tasks.get(task, {}).get("floors", {}).get("evaluation", {}).get("trigram")


def _model(run: Run, kind: ModelKind) -> NodeModel:
    return as_nodes(run.sparse if kind == "sparse" else run.dense)


def _held_out(run: Run, progress: bool) -> Int[Tensor, "block pos"]:
    return prepare_corpus(run.config, run.tokenizer, samples=run.samples, progress=progress).val


def _searched(
    run: Run, model: NodeModel, task: Task, ablation: Ablation, base: PruneConfig, trials: int, progress: bool
) -> PruneConfig:
    """The settings with the fewest edges."""
    pairs, database = splits(task, base), run.folder / FOLDER / "search.db"
    key = f"{task.name} {model.kind} {fingerprint(run)}{task.record.get('sha256', '')}"

    def edges(config: PruneConfig) -> int:
        return count_edges(model, prune(model, *pairs, ablation, config).kept)

    config, fewest, finished = search_config(edges, base, trials, database, key, progress=progress)
    settings = {name: f"{getattr(config, name):.3g}" for name in RANGES}
    logger.info("fewest edges in %d trials: %d, with %s", finished, fewest, settings)
    return config


def _named_nodes(run: Run, task: str) -> dict[str, Kept]:
    """The nodes of the run's channels for a task, by name; what the unembedding reads is no node."""
    return {
        name: channel_nodes(channel, run.sparse.cfg)
        for name, channel in load_channels(run.folder).items()
        if channel.selection.get("task") == task and channel.site < 2 * run.sparse.n_layers
    }


def _report_gates(pruned: Pruned, config: PruneConfig) -> None:
    loss, nodes = pruned.history[-1]
    logger.info("gates at the end of pruning: %d nodes, training loss %.4f (uncalibrated)", nodes, loss)
    if loss > config.target_loss:
        logger.warning("the gates miss the target, so the circuit is larger than need be: lower k_coef or raise steps")

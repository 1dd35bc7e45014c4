"""Find the circuit of a task in a run's sparse (or dense) model and write it to RUN/circuits.

Without --controls the claim is uncontrolled, and the output says so.

Examples:
    python scripts/find_circuit.py --run runs/demo
    python scripts/find_circuit.py --run runs/demo --task bracket_counting --controls
    python scripts/find_circuit.py --run runs/demo --search 20
"""

import dataclasses
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from bridges.run_folder import Run, fingerprint, open_run
from interventions.bundle.channels import load_channels
from interventions.circuits.ablation import Ablation
from interventions.circuits.circuit import FOLDER, Circuit, make_circuit, read_kept_nodes, save_circuit
from interventions.circuits.controls import format_validation, validate
from interventions.circuits.gates import PruneConfig
from interventions.circuits.interchange import channel_nodes
from interventions.circuits.node_model import Kept, NodeModel, as_nodes, count_edges
from interventions.circuits.pruning import Pruned, prune, reference_ablation, splits
from interventions.circuits.settings_search import RANGES, search_config
from interventions.cli.options import report_errors
from interventions.tasks.base import TaskBatch
from interventions.tasks.catalogue import get_task
from sparse_model.data.prepare import prepare_corpus


@dataclass(frozen=True, kw_only=True)
class Options:
    """Find the circuit of a task in a run's sparse (or dense) model and write it to RUN/circuits."""

    run: str = "runs/demo"
    """Run folder."""
    task: str = "single_double_quote"
    """Task whose circuit is wanted."""
    model: Literal["sparse", "dense"] = "sparse"
    """Which of the run's models to prune; the dense one is the baseline."""
    controls: bool = False
    """Also run the controls: sufficiency, necessity, minimality, interchange, and the same pruning five times more."""
    draws: int = 20
    """Random sets of nodes that necessity and interchange are compared with."""
    evaluation_pairs: int = 128
    """Pairs of the evaluation templates for the controls."""
    search: int = 0
    """Trials of a search over the settings for the fewest edges (needs optuna); resumes, and Ctrl-C ends it early."""
    start_from: str | None = None
    """Warm start: .json file of a circuit whose nodes begin kept, all others deleted (of a model of the same shape)."""
    graphml: str | None = None
    """Also write the circuit as GraphML to this file."""
    config: Annotated[PruneConfig, tyro.conf.arg(name="")] = field(default_factory=PruneConfig)


def main(options: Options) -> None:
    start, run = time.perf_counter(), open_run(options.run)
    model = as_nodes(run.sparse if options.model == "sparse" else run.dense)
    task = get_task(options.task, run.tokenizer, max_tokens=run.config.sparse.n_ctx)
    start_nodes = read_kept_nodes(options.start_from, model.shape) if options.start_from else None
    blocks = prepare_corpus(run.config, run.tokenizer).val
    pairs = splits(task, options.config)
    ablation = reference_ablation(model, blocks, options.config)
    config = searched(options, run, model, pairs, ablation) if options.search else options.config
    pruned = prune(model, *pairs, ablation, config, start=start_nodes, progress=True)
    circuit = make_circuit(
        model,
        pruned.kept,
        tied_qk=config.tied_qk,
        task=task.name,
        fingerprint=fingerprint(run),
        loss=pruned.loss,
        unpruned_loss=pruned.unpruned_loss,
        calibration=pruned.calibration,
        ablation=ablation,
        config=dataclasses.asdict(config),
    )
    path = save_circuit(run.folder, circuit)
    describe(circuit, pruned, config)
    print(f"{time.perf_counter() - start:.0f} s; saved in {path}")
    if options.graphml:
        circuit.save_graphml(options.graphml)
    if not options.controls:
        print("this claim is UNCONTROLLED: pruning also finds small circuits where there is nothing; add --controls")
        return
    evaluation = task.sample(options.evaluation_pairs, split="evaluation", seed=config.seed)
    named = named_nodes(run, task.name) if options.model == "sparse" else {}
    result = validate(
        model, circuit, *pairs, evaluation, blocks, config, channels=named, draws=options.draws, progress=True
    )
    save_circuit(run.folder, dataclasses.replace(circuit, controls=result.to_dict()))
    print(f"{format_validation(result)}\n{time.perf_counter() - start:.0f} s with controls, kept in {path}")


def searched(
    options: Options, run: Run, model: NodeModel, pairs: tuple[TaskBatch, TaskBatch], ablation: Ablation
) -> PruneConfig:
    """The settings with the fewest edges."""

    def edges(config: PruneConfig) -> int:
        return count_edges(model, prune(model, *pairs, ablation, config).kept)

    database, key = run.folder / FOLDER / "search.db", f"{options.task} {options.model} {fingerprint(run)}"
    config, fewest, trials = search_config(edges, options.config, options.search, database, key, progress=True)
    print(f"fewest edges in {trials} trials: {fewest}, with", {name: f"{getattr(config, name):.3g}" for name in RANGES})
    return config


def named_nodes(run: Run, task: str) -> dict[str, Kept]:
    """The nodes of the run's channels for a task, by name; what the unembedding reads is no node."""
    return {
        name: channel_nodes(channel, run.sparse.cfg)
        for name, channel in load_channels(run.folder).items()
        if channel.selection.get("task") == task and channel.site < 2 * run.sparse.n_layers
    }


def describe(circuit: Circuit, pruned: Pruned, config: PruneConfig) -> None:
    """Print where the circuit's nodes are, its losses, and how the gates ended."""
    places = Counter(name.split(".head")[0] if ".head" in name else name.rpartition(".")[0] for name in circuit.names)
    print(f"{circuit.task} in the {circuit.model} model: {circuit.n_nodes} nodes, {circuit.n_edges} edges")
    print("  " + ", ".join(f"{count} {place}" for place, count in places.items()))
    print(
        f"task loss on selection prompts (calibrated): whole model {circuit.unpruned_loss:.4f}, "
        f"circuit {circuit.loss:.4f} (target {config.target_loss:g})"
    )
    gate_loss, gate_nodes = pruned.history[-1]
    print(f"gates at the end of pruning: {gate_nodes} nodes, training loss {gate_loss:.4f} (uncalibrated)")
    if gate_loss > config.target_loss:
        print("they miss the target, so the circuit is larger than need be: lower --k-coef or raise --steps")


if __name__ == "__main__":
    with report_errors():
        main(tyro.cli(Options))

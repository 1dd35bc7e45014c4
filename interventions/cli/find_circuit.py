"""Find the circuit of a task in a run's sparse (or dense) model and write it to RUN/circuits.

Without --controls the claim is uncontrolled, and the output says so.

Examples:
    sparse-bridges find-circuit --run runs/demo
    sparse-bridges find-circuit --run runs/demo --task bracket_counting --controls
    sparse-bridges find-circuit --run runs/demo --seeds 1 --outside random
    sparse-bridges find-circuit --run runs/demo --search 20
"""

import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from interventions.circuits.prune_config import PruneConfig
from interventions.cli.options import PROMPTS_HELP, TASK_LIST, parse, say_next, writing_into
from interventions.tasks.names import PromptKind, check_task_name
from sparse_model.config import require
from sparse_model.io.atomic import check_writable_file
from sparse_model.io.tables import paragraph, table

if TYPE_CHECKING:
    from interventions.circuits.circuit import Circuit
    from interventions.circuits.faithfulness import Faithfulness
    from interventions.circuits.pruning_seeds import SeedSummary


UNCONTROLLED = "this claim is UNCONTROLLED: pruning also finds small circuits where there is nothing; add --controls"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Find the circuit of a task in a run's sparse (or dense) model and write it to RUN/circuits."""

    run: str = "runs/demo"
    """Run folder."""
    device: str = "cpu"
    """Where the models run: cpu, cuda or cuda:N."""
    task: Annotated[str, tyro.conf.arg(help=f"Task whose circuit is wanted, {TASK_LIST}.")] = "single_double_quote"
    prompts: Annotated[PromptKind, tyro.conf.arg(help=PROMPTS_HELP)] = "generated"
    model: Literal["sparse", "dense"] = "sparse"
    """Which of the run's models to prune; the dense one is the baseline."""
    controls: bool = False
    """Also run the controls: sufficiency, necessity, minimality, interchange, and the same pruning five times more."""
    draws: int = 20
    """Random sets of nodes that necessity and interchange are compared with."""
    evaluation_pairs: int = 128
    """Pairs of the evaluation templates on which the circuit is judged and controlled."""
    seeds: int = 3
    """Prunings with seeds that follow each other; the best on further selection prompts is taken."""
    consensus: bool = False
    """Take the nodes that most of the prunings keep in place of the best pruning."""
    search: int = 0
    """Trials of a search over the settings for the fewest edges (needs optuna); resumes, and Ctrl-C ends it early."""
    start_from: str | None = None
    """Warm start: .json file of a circuit whose nodes begin kept, all others deleted (of a model of the same shape)."""
    graphml: str | None = None
    """Also write the circuit as GraphML to this file."""
    config: Annotated[PruneConfig, tyro.conf.arg(name="")] = field(default_factory=PruneConfig)

    def __post_init__(self) -> None:
        for name in ("draws", "evaluation_pairs", "seeds"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        require(self.search >= 0, "search", self.search, "must not be negative")


def command(arguments: list[str]) -> None:
    options = parse(Options, "find-circuit", arguments, __doc__)
    check_task_name(options.task)
    if options.graphml:
        check_writable_file(Path(options.graphml))
    with writing_into(options.run):
        main(options)
    if options.controls:
        say_next("report", "--run", options.run, device=options.device)
    else:
        say_next("find-circuit", *arguments, "--controls")


def main(options: Options) -> None:
    from bridges.run_folder import open_run
    from interventions.circuits.circuit import save_circuit
    from interventions.circuits.circuit_search import circuit_bar, find_circuit, with_controls
    from interventions.circuits.controls import Validation, format_validation
    from sparse_model.io.reading import typed

    start, run = time.perf_counter(), open_run(options.run, options.device)
    with circuit_bar(options.config, options.seeds, controls=options.controls) as bar:
        circuit = find_circuit(
            run,
            options.task,
            options.config,
            prompts=options.prompts,
            model=options.model,
            search=options.search,
            start_from=options.start_from,
            seeds=options.seeds,
            agreed=options.consensus,
            evaluation_pairs=options.evaluation_pairs,
            progress=True,
            bar=bar,
        )
        path = save_circuit(run.folder, circuit)
        with bar.external_write_mode():
            describe(circuit)
            print(f"{time.perf_counter() - start:.0f} s; saved in {path}")
        if options.graphml:
            circuit.save_graphml(options.graphml)
        if options.controls:
            pairs = options.evaluation_pairs
            circuit = with_controls(run, circuit, draws=options.draws, evaluation_pairs=pairs, progress=True, bar=bar)
            save_circuit(run.folder, circuit)
    if circuit.controls is None:
        print(UNCONTROLLED)
        return
    print(format_validation(typed(Validation, circuit.controls, "controls", "run them again")))
    print(f"{time.perf_counter() - start:.0f} s with controls, kept in {path}")


def describe(circuit: "Circuit") -> None:
    """Print where the circuit's nodes are, its losses, and what it does on evaluation prompts."""
    places = Counter(name.split(".head")[0] if ".head" in name else name.rpartition(".")[0] for name in circuit.names)
    print(f"{circuit.task} in the {circuit.model} model: {circuit.n_nodes} nodes, {circuit.n_edges} edges")
    if places:
        print(paragraph(", ".join(f"{count} {place}" for place, count in places.items())))
    if not circuit.n_nodes:
        print(
            "the circuit is empty: what no circuit has as a node (embedding, bigram table, unembedding) does the task"
        )
    print(
        f"task loss on selection prompts (calibrated): whole model {circuit.unpruned_loss:.4f}, "
        f"circuit {circuit.loss:.4f} (target {circuit.config['target_loss']:g})"
    )
    if circuit.faithfulness is not None:
        print(format_faithfulness(circuit, circuit.faithfulness))


def format_faithfulness(circuit: "Circuit", faithfulness: "Faithfulness") -> str:
    """The circuit on evaluation prompts, the prunings beside it, and whether it failed."""
    target = circuit.config["target_loss"]
    floor = f" (counting alone {circuit.ngram_floor:.0%})" if circuit.ngram_floor is not None else ""
    scores = [
        (what, f"{score.loss:.3f}", f"{score.accuracy:.0%}", f"{score.calibrated:.3f}")
        for what, score in faithfulness.rows()
    ]
    lines = [
        f"on evaluation prompts: task loss {faithfulness.loss:.4f} (target {target:g}), pairs right "
        f"{faithfulness.accuracy:.0%}{floor}",
        f"without calibration it carries {faithfulness.log_odds_share:.1%} of the whole model's log-odds; "
        f"the calibration's scale is {circuit.calibration.scale:.3g}",
        "",
        table([("ablated outside the circuit", "loss", "pairs right", "calibrated anew"), *scores]),
        paragraph("losses in nats: near 0 is good, ln 2 = 0.693 is a coin; pairs right: near 100 % is good."),
    ]
    if len(circuit.seeds) > 1:
        heads = ("pruning", "nodes", "edges", "loss", "fresh prompts", "overlap")
        lines += ["", table([heads, *(_seed_row(summary) for summary in circuit.seeds)])]
        lines.append(paragraph("overlap: nodes in common with the one taken, 1 is the same circuit; near 1 is good."))
    if circuit.failed:
        lines += ["", f"FAILED: on evaluation prompts it misses its target of {target:g}; it is saved as failed"]
    else:
        lines += ["", f"good so far: on evaluation prompts it reaches its target of {target:g}"]
    return "\n".join(lines)


def _seed_row(summary: "SeedSummary") -> tuple[str, ...]:
    name = ("consensus" if summary.seed is None else f"seed {summary.seed}") + ", taken" * summary.taken
    losses = f"{summary.loss:.3f}", f"{summary.fresh_loss:.3f}"
    return name, str(summary.nodes), str(summary.edges), *losses, f"{summary.overlap:.2f}"

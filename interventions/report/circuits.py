"""The report's circuits: which there are, what the page says of each, and the results of its controls."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import Int
from torch import Tensor

from bridges.run_folder import Run
from interventions.bundle.channels import Channel
from interventions.circuits.circuit import (
    FOLDER,
    Circuit,
    circuit_paths,
    finding_command,
    load_circuit,
    read_circuit_file,
)
from interventions.circuits.controls import ControlResult, Validation, control_results
from interventions.circuits.node_model import as_nodes
from interventions.report.explorer import MOST_EDGES, explorer_data
from interventions.report.importance import by_importance, effects_of, size_curve
from interventions.report.labels import read_labels
from interventions.report.mechanism import Mechanism, mechanism
from interventions.report.nodes import NodeWords, words
from interventions.tasks.base import TaskBatch
from interventions.tasks.of_run import recorded_task
from sparse_model.io.commands import command_line
from sparse_model.io.reading import typed

DETAILED = 400
"""Nodes of all circuits together that get examples and prompts, the most important of each; it bounds the file."""
_PAIRS = 64


class NodeRow(NamedTuple):
    """A line of the table of nodes."""

    words: NodeWords
    effect: float | None
    incoming: int
    outgoing: int


class CircuitPage(NamedTuple):
    """A circuit as the page shows it."""

    key: str
    circuit: Circuit
    description: str
    """Its task's."""
    command: str
    """What finds it again."""
    controls: list[ControlResult]
    """Empty for an uncontrolled claim."""
    stale: bool
    """Whether there are controls, but written by another version: they count for none."""
    rows: list[NodeRow]
    """Most important first."""
    mechanism: Mechanism
    notes: list[str]
    """What was left out, and why."""
    data: dict[str, Any]
    """For the explorer."""
    tokens: set[int]
    """Token ids in `data`."""


class Loaded(NamedTuple):
    """The circuits of a run."""

    circuits: list[Circuit]
    problems: list[str]
    """Why a file in RUN/circuits is not shown."""


def load_circuits(run: Run) -> Loaded:
    """Every circuit of a run that can be read: the sparse model's first, among them those with controls."""
    circuits, problems = [], []
    for path in sorted((run.folder / FOLDER).glob("*.json")):
        try:
            circuits.append(_load(run, path))
        except (ValueError, OSError) as error:
            problems.append(f"A circuit is left out: {error}.")
    return Loaded(sorted(circuits, key=lambda c: (c.model != "sparse", c.controls is None)), problems)


def _key(circuit: Circuit) -> str:
    """The name of its file without .json."""
    return circuit_paths(Path(), circuit.task, circuit.model)[0].stem


def _load(run: Run, path: Path) -> Circuit:
    again = command_line("find-circuit", "--run", run.folder)
    stored = read_circuit_file(path, f"find it again with {again} and the --task that it is for")
    task, model = stored.task, stored.model
    if circuit_paths(path.parent.parent, task, model)[0] != path:
        raise ValueError(f"{path} says that it is the {model} model's circuit for {task}, which has another file name")
    return load_circuit(run, task, model)


def circuit_pages(
    run: Run, circuits: list[Circuit], channels: dict[str, Channel], held_out: Int[Tensor, "row pos"]
) -> Iterator[CircuitPage]:
    """A page for each circuit; `held_out` is where examples are looked for."""
    for number, circuit in enumerate(circuits, 1):
        yield _page(run, circuit, channels, held_out, DETAILED // len(circuits), number)


def _page(
    run: Run,
    circuit: Circuit,
    channels: dict[str, Channel],
    held_out: Int[Tensor, "row pos"],
    detailed: int,
    number: int,
) -> CircuitPage:
    model = as_nodes(run.sparse if circuit.model == "sparse" else run.dense)
    description, batch, notes = _task(run, circuit)
    effects = effects_of(model, circuit, batch)
    ranked = by_importance(circuit, effects)
    graph = explorer_data(run, model, circuit, channels, ranked, effects, batch, held_out, detailed)
    key = _key(circuit)
    labels = read_labels(run.folder, key, circuit)
    sizes = size_curve(model, circuit, ranked, batch) if batch else []
    judged = circuit_control_results(circuit)
    data = graph.data | {"key": key, "sizes": sizes, "labels": labels.nodes}
    notes += labels.notes
    if not effects:
        notes.append("The effects of its nodes are not known: they are ordered by the sum of their weights.")
    if len(ranked) > detailed:
        notes.append(f"Prompts and examples are kept for the {detailed} most important nodes.")
    if circuit.n_edges > MOST_EDGES:
        notes.append(f"Only the {MOST_EDGES:,} strongest of {circuit.n_edges:,} edges are drawn.")
    return CircuitPage(
        key=key,
        circuit=circuit,
        description=description,
        command=finding_command(run.folder, circuit.task, circuit.model, circuit.prompts),
        controls=judged,
        stale=circuit.controls is not None and not judged,
        rows=[_row(circuit, name, effects) for name in ranked],
        notes=notes,
        mechanism=mechanism(model, circuit, data, ranked, effects, batch, run.tokenizer, judged, number),
        data=data,
        tokens=graph.tokens,
    )


def _task(run: Run, circuit: Circuit) -> tuple[str, TaskBatch | None, list[str]]:
    """The description and evaluation prompts of a circuit's task; or no prompts, and the reason."""
    try:
        task = recorded_task(run, circuit.task, circuit.prompts)
        return task.description, task.sample_up_to(_PAIRS, split="evaluation", seed=run.config.seed), []
    except (LookupError, ValueError, OSError) as error:
        return "", None, [f"There are no prompts of its task, and so no sizes: {error.args[0]}"]


def circuit_control_results(circuit: Circuit) -> list[ControlResult]:
    """The table of controls; none for an uncontrolled claim, as is one whose controls do not read any more."""
    if circuit.controls is None:
        return []
    try:
        return control_results(typed(Validation, circuit.controls, "controls", "run them again"))
    except ValueError:
        return []


def _row(circuit: Circuit, name: str, effects: dict[str, float]) -> NodeRow:
    touching = circuit.edges_at(name)
    incoming = sum(edge.target == name for edge in touching)
    return NodeRow(words(circuit, name), effects.get(name), incoming, len(touching) - incoming)

"""A task's circuit: its nodes and edges, runnable as a model, saved with the run that it belongs to (paper 2.2, E).

RUN/circuits/TASK.json holds names, numbers and provenance, TASK.safetensors the ablated values of all nodes; the dense
model's circuit is TASK-dense. What counts as a node and an edge stands in `graph`; `n_nodes` counts a q and a k
channel of the same index as two nodes, or as the one node attn.qk where pruning tied their gates, and `n_edges` never
counts their meeting in the attention scores.
"""

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import networkx as nx
import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from safetensors.torch import save_file
from torch import Tensor, nn

from bridges.run_folder import Run, fingerprint
from interventions.circuits.ablation import Ablation, Calibration
from interventions.circuits.circuit_file import CircuitFile, KeptNodes
from interventions.circuits.draw import draw_circuit
from interventions.circuits.faithfulness import Faithfulness
from interventions.circuits.node_model import (
    Edge,
    Kept,
    ModelKind,
    NodeModel,
    as_nodes,
    edges_between,
    find_node,
    locations,
    node_name,
)
from interventions.circuits.pruning_seeds import SeedSummary
from interventions.tasks.record import task_option
from sparse_model.config import SparseConfig
from sparse_model.io.atomic import replace_file, write_text
from sparse_model.io.commands import command_line
from sparse_model.io.reading import read_json, read_sealed, sealed, typed
from sparse_model.io.tensors import read_tensors

FOLDER = "circuits"


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Circuit:
    """The nodes that are left of a model for one task, and the weights between them."""

    task: str
    model: ModelKind
    shape: SparseConfig
    """The sizes of the model."""
    fingerprint: str
    """Digest of the weights of the run (bridges.run_folder.fingerprint)."""
    nodes: dict[str, tuple[int, ...]]
    """Sorted channels of every location, counted over all heads; locations without nodes have none."""
    edges: tuple[Edge, ...]
    tied_qk: bool
    loss: float
    """Calibrated task loss on the selection prompts, nats."""
    unpruned_loss: float
    """That of the whole model."""
    calibration: Calibration
    ablation: Ablation
    config: dict[str, Any] = field(default_factory=dict)
    """The pruning configuration, its seed included."""
    prompts: dict[str, Any] = field(default_factory=dict)
    """Where the task's prompts came from (`Task.record`)."""
    controls: dict[str, Any] | None = None
    """Result of interventions.circuits.controls; None: the claim is uncontrolled."""
    faithfulness: Faithfulness | None = None
    """On evaluation prompts; None for a circuit of an earlier version, which did not take it."""
    seeds: tuple[SeedSummary, ...] = ()
    """The prunings that the circuit was taken from, itself among them, and their consensus; none likewise."""
    ngram_floor: float | None = None
    """Pair accuracy of counting alone on the task, where the run has it."""

    @property
    def names(self) -> list[str]:
        """Published name of every node, in the order of computation; a tied pair of q and k once."""
        return list(dict.fromkeys(name for _, _, name in self._named()))

    n_nodes = property(lambda self: len(self.names))
    n_edges = property(lambda self: len(self.edges))

    @property
    def failed(self) -> bool:
        """Whether it misses the target loss that it was cut out for on evaluation prompts."""
        return self.faithfulness is not None and self.faithfulness.loss > self.config["target_loss"]

    @property
    def overlaps(self) -> list[float]:
        """Nodes shared with each other pruning, over the nodes of either."""
        return [summary.overlap for summary in self.seeds if not summary.taken and summary.seed is not None]

    def _named(self) -> Iterator[tuple[str, int, str]]:
        for location in locations(self.shape):
            for channel in self.nodes[location.name]:
                yield location.name, channel, node_name(location, channel, tied_qk=self.tied_qk)

    @property
    def kept(self) -> Kept:
        """The nodes as one mask per location."""
        masks = {location.name: torch.zeros(location.width, dtype=torch.bool) for location in locations(self.shape)}
        for name, channels in self.nodes.items():
            masks[name][list(channels)] = True
        return masks

    def __contains__(self, name: object) -> bool:
        """Whether a node, by OpenAI's name or ours, is in the circuit. A name of no node is a ValueError."""
        return all(channel in self.nodes[place] for place, channel in find_node(self.shape, str(name)))

    def edges_at(self, name: str) -> list[Edge]:
        """The edges into and out of a node, by OpenAI's name or ours.

        Raises ValueError for a name of no node of the model, KeyError for a node outside the circuit.
        """
        if name not in self:
            raise KeyError(f"{name} is not among the {self.n_nodes} nodes of the circuit for {self.task}: see .names")
        wanted = set(find_node(self.shape, name))
        names = {given for place, channel, given in self._named() if (place, channel) in wanted}
        return [edge for edge in self.edges if names & {edge.source, edge.target}]

    @torch.no_grad()
    def run(
        self,
        model: NodeModel | nn.Module,
        tokens: Int[Tensor, "batch pos"],
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Calibrated logits of the model with only the circuit left; `generator` draws what is resampled."""
        edit = self.ablation.edit(dict(self.kept), self.ablation.draw(len(tokens), tokens.shape[1], generator))
        return self.calibration.apply(as_nodes(model).logits(tokens, edit))

    def to_networkx(self, *, links: bool = False) -> nx.MultiDiGraph:
        """The circuit as a graph: nodes with layer, place and channel, edges with weight and matrix.

        `links` adds what is no edge, with weight 1: matrix "residual" from a write to the same channel of every later
        read, and "qk" between a q and a k channel of the same index.
        """
        graph = nx.MultiDiGraph(task=self.task, model=self.model, fingerprint=self.fingerprint)
        by_name = {location.name: location for location in locations(self.shape)}
        for place, channel, name in self._named():
            graph.add_node(name, layer=by_name[place].layer, place=by_name[place].place, channel=channel)
        for edge in self.edges:
            graph.add_edge(edge.source, edge.target, weight=edge.weight, matrix=edge.matrix)
        for source, target, kind in self._links() if links else ():
            graph.add_edge(source, target, weight=1.0, matrix=kind)
        return graph

    def _links(self) -> Iterator[tuple[str, str, str]]:
        named = list(self._named())
        for i, (earlier, channel, name) in enumerate(named):
            for later, same, other in named[i + 1 :]:
                if channel != same or name == other:
                    continue
                if earlier.endswith("_out") and later.endswith("hook_in"):
                    yield name, other, "residual"
                if earlier.endswith("hook_q") and later == earlier.removesuffix("q") + "k":
                    yield name, other, "qk"

    def __repr__(self) -> str:
        return f"<circuit {self}>"

    def __str__(self) -> str:
        controlled = ("" if self.controls is not None else ", UNCONTROLLED") + ", FAILED" * self.failed
        return (
            f"{self.task}, {self.model} model: {self.n_nodes} nodes, {self.n_edges} edges, "
            f"task loss {self.loss:.3f}{controlled}"
        )

    def plot(self) -> Figure:
        """The circuit as `interventions.circuits.draw` draws it; needs no display."""
        effects = (self.controls or {}).get("node_effects", {})
        return draw_circuit(self.to_networkx(links=True), self.shape, str(self), effects)

    def save_graphml(self, path: str | Path, *, links: bool = False) -> None:
        """Write `to_networkx` as GraphML, by way of a temporary name."""
        write_text(Path(path), "\n".join(nx.generate_graphml(self.to_networkx(links=links))) + "\n")


def make_circuit(model: NodeModel | nn.Module, kept: Kept, *, tied_qk: bool, **fields: Any) -> Circuit:
    """A circuit from the kept nodes of a model; `fields` are the rest of `Circuit`'s."""
    nodes = as_nodes(model)
    return Circuit(
        model=nodes.kind,
        shape=nodes.shape,
        nodes={
            location.name: tuple(kept[location.name].nonzero().flatten().tolist())
            for location in locations(nodes.shape)
        },
        edges=tuple(edges_between(nodes, kept, tied_qk=tied_qk)),
        tied_qk=tied_qk,
        **fields,
    )


def circuit_paths(folder: Path, task: str, model: ModelKind = "sparse") -> tuple[Path, Path]:
    """The JSON and the safetensors file of a circuit of the run in `folder`."""
    name = task if model == "sparse" else f"{task}-{model}"
    return folder / FOLDER / f"{name}.json", folder / FOLDER / f"{name}.safetensors"


def save_circuit(folder: Path, circuit: Circuit) -> Path:
    """Write a circuit into the run in `folder`; returns the JSON file's path.

    Both files are whole before the first takes its place: a full disk leaves the earlier circuit. The JSON holds the
    tensors' digest, so that a kill between the two is seen on loading.
    """
    path, tensors = circuit_paths(folder, circuit.task, circuit.model)
    with replace_file(path) as described, replace_file(tensors) as temporary:
        save_file({name: t.cpu().contiguous() for name, t in circuit.ablation.values.items()}, temporary)
        digest = hashlib.sha256(temporary.read_bytes()).hexdigest()
        described.write_text(sealed(_described(circuit) | {"tensors_sha256": digest}), encoding="utf-8")
    return path


def _described(circuit: Circuit) -> dict[str, Any]:
    plain = {n: getattr(circuit, n) for n in ("task", "model", "fingerprint", "tied_qk", "loss", "unpruned_loss")}
    counts = {"n_nodes": circuit.n_nodes, "n_edges": circuit.n_edges, "nodes": circuit.names}
    rest = {
        "edges": [edge._asdict() for edge in circuit.edges],
        "calibration": circuit.calibration._asdict(),
        "ablation": circuit.ablation.kind,
        "config": circuit.config,
        "prompts": circuit.prompts,
        "controls": circuit.controls,
        "failed": circuit.failed,
        "faithfulness": circuit.faithfulness and circuit.faithfulness.to_dict(),
        "seeds": [summary._asdict() for summary in circuit.seeds],
        "ngram_floor": circuit.ngram_floor,
    }
    return plain | counts | rest


def failed_circuits(folder: Path) -> dict[str, str]:
    """Circuits in a run folder that were saved as failed: what is wrong in words, by file name without .json."""
    failed = {}
    for path in sorted((folder / FOLDER).glob("*.json")):
        with contextlib.suppress(ValueError, OSError):  # loading says what is wrong with a damaged file
            stored = read_circuit_file(path, "")
            if stored.failed and stored.faithfulness:
                loss, target = stored.faithfulness.loss, stored.config["target_loss"]
                failed[path.stem] = f"its circuit failed: task loss {loss:.3f} on evaluation prompts, target {target:g}"
    return failed


def finding_command(folder: Path, task: str, model: ModelKind, prompts: Any = None) -> str:
    """What finds a circuit again; `prompts` is its record of them."""
    of = () if model == "sparse" else ("--model", model)
    return command_line("find-circuit", "--run", folder, "--task", task_option(task, prompts), *of)


def load_circuit(run: Run, task: str, model: ModelKind = "sparse") -> Circuit:
    """A circuit of a run.

    Raises FileNotFoundError where there is none; ValueError for a circuit of another run, a damaged or truncated file,
    or an unknown node name, each naming the file.
    """
    path, tensors = circuit_paths(run.folder, task, model)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: find it with {finding_command(run.folder, task, model)}")
    stored = read_circuit_file(path, f"find the circuit again with {finding_command(run.folder, task, model)}")
    again = f"find the circuit again with {finding_command(run.folder, task, model, stored.prompts)}"
    of_this_run = fingerprint(run)
    if stored.fingerprint != of_this_run:
        raise ValueError(
            f"{path} is the circuit of another run ({stored.fingerprint}; {run.folder} is {of_this_run}): {again}"
        )
    if (stored.task, stored.model) != (task, model):
        raise ValueError(f"{path} says that it is the {stored.model} model's circuit for {stored.task}: {again}")
    nodes = as_nodes(run.sparse if model == "sparse" else run.dense)
    values = _read_values(tensors, stored, nodes.shape, again)
    try:
        return _circuit(stored, nodes.shape, values)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): {again}") from error


def read_circuit_file(path: Path, remedy: str) -> CircuitFile:
    """The JSON file of a circuit. Raises FileNotFoundError, and ValueError that names file, key and value."""
    return typed(CircuitFile, read_sealed(path, remedy), path, remedy)


def read_kept_nodes(path: str | Path, shape: SparseConfig) -> Kept:
    """The nodes of a circuit file as masks for a model of a shape, of whatever run and task the circuit is.

    Raises FileNotFoundError without the file; ValueError where it is damaged or has a node that the model has not.
    """
    remedy = "name the .json file of a circuit"
    names = typed(KeptNodes, read_json(Path(path), remedy), path, remedy)["nodes"]
    try:
        masks = {location.name: torch.zeros(location.width, dtype=torch.bool) for location in locations(shape)}
        for name in names:
            for place, channel in find_node(shape, name):
                masks[place][channel] = True
    except ValueError as error:
        raise ValueError(f"{path} is no circuit for this model: {error}") from error
    return masks


def _read_values(path: Path, stored: CircuitFile, shape: SparseConfig, again: str) -> dict[str, Tensor]:
    values = read_tensors(path)
    if hashlib.sha256(path.read_bytes()).hexdigest() != stored.tensors_sha256:
        raise ValueError(f"{path} does not belong to the .json beside it (other digest): {again}")
    wanted = {location.name: location.width for location in locations(shape)}
    fits = all(t.ndim == 2 and len(t) and t.dtype == torch.float32 for t in values.values())
    if not fits or {name: t.shape[-1] for name, t in values.items()} != wanted:
        raise ValueError(f"{path} does not have the model's node locations: {again}")
    return values


def _circuit(stored: CircuitFile, shape: SparseConfig, values: dict[str, Tensor]) -> Circuit:
    nodes: dict[str, set[int]] = {location.name: set() for location in locations(shape)}
    for name in stored.nodes:
        for place, channel in find_node(shape, name):
            nodes[place].add(channel)
    for token in stored.calibration.shift:
        if not 0 <= token < shape.d_vocab:
            raise ValueError(f"calibration.shift has the token {token}, the vocabulary {shape.d_vocab}")
    return Circuit(
        **stored.arguments(),
        shape=shape,
        nodes={place: tuple(sorted(channels)) for place, channels in nodes.items()},
        ablation=Ablation(stored.ablation, values),
    )

"""What RUN/circuits/TASK.json holds, as a type."""

from dataclasses import dataclass, field
from typing import Any

from typing_extensions import TypedDict

from interventions.circuits.ablation import Calibration
from interventions.circuits.faithfulness import Faithfulness
from interventions.circuits.node_model import Edge, ModelKind
from interventions.circuits.prune_config import AblationKind
from interventions.circuits.pruning_seeds import SeedSummary
from interventions.tasks.record import PromptRecord
from sparse_model.io.reading import NOTHING_ELSE


class _Settings(TypedDict, total=False):
    """Of a pruning; those of an earlier version may have others."""

    __pydantic_config__ = {"extra": "allow"}  # type: ignore[misc]  # noqa: RUF012

    target_loss: int | float
    seed: int


class _Controls(TypedDict, total=False):
    """Controls of this version or another: `Validation` says whether they read."""

    __pydantic_config__ = {"extra": "allow"}  # type: ignore[misc]  # noqa: RUF012

    node_effects: dict[str, float]


class KeptNodes(TypedDict):
    """All that another pruning takes from a circuit's file."""

    __pydantic_config__ = {"extra": "allow"}  # type: ignore[misc]  # noqa: RUF012

    nodes: list[str]


@dataclass(frozen=True, kw_only=True)
class CircuitFile:
    """The fields of `Circuit` that are no tensors, and the digest of the file of those that are."""

    __pydantic_config__ = NOTHING_ELSE

    task: str
    model: ModelKind
    fingerprint: str
    tied_qk: bool
    loss: float
    unpruned_loss: float
    n_nodes: int
    n_edges: int
    nodes: tuple[str, ...]
    edges: tuple[Edge, ...]
    calibration: Calibration
    ablation: AblationKind
    config: _Settings
    prompts: PromptRecord = field(default_factory=PromptRecord)
    controls: _Controls | None = None
    failed: bool = False
    faithfulness: Faithfulness | None = None
    seeds: tuple[SeedSummary, ...] = ()
    ngram_floor: float | None = None
    tensors_sha256: str

    def __post_init__(self) -> None:
        counted = {"n_edges": (self.n_edges, len(self.edges)), "n_nodes": (self.n_nodes, len(set(self.nodes)))}
        for name, (said, found) in counted.items():
            if said != found:
                raise ValueError(f"{name}={said}, but there are {found}")
        missing = {end for edge in self.edges for end in (edge.source, edge.target)} - set(self.nodes)
        if missing:
            raise ValueError(f"an edge ends at {min(missing)!r}, which is none of the nodes")
        if self.faithfulness is not None and "target_loss" not in self.config:
            raise ValueError("key config.target_loss is missing")

    def arguments(self) -> dict[str, Any]:
        """Those of `Circuit` that stand here as they are."""
        left_out = ("n_nodes", "n_edges", "nodes", "ablation", "failed", "tensors_sha256")
        return {name: value for name, value in vars(self).items() if name not in left_out}

"""What a reader writes at a circuit's nodes in the report: names, pins and groups, kept in RUN/labels/CIRCUIT.json.

The page keeps them in the browser and gives them as a file; the next report shows what lies in the run.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from interventions.circuits.circuit import Circuit
from sparse_model.io.reading import NOTHING_ELSE, read_typed

FOLDER = "labels"
LONGEST = 80
"""Characters of a label and of a group's name."""
_MOST_NODES = 4000
_REMEDY = "take the file away, or download the labels again from the report"
_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class NodeLabel:
    """What a reader wrote at one node. Untrusted text."""

    __pydantic_config__ = NOTHING_ELSE

    label: str = ""
    group: str = ""
    """Nodes with the same one are drawn as one."""
    pinned: bool = False

    def __post_init__(self) -> None:
        for name, text in (("label", self.label), ("group", self.group)):
            if len(text) > LONGEST:
                raise ValueError(f"{name} has {len(text)} characters, at most {LONGEST} are shown")


@dataclass(frozen=True, kw_only=True)
class LabelFile:
    """What RUN/labels/CIRCUIT.json holds."""

    __pydantic_config__ = NOTHING_ELSE

    circuit: str
    """Its file's name without .json."""
    fingerprint: str
    """The run's: a node's name means something in one model alone."""
    nodes: dict[str, NodeLabel]
    """By published name."""

    def __post_init__(self) -> None:
        if len(self.nodes) > _MOST_NODES:
            raise ValueError(f"it has {len(self.nodes)} nodes, at most {_MOST_NODES} are read")


class Labels(NamedTuple):
    """A circuit's labels as the page takes them."""

    nodes: dict[str, dict[str, Any]]
    """Also those of nodes that the circuit has not: saving in the page loses none."""
    notes: list[str]
    """What does not fit, in sentences."""


def label_path(folder: Path, key: str) -> Path:
    """Where the labels of the run's circuit of this name are."""
    return folder / FOLDER / f"{key}.json"


def read_labels(folder: Path, key: str, circuit: Circuit) -> Labels:
    """The labels of a run's circuit; none where there is no file, and none, with the reason, where it does not fit."""
    path = label_path(folder, key)
    if not path.exists():
        return Labels({}, [])
    try:
        found = read_typed(LabelFile, path, _REMEDY)
        if (found.circuit, found.fingerprint) != (key, circuit.fingerprint):
            raise ValueError(
                f"{path} labels {found.circuit[:LONGEST]} of the run {found.fingerprint[:LONGEST]}, not {key} of "
                f"{circuit.fingerprint}: {_REMEDY}"
            )
    except (ValueError, OSError) as error:
        return Labels({}, [f"Labels are left out: {error}."])
    nodes = {name: {part: x for part, x in asdict(node).items() if x} for name, node in found.nodes.items()}
    return Labels(nodes, _unknown(path, set(nodes) - set(circuit.names)))


def _unknown(path: Path, names: set[str]) -> list[str]:
    if not names:
        return []
    shown = ", ".join(name[:LONGEST] for name in sorted(names)[:_SHOWN])
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return [f"{path} labels nodes that this circuit does not have, which are not shown: {shown}{more}."]


def orphan_labels(folder: Path, keys: set[str]) -> list[str]:
    """A sentence on each file of labels whose circuit is not shown."""
    files = (path for path in sorted((folder / FOLDER).glob("*.json")) if path.stem not in keys)
    return [
        f"{path} labels a circuit that the report does not show: find it again, or take the file away."
        for path in files
    ]

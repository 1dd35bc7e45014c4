"""A bundle's card: what it holds and how good it is, each figure with its control, and what failed by that name."""

from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import ModelCardData
from jinja2 import Environment, StrictUndefined

from bridges.bundle_format import DenseReference
from bridges.run_folder import Run
from interventions.bundle.channels import load_channels
from interventions.circuits.circuit import Circuit
from interventions.report import overview
from interventions.report.circuits import circuit_control_results, load_circuits
from interventions.report.page import read_results
from interventions.report.steering import steering_pages
from interventions.steering.result import Curve, Steering, place_of, quiet_strength, set_name

_TEMPLATE = Path(__file__).with_name("bundle_card.md.jinja").read_text(encoding="utf-8")


class SteeredRow(NamedTuple):
    """A line of a task's table: P(counterfactual answer) of one edit, and what its controls reach."""

    edit: str
    strength: float
    unsteered: float
    steered: float
    random: float
    """95th percentile of random directions as long."""
    shuffled: float | None
    """Of shuffled decoders; None for edits of another length than theirs."""
    untrained: float | None


class CircuitRow(NamedTuple):
    """A line of the table of circuits."""

    circuit: Circuit
    verdict: str


def bundle_card(run: Run, name: str, reference: DenseReference | None) -> str:
    """The README.md of a run's bundle, which is loaded by `name`.

    Raises ValueError for figures, channels or circuits that do not read, each naming the file.
    """
    metrics, channels, loaded = read_results(run.folder), load_channels(run.folder), load_circuits(run)
    if loaded.problems:
        raise ValueError(f"not shared: {loaded.problems[0].removesuffix('.')}; or remove the file")
    steering = [page.result for page in steering_pages(run.folder, metrics)]
    data = ModelCardData(
        library_name="sparse-bridges",
        base_model=reference.name if reference else None,
        tags=["mechanistic-interpretability", "weight-sparse", "steering"],
    )
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"cell": _cell, "p": _p}
    return environment.from_string(_TEMPLATE).render(
        data=data.to_yaml(),
        name=name,
        run=run,
        reference=reference,
        figures=overview.cards(metrics),
        warnings=overview.warnings(run, metrics, channels, steering, []),
        sites=metrics.get("sites", []),
        channels=list(channels.values()),
        steering=[(result, steered_rows(result)) for result in steering],
        circuits=[CircuitRow(circuit, circuit_verdict(circuit)) for circuit in loaded.circuits],
    )


def steered_rows(result: Steering) -> list[SteeredRow]:
    """Each set of channels and the difference of means, at the strength that is quiet on the evaluation prompts."""
    rows = []
    for name, curve in [*result.channels.items(), ("difference_of_means", result.difference_of_means)]:
        strength, drawn = quiet_strength(result, name), name == result.reference

        def at(values: Curve, strength: float = strength) -> float:
            place = place_of(result, strength)
            assert place is not None  # quiet strengths are measured ones
            return values[place]

        rows.append(
            SteeredRow(
                set_name(name),
                strength,
                at(curve, 0.0),
                at(curve),
                at(result.random_own_p95[name]),
                at(result.shuffled_p95) if drawn else None,
                at(result.untrained_p95) if drawn else None,
            )
        )
    return rows


def circuit_verdict(circuit: Circuit) -> str:
    """What became of a circuit's claim, in words."""
    judged = circuit_control_results(circuit)
    broken = [control.control for control in judged if not control.survived]
    said = []
    if circuit.failed:
        said.append("FAILED: misses its target loss on evaluation prompts")
    if not judged:
        said.append("UNCONTROLLED")
    elif broken:
        said.append(f"fails {len(broken)} of {len(judged)} controls: {', '.join(broken)}")
    else:
        said.append(f"survives its {len(judged)} controls")
    return "; ".join(said)


def _cell(text: Any) -> str:
    """Text that ends neither a cell nor a line of a table, and begins no markup."""
    plain = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;")
    return plain.replace("|", "\\|").replace("`", "'")


def _p(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"

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
from interventions.report.metrics import checked_metrics
from interventions.report.steering import steering_pages
from interventions.steering.result import FROM_SPARSE, Curve, Steering, chosen_strength, place_of, set_name

_TEMPLATE = Path(__file__).with_name("bundle_card.md.jinja").read_text(encoding="utf-8")


class SteeredRow(NamedTuple):
    """A line of a task's table: P(counterfactual answer) of one edit, and what its controls reach."""

    edit: str
    strength: float
    unsteered: float | None
    """None stands for what was not measured."""
    steered: float | None
    random: float | None
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
    metrics = checked_metrics(run.folder, run.bridges.n_sites)
    channels, loaded = load_channels(run.folder), load_circuits(run)
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
    """Each set of channels and the difference of means, at the strength chosen for it on selection prompts."""
    edits = [(set_name(name), name, curve) for name, curve in result.channels.items()]
    edits += [(f"{set_name(n)}{FROM_SPARSE}", f"by_patching {n}", curve) for n, curve in result.by_patching.items()]
    edits.append(("difference of means", "difference_of_means", result.difference_of_means))
    rows = []
    for title, name, curve in edits:
        strength = chosen_strength(result, name)
        drawn = (result.shuffled_p95, result.untrained_p95) if name == result.reference else (None, None)
        controls = [_value(result, control, strength) for control in (result.random_own_p95.get(name), *drawn)]
        rows.append(SteeredRow(title, strength, _value(result, curve, 0.0), _value(result, curve, strength), *controls))
    return rows


def _value(result: Steering, curve: Curve | None, strength: float) -> float | None:
    place = place_of(result, strength)
    return None if place is None or curve is None else curve[place]


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

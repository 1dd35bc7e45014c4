"""Controls of a circuit: what would also be seen if the claim were false (paper 2.2, A.5; criticism: method.md 4).

1. Sufficiency: the task loss of the circuit alone, on evaluation templates that neither pruning nor selection saw.
2. Necessity: the loss of the model without the circuit's nodes, against as many other nodes removed at the same
   locations, drawn among those whose value varies on the prompts (dead ones would be no control). As it is: does the
   model still answer? Calibrated anew: could the answer still be read off its logits?
3. Minimality: how much the loss rises when each node is deleted from the circuit as well.
4. Interchange: how much of the answer's log-odds goes with the circuit's nodes, or a named channel, when they take
   their values from the other member of the pair, against as many other nodes (see `interchange`).
5. Ablation: the same circuit with its deleted nodes at zero instead of at their means, and the same pruning so.
6. Frozen norms: the same circuit where norms divide by what they divide by in the whole model (see `FrozenNorms`).
7. Nonsense: the same pruning where a coin decides, for each pair, which member has which answer (nothing to learn),
   and where an arbitrary class of one of the pair's words decides it (a rule that holds in every split).
8. Redrawn: the same pruning of a model with random weights at the same nonzero positions, each matrix at its own scale,
   with live norms and with frozen ones.

1 uses the circuit's own calibration, 4 none; every loss from 3 on is calibrated anew, so that only lost information
counts: ln 2 = 0.693 means none is left. The limits that `control_results` puts on the figures are ours.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from jaxtyping import Int
from torch import Tensor, nn

from interventions.circuits.ablation import Ablation
from interventions.circuits.circuit import Circuit
from interventions.circuits.interchange import Interchange, interchange
from interventions.circuits.measures import (
    Necessity,
    Repruned,
    Sufficiency,
    necessity,
    node_effects,
    reprune,
    sufficiency,
)
from interventions.circuits.node_model import Kept, NodeModel, as_nodes, device_of
from interventions.circuits.prune_config import AblationKind, PruneConfig
from interventions.circuits.pruning import reference_ablation, score
from interventions.circuits.pruning_seeds import pruning_steps
from interventions.circuits.rivals import FrozenNorms, by_word, redrawn, scrambled
from interventions.tasks.base import TaskBatch
from sparse_model.io.progress import Bar, progress_bar
from sparse_model.io.tables import paragraph, table

IDLE = 0.01
"""A node whose deletion raises the loss by less than this, in nats, does nothing."""


def is_idle(effect: float) -> bool:
    """Whether a node with this effect, in nats, does nothing."""
    return effect < IDLE


class Validation(NamedTuple):
    """The controls of one circuit on evaluation prompts; losses in nats."""

    target_loss: float
    n_nodes: int
    n_edges: int
    sufficiency: Sufficiency
    necessity: Necessity
    node_effects: dict[str, float]
    """Rise of the circuit's loss when one node more is deleted."""
    interchange: Interchange
    """The circuit's nodes exchanged between the members of each pair."""
    channels: dict[str, Interchange]
    """The same of the named channels of this task, by name."""
    other_ablation: AblationKind
    """zero; mean where the circuit was pruned with zero."""
    other_loss: float
    """Loss of the same circuit under that ablation."""
    other: Repruned
    """The same pruning under it."""
    frozen_loss: float
    """Loss of the same circuit with frozen norms."""
    nonsense: Repruned
    """Answers exchanged by a coin."""
    nonsense_rule: Repruned
    """Answers exchanged by the class of a word."""
    redrawn: Repruned
    redrawn_frozen: Repruned
    """Redrawn weights, pruned with frozen norms."""

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return self._asdict() | {
            "channels": {name: exchanged._asdict() for name, exchanged in self.channels.items()},
            **{name: getattr(self, name)._asdict() for name in _parts()},
        }


def _parts() -> dict[str, Any]:
    kinds = (Sufficiency, Necessity, Interchange, Repruned)
    return {name: kind for name, kind in Validation.__annotations__.items() if kind in kinds}


def validate(
    model: NodeModel | nn.Module,
    circuit: Circuit,
    train: TaskBatch,
    selection: TaskBatch,
    evaluation: TaskBatch,
    blocks: Int[Tensor, "block pos"],
    config: PruneConfig,
    *,
    channels: Mapping[str, Kept] | None = None,
    draws: int = 20,
    progress: bool = False,
    bar: Bar | None = None,
) -> Validation:
    """All controls of a circuit of `model` that was pruned with these pairs, held-out blocks and config.

    `channels` are the nodes of named channels of the task. Prunes five times more. `bar` is a progress bar of more than
    this, which is moved by `control_steps`. Raises ValueError for fewer than one draw.
    """
    if draws < 1:
        raise ValueError(f"draws={draws}: necessity needs at least one random removal to compare with")
    own_bar = progress_bar(
        total=control_steps(config), unit="step", leave=False, disable=bar is not None or not progress
    )
    with own_bar:
        shown = own_bar if bar is None else bar
        return _validate(
            as_nodes(model), circuit, train, selection, evaluation, blocks, config, channels or {}, draws, shown
        )


def control_steps(config: PruneConfig) -> int:
    """The controls in steps of a progress bar: five prunings, and what they measure of the circuit as one more."""
    return 6 * pruning_steps(config)


def _validate(
    nodes: NodeModel,
    circuit: Circuit,
    train: TaskBatch,
    selection: TaskBatch,
    evaluation: TaskBatch,
    blocks: Int[Tensor, "block pos"],
    config: PruneConfig,
    channels: Mapping[str, Kept],
    draws: int,
    bar: Bar,
) -> Validation:
    kept = {name: mask.to(device_of(nodes)) for name, mask in circuit.kept.items()}
    ablation, seed = circuit.ablation, config.seed
    changed = replace(config, ablation="zero" if ablation.kind != "zero" else "mean")
    other = reference_ablation(nodes, blocks, changed)
    fresh = redrawn(nodes, seed=seed)
    fresh_values = reference_ablation(fresh, blocks, config)

    def again(
        name: str, model: NodeModel, train: TaskBatch, selection: TaskBatch, values: Ablation, config: PruneConfig
    ) -> Repruned:
        bar.set_description(f"control {name}")
        repruned = reprune(model, train, selection, values, config, circuit.n_nodes, bar=bar)
        bar.update(pruning_steps(config) - config.steps)
        return repruned

    coin = scrambled(train, seed=seed), scrambled(selection, seed=seed + 1)
    rule = by_word(train, selection, seed=seed)
    exchange = partial(interchange, nodes, batch=evaluation, draws=draws, seed=seed)
    bar.set_description("controls of the circuit")
    removed = necessity(nodes, kept, ablation, evaluation, config, draws)
    effects = node_effects(nodes, circuit, kept, evaluation, config)
    exchanged = exchange(kept)
    bar.update(pruning_steps(config))
    return Validation(
        target_loss=config.target_loss,
        n_nodes=circuit.n_nodes,
        n_edges=circuit.n_edges,
        sufficiency=sufficiency(nodes, circuit, kept, evaluation, config),
        necessity=removed,
        node_effects=effects,
        interchange=exchanged,
        channels={name: exchange(chosen) for name, chosen in channels.items()},
        other_ablation=changed.ablation,
        other_loss=score(nodes, kept, other, evaluation, config).loss,
        other=again(f"{changed.ablation} ablation", nodes, train, selection, other, changed),
        frozen_loss=score(FrozenNorms(nodes), kept, ablation, evaluation, config).loss,
        nonsense=again("nonsense", nodes, *coin, ablation, config),
        nonsense_rule=again("nonsense rule", nodes, *rule, ablation, config),
        redrawn=again("redrawn", fresh, train, selection, fresh_values, config),
        redrawn_frozen=again("redrawn, frozen norms", FrozenNorms(fresh), train, selection, fresh_values, config),
    )


class ControlResult(NamedTuple):
    """One line of the table."""

    control: str
    survived: bool
    measured: str
    limit: str
    """What it had to be."""


def control_results(v: Validation) -> list[ControlResult]:
    """Which controls the claim survives, with the figure and the limit of each."""
    idle = [name for name, effect in v.node_effects.items() if is_idle(effect)]
    enough, alone, removed = 2 * v.target_loss, v.sufficiency, v.necessity
    reprunings = {
        "nonsense: a coin": v.nonsense,
        "nonsense: a rule": v.nonsense_rule,
        "redrawn weights": v.redrawn,
        "redrawn, frozen norms": v.redrawn_frozen,
    }
    return [
        ControlResult(
            "sufficiency",
            alone.loss <= enough,
            f"circuit alone {alone.loss:.3f}, whole model {alone.whole_loss:.3f}; pairs right {alone.accuracy:.0%}",
            f"at most {enough:.3g}",
        ),
        _removed("necessity", removed.loss, removed.random, removed.limit),
        _removed("necessity, calibrated", removed.calibrated, removed.calibrated_random, removed.calibrated_limit),
        ControlResult(
            "minimality", not idle, f"{len(idle)} of {v.n_nodes} nodes change the loss by less than {IDLE}", "none"
        ),
        _moved("interchange", v.interchange),
        *(_moved(f"interchange of {name}", exchanged) for name, exchanged in v.channels.items()),
        ControlResult(
            f"{v.other_ablation} ablation",
            v.other_loss <= enough,
            f"same circuit {v.other_loss:.3f}; pruned so: {_size(v.other, v.n_nodes)}",
            f"same circuit at most {enough:.3g}",
        ),
        ControlResult(
            "frozen norms", v.frozen_loss <= enough, f"same circuit {v.frozen_loss:.3f}", f"at most {enough:.3g}"
        ),
        *(
            ControlResult(
                name,
                again.k is None or again.k >= 2 * v.n_nodes,
                _size(again, v.n_nodes),
                "not reached, or twice the nodes",
            )
            for name, again in reprunings.items()
        ),
    ]


def _removed(control: str, loss: float, random: list[float], limit: float) -> ControlResult:
    measured = f"{loss:.3f} without it; without as many others at most {max(random):.3f} in {len(random)} draws"
    return ControlResult(control, loss > limit, measured, f"above {limit:.3f}: every draw, and half of ln 2")


def _moved(control: str, swapped: Interchange) -> ControlResult:
    worst = max(swapped.random)
    return ControlResult(
        control,
        swapped.share > max(worst, 0.5),
        f"{swapped.share:.0%} of the log-odds move with {swapped.nodes} nodes; with as many others at most {worst:.0%} "
        f"in {len(swapped.random)} draws",
        f"above {max(worst, 0.5):.0%}: every draw, and half",
    )


def _size(again: Repruned, k: int) -> str:
    reached = "target not reached" if again.k is None else f"{again.k} nodes, {again.edges} edges"
    return f"{reached}; {again.loss_at_k:.3f} with the best {k} nodes, {again.whole_loss:.3f} with all"


def format_validation(v: Validation) -> str:
    """The results as a table, with the verdict in words."""
    results = control_results(v)
    rows = [["control", "", "found (losses in nats)", "limit"]]
    rows += [[r.control, "survived" if r.survived else "FAILED", r.measured, r.limit] for r in results]
    failed = [r.control for r in results if not r.survived]
    verdict = f"weak: the claim fails {', '.join(failed)}" if failed else "good: the claim survives all of its controls"
    return f"{table(rows, left=4, wrap={2: 38, 3: 22})}\n{paragraph(verdict)}"

"""What a circuit does on evaluation prompts, without the help of its calibration and while others are only partly gone.

Three figures of each: the task loss as the model stands, the share of pairs it gets right so, and the loss calibrated
anew on the same prompts (could the answer still be read off?). The paper's own score, all others ablated and the
circuit's calibration applied, stands beside them.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from interventions.circuits.ablation import Ablation, Calibration, fit_calibration
from interventions.circuits.gates import GateLayout, answer_logits, at_answer, open_gates
from interventions.circuits.node_model import Kept, NodeModel, device_of, locations
from interventions.circuits.partial_ablation import Adversary
from interventions.circuits.prune_config import PruneConfig
from interventions.tasks.base import TaskBatch, log_odds, pair_accuracy, task_loss

RATES = (0.1, 0.25, 0.5)
"""Shares of the outside nodes that are ablated at random."""
DRAWS = 8
"""Random subsets at each of them."""


class AnswerScore(NamedTuple):
    """A model, some of whose nodes may be ablated, on pairs of prompts."""

    loss: float
    """Task loss as it is, nats."""
    accuracy: float
    """Share of pairs both of whose members it gets right, as it is."""
    calibrated: float
    """Task loss calibrated anew on the same prompts."""


class RandomAblation(NamedTuple):
    """A circuit while each other node is ablated with one probability, draw by draw."""

    rate: float
    draws: list[AnswerScore]

    @property
    def mean(self) -> AnswerScore:
        """Of the draws."""
        return AnswerScore(*(sum(column) / len(self.draws) for column in zip(*self.draws, strict=True)))

    @property
    def worst(self) -> AnswerScore:
        """The highest losses and the lowest accuracy of a draw."""
        losses, accuracies, calibrated = zip(*self.draws, strict=True)
        return AnswerScore(max(losses), min(accuracies), max(calibrated))


class Faithfulness(NamedTuple):
    """A circuit on evaluation prompts."""

    log_odds_share: float
    """Mean log-odds of the right answer with all other nodes ablated, over the whole model's; no calibration."""
    loss: float
    """Task loss with all other nodes ablated and the circuit's own calibration, nats: the paper's score."""
    accuracy: float
    """Share of pairs right, likewise."""
    whole: AnswerScore
    """Nothing ablated."""
    alone: AnswerScore
    """All other nodes ablated."""
    random: list[RandomAblation]
    worst: AnswerScore
    """The subset of other nodes that an adversary finds on these very prompts."""
    worst_share: float
    """Share of the other nodes in that subset."""
    attack_passes: int
    """Passes through the model that the adversary took, a backward one counted as two."""

    def rows(self) -> list[tuple[str, AnswerScore]]:
        """What is ablated outside the circuit, in words, and the score so; from nothing to the worst."""
        rows = [("none", self.whole)]
        for drawn in self.random:
            rows.append((f"each with p = {drawn.rate:g}, mean of {len(drawn.draws)} draws", drawn.mean))
            rows.append((f"each with p = {drawn.rate:g}, worst draw", drawn.worst))
        return [*rows, ("all", self.alone), (f"worst subset found ({self.worst_share:.0%} of them)", self.worst)]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        plain = {name: getattr(self, name)._asdict() for name in ("whole", "alone", "worst")}
        drawn = [{"rate": of.rate, "draws": [draw._asdict() for draw in of.draws]} for of in self.random]
        return self._asdict() | plain | {"random": drawn}


@torch.no_grad()
def measure_faithfulness(
    model: NodeModel, kept: Kept, ablation: Ablation, calibration: Calibration, batch: TaskBatch, config: PruneConfig
) -> Faithfulness:
    """All of it on a batch of pairs; `config` gives the seed, the tying of q and k, and the calibration's steps."""
    layout = GateLayout(locations(model.shape), tied_qk=config.tied_qk)
    device = device_of(model)
    inside = layout.join(kept).to(device)
    generator = torch.Generator().manual_seed(config.seed)

    def logits(ablated: Tensor) -> Float[Tensor, "pair 2 1 d_vocab"]:
        gates = layout.split(open_gates(inside, ablated))
        return answer_logits(model, gates, ablation, batch, torch.Generator().manual_seed(config.seed))

    def drawn(rate: float) -> Tensor:
        return (torch.rand(layout.n_gates, generator=generator) < rate).to(device)

    nothing, everything_else = torch.zeros(layout.n_gates, device=device), torch.ones(layout.n_gates, device=device)
    whole, alone = logits(nothing), logits(everything_else)
    scored = at_answer(batch.to(device))
    calibrated = calibration.apply(alone)
    attack = Adversary(model, layout, ablation, batch, config.seed).attack(kept)
    outside = ~inside
    return Faithfulness(
        log_odds_share=float(log_odds(alone, scored).mean() / log_odds(whole, scored).mean()),
        loss=float(task_loss(calibrated, scored)),
        accuracy=float(pair_accuracy(calibrated, scored)),
        whole=_score(whole, batch, config),
        alone=_score(alone, batch, config),
        random=[
            RandomAblation(rate, [_score(logits(drawn(rate)), batch, config) for _ in range(DRAWS)]) for rate in RATES
        ],
        worst=_score(logits(attack.ablated), batch, config),
        worst_share=float((attack.ablated & outside).sum() / outside.sum().clamp(min=1)),
        attack_passes=attack.passes,
    )


def _score(logits: Float[Tensor, "pair 2 1 d_vocab"], batch: TaskBatch, config: PruneConfig) -> AnswerScore:
    scored = at_answer(batch.to(logits.device))
    calibrated = fit_calibration(logits, batch, steps=config.lbfgs_steps).apply(logits)
    return AnswerScore(
        float(task_loss(logits, scored)), float(pair_accuracy(logits, scored)), float(task_loss(calibrated, scored))
    )

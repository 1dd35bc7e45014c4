"""What is put in place of deleted nodes, and how a circuit's logits are calibrated (paper 2.2, A.5)."""

from dataclasses import dataclass
from typing import NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import softplus

from interventions.circuits.node_model import NodeEdit, NodeModel, Values, as_nodes, device_of, locations
from interventions.circuits.prune_config import AblationKind
from interventions.tasks.base import TaskBatch


@dataclass(frozen=True, eq=False)
class Ablation:
    """What deleted nodes are replaced by, for every node of a model, kept ones included."""

    kind: AblationKind
    values: dict[str, Float[Tensor, "row width"]]
    """By location: one row for mean and zero; the values at many reference tokens for resample."""

    def draw(self, batch: int, pos: int, generator: torch.Generator | None = None) -> Int[Tensor, "#batch #pos"]:
        """The row that each token takes: for `resample` a random one per token, the same at all locations."""
        if self.kind != "resample":
            return torch.zeros(1, 1, dtype=torch.long)
        rows = len(next(iter(self.values.values())))
        return torch.randint(rows, (batch, pos), generator=generator)

    def edit(
        self, gates: dict[str, Tensor], rows: Int[Tensor, "#batch #pos"], last: Int[Tensor, " batch"] | None = None
    ) -> NodeEdit:
        """The edit that keeps nodes whose gate is 1 and puts ablated values (of these rows) in place of the others.

        `last`: the position that a location has where it has only one (see `SparseNodes.logits`).
        """

        def edit(name: str, values: Values) -> Values:
            gate = gates[name].to(values)
            instead = self.values[name]
            if len(instead) == 1:
                instead = instead[0]
            elif last is not None and values.shape[1] < rows.shape[1]:
                instead = instead[rows.gather(1, last.to(rows)[:, None]).to(instead.device)]
            else:
                instead = instead[rows.to(instead.device)]
            # In this form a gate of exactly 1 or 0 gives exactly one of the two values.
            return torch.addcmul((1 - gate) * instead.to(values), values, gate)

        return edit


@torch.no_grad()
def measure_ablation(
    model: NodeModel | nn.Module,
    blocks: Int[Tensor, "block pos"],
    kind: AblationKind = "mean",
    *,
    resample_tokens: int = 1024,
    seed: int = 0,
    batch_size: int = 32,
) -> Ablation:
    """Ablated values of every node: mean over held-out blocks of tokens, zero, or its values at some of those tokens.

    Raises ValueError for no blocks or an unknown kind.
    """
    if kind not in get_args(AblationKind):
        raise ValueError(f"ablation={kind!r}: use one of {', '.join(get_args(AblationKind))}")
    if not blocks.numel():
        raise ValueError("no reference tokens to take ablated values from: give blocks of held-out text")
    nodes = as_nodes(model)
    places, device = locations(nodes.shape), device_of(nodes)
    if kind == "zero":
        return Ablation(kind, {location.name: torch.zeros(1, location.width, device=device) for location in places})
    chosen = torch.zeros(blocks.numel(), dtype=torch.bool)
    order = torch.randperm(blocks.numel(), generator=torch.Generator().manual_seed(seed))
    chosen[order[:resample_tokens]] = True
    rows: dict[str, list[Tensor]] = {location.name: [] for location in places}
    sums = {location.name: torch.zeros(location.width, dtype=torch.float64, device=device) for location in places}
    for batch, here in zip(blocks.split(batch_size), chosen.view(blocks.shape).split(batch_size), strict=True):
        picked = here.flatten().to(device)

        def note(name: str, values: Values, picked: Tensor = picked) -> Values:
            if kind == "mean":
                sums[name] += values.double().sum((0, 1))
            else:
                rows[name].append(values.flatten(0, 1)[picked])
            return values

        nodes.visit(batch.long().to(device), note)
    if kind == "mean":
        return Ablation(kind, {name: (total / blocks.numel()).float()[None] for name, total in sums.items()})
    return Ablation(kind, {name: torch.cat(batches).float() for name, batches in rows.items()})


class Calibration(NamedTuple):
    """What is done to a circuit's logits: times `scale`, plus a shift per answer token."""

    scale: float
    shift: dict[int, float]
    """By token id; other tokens are not shifted."""

    def apply(self, logits: Float[Tensor, "*batch d_vocab"]) -> Float[Tensor, "*batch d_vocab"]:
        """The calibrated logits."""
        shift = torch.zeros(logits.shape[-1])
        shift[list(self.shift)] = torch.tensor(list(self.shift.values()))
        return logits * self.scale + shift.to(logits)


def fit_calibration(logits: Float[Tensor, "pair 2 1 d_vocab"], batch: TaskBatch, *, steps: int = 16) -> Calibration:
    """Scale (kept positive) and shift per answer token that minimise the two-way task loss, by L-BFGS (paper A.5).

    Only differences of shifts matter; theirs sum to 0. As each answer is right for one member of a pair and wrong for
    the other, shifts cannot tell members apart: without information in the logits the loss stays ln 2.
    """
    answers = batch.answers.to(logits.device)
    ids, index = torch.unique(answers, return_inverse=True)
    answer_logits = logits[:, :, 0].double().gather(-1, torch.stack([answers, answers.flip(1)], -1))
    margin = (answer_logits[..., 0] - answer_logits[..., 1]).detach()
    log_scale = torch.zeros((), dtype=torch.float64, device=logits.device, requires_grad=True)
    shift = torch.zeros(len(ids), dtype=torch.float64, device=logits.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_scale, shift], max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        moved = margin * log_scale.exp() + shift[index] - shift[index.flip(1)]
        loss = softplus(-moved).mean()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return Calibration(
        float(log_scale.detach().exp()), {int(i): float(s) for i, s in zip(ids, shift.detach(), strict=True)}
    )

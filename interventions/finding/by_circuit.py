"""A named channel from a task's circuit: those of its nodes that the last deciding sublayer reads.

1. Reads: for every sublayer whose read holds nodes of the circuit these are set together to their counterfactual values
   in the whole sparse model, on selection prompts. The last read that gives at least half of what exchanging the whole
   prompt gives, in log P(counterfactual answer), is taken; where none does, the one that gives most.
2. Its nodes are ranked by the same effect of each alone, and the first of them that carry 90 % of the effect of the
   whole read are the channel, at most 4; what they carry is kept with it.
"""

import torch

from bridges.run_folder import Run
from bridges.sites import all_sites
from interventions.bundle.channels import Channel, Rule, residual_reads
from interventions.circuits.circuit import Circuit
from interventions.finding.by_patching import MOST_INDICES, ChannelSearch, named_channel, share_rules
from interventions.finding.patching import flipped, log_p, mean_difference, site_effects
from interventions.finding.read_patch import ReadPatch
from interventions.tasks.base import TaskBatch


def read_channels(circuit: Circuit, d_model: int) -> dict[int, list[int]]:
    """By residual site, the channels of its read that are nodes of the circuit (positions are no channels)."""
    reads = {
        site.index: [c for c in circuit.nodes[site.read_hook] if c < d_model]
        for site in all_sites(circuit.shape.n_layers)[:-1]
    }
    return {site: channels for site, channels in reads.items() if channels}


@torch.no_grad()
def channel_by_circuit(run: Run, name: str, circuit: Circuit, batch: TaskBatch, *, site: int | None = None) -> Channel:
    """The named channel of a circuit of the run's sparse model; `batch` holds selection prompts of its task.

    `site` skips the choice of one. Raises ValueError for a circuit without reads, or a site whose read has none.
    """
    reads = read_channels(circuit, run.sparse.d_model)
    if not reads:
        raise ValueError(f"the circuit for {circuit.task} has no node that a sublayer reads: lower its target loss")
    if site is not None and site not in reads:
        raise ValueError(f"site={site}: the circuit for {circuit.task} reads at sites {', '.join(map(str, reads))}")
    patches = {i: ReadPatch(run, batch, i) for i in (reads if site is None else [site])}
    effects = {i: patch.effect(reads[i]) for i, patch in patches.items()}
    rules: list[Rule] = []
    if site is None:
        least = _deciding_effect(run, batch, next(iter(patches.values())).base)
        chosen = _deciding_site(effects, least)
        words = "effect of patching the circuit's nodes of the read, nats, half of the whole prompt's being asked for"
        rules.append(Rule(quantity=words, bound="at least", threshold=least, reached=effects[chosen]))
    else:
        chosen = site
    search = _ranked(run, batch, chosen, patches[chosen], reads[chosen])
    return named_channel(
        run,
        name,
        circuit.task,
        batch,
        chosen,
        search,
        rules=[*rules, *share_rules(search)],
        site_effects=[e._asdict() for e in site_effects(run.dense, batch)],
        criterion="patching effect of the circuit's nodes at the last read that decides the answer",
        circuit={
            "nodes": circuit.n_nodes,
            "edges": circuit.n_edges,
            "loss": circuit.loss,
            "controlled": circuit.controls is not None,
            "failed": circuit.failed,
            "read_effect_nats": {str(i): round(effect, 4) for i, effect in effects.items()},
        },
    )


def _deciding_effect(run: Run, batch: TaskBatch, base: float) -> float:
    """Half of what exchanging the whole prompt does to log P(counterfactual answer)."""
    _, other, answers, last = flipped(batch)
    return (float(log_p(run.sparse(other), answers, last).mean()) - base) / 2


def _deciding_site(effects: dict[int, float], least: float) -> int:
    """The last site with enough effect; where there is none, the one with most."""
    deciding = [site for site, effect in effects.items() if effect >= least]
    return deciding[-1] if deciding else max(effects, key=lambda site: effects[site])


def _ranked(run: Run, batch: TaskBatch, site: int, patch: ReadPatch, channels: list[int]) -> ChannelSearch:
    single = torch.zeros(run.sparse.d_model)
    for c in channels:
        single[c] = patch.effect([c])
    ranked = sorted(channels, key=lambda c: -float(single[c]))
    sets = {n: ranked[:n] for n in range(1, min(2 * MOST_INDICES, len(ranked)) + 1)}
    share = {n: patch.effect(chosen) / patch.whole for n, chosen in sets.items()}
    nodes = [residual_reads(run.sparse, batch.tokens[:, member], site) for member in (0, 1)]
    return ChannelSearch(sets, share, single, patch.whole, mean_difference(*nodes))

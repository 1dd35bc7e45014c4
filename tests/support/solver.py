"""A model whose circuit is known, and its task."""

import torch
from torch import Tensor

from interventions.circuits.node_model import NodeModel, locations
from interventions.circuits.prune_config import PruneConfig
from interventions.tasks.base import PROMPT_SPLITS, PromptSplit, Task, TaskBatch
from sparse_model.config import SparseConfig
from sparse_model.model.transformer import SparseTransformer

CONFIG = PruneConfig(steps=100, pairs=16, pool=32, lr=1e-2, k_coef=1e-2)


def gates_of(model: NodeModel, value: int | float) -> dict[str, Tensor]:
    return {at.name: torch.full((at.width,), float(value)) for at in locations(model.shape)}


def solver() -> SparseTransformer:
    """A model that tells token 1 (answer 3) from token 2 (answer 4) by one MLP neuron, among many that do not matter.

    The token sets channel 0 to +-1; neuron 5 of layer 0 reads it and writes channel 7, which alone the unembedding
    reads. Everything else is random but writes to channels 8 .. 15 only.
    """
    torch.manual_seed(3)
    cfg = SparseConfig(
        n_layers=2, d_model=16, d_mlp=24, n_heads=2, d_head=4, n_ctx=8, d_vocab=6, bigram="none", topk_locations=()
    )
    model = SparseTransformer(cfg)
    with torch.no_grad():
        model.token_embed.weight[:, :8] = 0
        model.token_embed.weight[1, 0], model.token_embed.weight[2, 0] = 1.0, -1.0
        model.unembedding.weight.zero_()
        model.unembedding.weight[3, 7], model.unembedding.weight[4, 7] = 1.0, -1.0
        for block in model.blocks:
            for out in (block.attn.out, block.mlp.out):
                out.weight[:8] = 0
        fc, out = model.blocks[0].mlp.fc, model.blocks[0].mlp.out
        fc.weight[5], out.weight[:, 5] = 0, 0
        fc.weight[5, 0], out.weight[7, 5], out.bias[7] = 1.0, 1.0, -2.0
    return model


def cancelling() -> SparseTransformer:
    """The solver with two more neurons that read what its own does; together they do nothing, alone much harm."""
    model = solver()
    with torch.no_grad():
        fc, out = model.blocks[0].mlp.fc, model.blocks[0].mlp.out
        for neuron, weight in ((6, -4.0), (7, 4.0)):
            fc.weight[neuron], out.weight[:, neuron], fc.bias[neuron] = 0, 0, 0
            fc.weight[neuron, 0], out.weight[7, neuron] = 1.0, weight
        out.bias[7] = -0.7  # so that it needs no calibration
    return model


def solver_batch(pairs: int, seed: int = 0) -> TaskBatch:
    """Token 1 or 2 as the last of three."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 6, (pairs, 1, 3), generator=generator).repeat(1, 2, 1)
    tokens[:, 0, 2], tokens[:, 1, 2] = 1, 2
    answers = torch.tensor([3, 4]).repeat(pairs, 1)
    return TaskBatch(tokens, answers, torch.full((pairs,), 2), [("1", "2")] * pairs)


class SolverTask(Task):
    """The solver's task as pruning takes one: other prompts by seed and split."""

    name = "solver"

    def __init__(self) -> None:
        """Nothing of a spec or a tokenizer is needed."""

    def sample(self, n_pairs: int, *, split: PromptSplit, seed: int) -> TaskBatch:
        return solver_batch(n_pairs, 3 * seed + PROMPT_SPLITS.index(split))

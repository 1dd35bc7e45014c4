"""A bigram table that begins at what counting gives, so that no step is spent on learning it.

The table is a dense part of the model anyway (paper A.1) and what it converges to alone has a closed form: the
logarithms of the frequencies. The paper does not say where its tables begin.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparse_model.config import TrainConfig
from sparse_model.model.transformer import SparseTransformer

PRIOR = 5.0
"""Tokens' worth of the overall frequencies that are added to what was counted behind each token."""
_BLOCKS_AT_ONCE = 1 << 14


def count_bigrams(sparse: SparseTransformer, config: TrainConfig, blocks: Int[Tensor, "block pos"]) -> None:
    """Set the model's bigram table, where it has one that is learned and the configuration asks for counts."""
    if config.bigram_init == "counts" and config.sparse.bigram == "learned":
        with torch.no_grad():
            sparse.bigram.copy_(bigram_logits(blocks, config.sparse.d_vocab))


def bigram_logits(blocks: Int[Tensor, "block pos"], d_vocab: int) -> Float[Tensor, "d_vocab d_vocab"]:
    """log P(next | current), nats, less its mean over the next token; rows are softmax inputs, so that is free.

    P = (count of the pair + PRIOR * P(next)) / (count of the first + PRIOR), P(next) with one added to every count.
    """
    counts = torch.zeros(d_vocab * d_vocab, dtype=torch.int64)
    for some in blocks.split(_BLOCKS_AT_ONCE):
        pairs = some[:, :-1].long() * d_vocab + some[:, 1:]
        counts += torch.bincount(pairs.flatten(), minlength=d_vocab * d_vocab)
    table = counts.view(d_vocab, d_vocab).float()
    overall = table.sum(0) + 1
    table += PRIOR * overall / overall.sum()
    table = (table / table.sum(1, keepdim=True)).log_()
    return table - table.mean(1, keepdim=True)

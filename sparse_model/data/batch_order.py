"""The order of training batches: a pure function of (seed, step), so that resuming needs only the step."""

from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor


class BatchOrder:
    """Blocks in a fresh random order each epoch, cut into batches; several processes take disjoint slices.

    The global batch of a step is `batch_size * world_size` consecutive entries of the endless sequence of seeded
    permutations; rank r takes the r-th part. A block is never seen twice in one epoch.
    """

    def __init__(self, n_blocks: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        if n_blocks < 1:
            raise ValueError("the corpus holds no full block: give more text or a smaller n_ctx")
        self.n_blocks, self.batch_size, self.seed = n_blocks, batch_size, seed
        self.rank, self.world_size = rank, world_size

    def __call__(self, step: int) -> Int[Tensor, " batch"]:
        """Block indices of this rank's batch at a step."""
        first = (step * self.world_size + self.rank) * self.batch_size
        places = np.arange(first, first + self.batch_size)
        epochs = places // self.n_blocks
        chosen = [
            _permutation(self.seed, int(epoch), self.n_blocks)[places[epochs == epoch] % self.n_blocks]
            for epoch in np.unique(epochs)
        ]
        return torch.from_numpy(np.concatenate(chosen))


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)

"""Order of training batches: complete epochs, disjoint ranks, a pure function of (seed, step)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_model.data.batch_order import BatchOrder

sizes = st.integers(1, 40)


def entries(order: BatchOrder, steps: int) -> list[int]:
    return torch.cat([order(step) for step in range(steps)]).tolist()


@settings(max_examples=100, deadline=None)
@given(n_blocks=sizes, batch_size=sizes, seed=st.integers(0, 5))
def test_every_block_comes_exactly_once_in_every_epoch(n_blocks: int, batch_size: int, seed: int) -> None:
    """Also where an epoch ends inside a batch and where a batch holds several epochs."""
    seen = entries(BatchOrder(n_blocks, batch_size, seed), 3 * n_blocks // batch_size + 1)
    for start in range(0, len(seen) - n_blocks + 1, n_blocks):
        assert sorted(seen[start : start + n_blocks]) == list(range(n_blocks))


@settings(max_examples=100, deadline=None)
@given(n_blocks=sizes, batch_size=st.integers(1, 9), world_size=st.integers(1, 4), step=st.integers(0, 30))
def test_the_ranks_together_are_one_process_with_the_larger_batch(
    n_blocks: int, batch_size: int, world_size: int, step: int
) -> None:
    parts = [BatchOrder(n_blocks, batch_size, 7, rank, world_size)(step).tolist() for rank in range(world_size)]
    assert all(len(part) == batch_size for part in parts)
    together = [block for part in parts for block in part]
    assert together == BatchOrder(n_blocks, batch_size * world_size, 7)(step).tolist()


def test_ranks_are_disjoint_within_an_epoch() -> None:
    seen = [block for rank in range(3) for block in entries(BatchOrder(60, 5, 0, rank, 3), 4)]
    assert sorted(seen) == list(range(60))


def test_the_order_is_a_pure_function_of_seed_and_step() -> None:
    order = BatchOrder(23, 4, 11)
    forward = [order(step).tolist() for step in range(40)]
    backward = [BatchOrder(23, 4, 11)(step).tolist() for step in reversed(range(40))]
    assert forward == backward[::-1]
    assert order(17).tolist() == forward[17]
    assert entries(BatchOrder(23, 4, 12), 40) != entries(order, 40)


def test_epochs_differ() -> None:
    seen = entries(BatchOrder(50, 50, 0), 2)
    assert seen[:50] != seen[50:]


def test_a_returned_batch_may_be_changed() -> None:
    order = BatchOrder(10, 10, 0)
    before = order(0).tolist()
    order(0).zero_()
    assert order(0).tolist() == before


def test_no_block_at_all_is_an_error_with_a_remedy() -> None:
    with pytest.raises(ValueError, match=r"no full block.*n_ctx"):
        BatchOrder(0, 4, 0)

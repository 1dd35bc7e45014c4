"""Exact top-k by magnitude: the same set as sorting, for every dtype, shape, tie and thread count."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from support.matrices import DTYPES, INF, NAN, matrices
from support.reference import top_k_mask

from sparse_model.sparsity.abs_topk import abs_topk
from sparse_model.sparsity.topk import magnitude_bits, select_rows, top_mask_flat
from sparse_model.sparsity.topk_torch import flat_masks, rows_mask


@contextmanager
def torch_threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal including the sign of zeros."""
    return torch.equal(a, b) and torch.equal(a.signbit(), b.signbit())


@settings(max_examples=150, deadline=None)
@given(case=matrices())
def test_the_kept_set_is_that_of_sorting(case: tuple[torch.Tensor, int]) -> None:
    x, k = case
    expected = torch.tensor([top_k_mask(row, k) for row in x.tolist()])
    kept, mask = select_rows(x, k)
    assert torch.equal(mask, expected)
    assert mask.sum(-1).tolist() == [k] * len(x)
    assert same_bits(kept, torch.where(expected, x, torch.zeros_like(x)))
    assert same_bits(abs_topk(x, k), kept)
    assert torch.equal(torch.stack([top_mask_flat(row, k) for row in x]), expected)


@settings(max_examples=100, deadline=None)
@given(case=matrices())
def test_counting_as_on_other_devices_equals_the_cpu_kernel(case: tuple[torch.Tensor, int]) -> None:
    x, k = case
    if k > 0:
        bits, expected = magnitude_bits(x), select_rows(x, k)[1]
        assert torch.equal(rows_mask(bits, k), expected)
        assert torch.equal(flat_masks(bits, k), expected)


@settings(max_examples=30, deadline=None)
@given(case=matrices())
def test_the_input_is_left_alone(case: tuple[torch.Tensor, int]) -> None:
    x, k = case
    before = x.clone()
    abs_topk(x, k)
    top_mask_flat(x[0], k)
    assert same_bits(x, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [-1, 6])
def test_k_out_of_range_is_an_error_with_the_range(dtype: torch.dtype, k: int) -> None:
    x = torch.randn(2, 5).to(dtype)
    for call in (lambda: abs_topk(x, k), lambda: select_rows(x, k), lambda: top_mask_flat(x[0], k)):
        with pytest.raises(ValueError, match=rf"k={k} is outside 0 \.\. 5"):
            call()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [0, 1, 3, 7])
@pytest.mark.parametrize("sign", [1, -1])
def test_nan_is_an_error_that_names_it(dtype: torch.dtype, k: int, sign: int) -> None:
    x = torch.randn(3, 7).to(dtype)
    x[1, 4] = torch.tensor(NAN).copysign(torch.tensor(float(sign)))
    for call in (lambda: abs_topk(x, k), lambda: select_rows(x, k), lambda: top_mask_flat(x[1], k)):
        with pytest.raises(ValueError, match="NaN"):
            call()


@pytest.mark.parametrize("place", [0, 1, 54_321, 199_999])
@pytest.mark.parametrize("k", [1, 10, 100_000])
def test_one_nan_in_a_large_tensor_is_found_wherever_it_lies(place: int, k: int) -> None:
    x = torch.randn(200_000)
    x[place] = NAN
    with pytest.raises(ValueError, match="NaN"):
        top_mask_flat(x, k)


def test_a_tensor_of_only_nan_is_an_error() -> None:
    with pytest.raises(ValueError, match="NaN"):
        top_mask_flat(torch.full((100_000,), NAN), 5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(9,), (2, 9), (2, 3, 9), (2, 1, 3, 9)])
def test_any_leading_shape_acts_row_by_row(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape).to(dtype)
    y = abs_topk(x, 4)
    assert y.shape == x.shape
    assert y.dtype == dtype
    assert torch.equal(y.view(-1, 9), torch.stack([abs_topk(row, 4) for row in x.view(-1, 9)]))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5), (0, 0, 5)])
@pytest.mark.parametrize("k", [0, 2, 5])
def test_an_empty_batch_stays_empty(shape: tuple[int, ...], k: int) -> None:
    x = torch.zeros(shape, requires_grad=True)
    y = abs_topk(x, k)
    y.sum().backward()
    assert y.shape == shape
    assert x.grad is not None


def test_memory_layout_does_not_matter() -> None:
    base = torch.randn(6, 8, 10)
    views = [
        base.transpose(0, 2),
        base[:, ::2, ::3],
        base.flip(-1),
        base[:1, 0, :].expand(4, 10),
        base.permute(1, 2, 0),
    ]
    for view in views:
        assert torch.equal(abs_topk(view, 2), abs_topk(view.clone(memory_format=torch.contiguous_format), 2))
    column = base[:, 0, 0]
    assert torch.equal(top_mask_flat(column, 2), top_mask_flat(column.contiguous(), 2))


@settings(max_examples=100, deadline=None)
@given(case=matrices())
def test_the_gradient_passes_exactly_through_the_survivors(case: tuple[torch.Tensor, int]) -> None:
    """Also through survivors whose value is zero."""
    x, k = case
    x.requires_grad_(True)
    upstream = torch.arange(1, x.numel() + 1).view(x.shape).to(x.dtype)
    abs_topk(x, k).backward(upstream)
    survives = torch.tensor([top_k_mask(row, k) for row in x.tolist()])
    assert torch.equal(x.grad, torch.where(survives, upstream, torch.zeros_like(upstream)))


def test_zero_valued_survivors_carry_gradient() -> None:
    x = torch.tensor([[0.0, 5.0, -0.0, 0.0]], requires_grad=True)
    abs_topk(x, 3).sum().backward()
    assert x.grad.tolist() == [[1.0, 1.0, 1.0, 0.0]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gradient_that_is_not_finite_stays_with_the_survivors(dtype: torch.dtype) -> None:
    x = torch.tensor([[4.0, 1.0, -3.0, 0.5]], dtype=dtype, requires_grad=True)
    upstream = torch.tensor([[INF, INF, 1.0, NAN]], dtype=dtype)
    abs_topk(x, 2).backward(upstream)
    assert x.grad.tolist() == [[INF, 0.0, 1.0, 0.0]]


def test_the_gradients_memory_layout_does_not_matter() -> None:
    x, upstream = torch.randn(5, 3, 8), torch.randn(8, 3, 5)
    survives = abs_topk(x, 3) != 0
    for grad in (upstream.transpose(0, 2), upstream[0, 0, 0].expand(5, 3, 8), upstream.flip(0).permute(2, 1, 0)):
        leaf = x.clone().requires_grad_(True)
        abs_topk(leaf, 3).backward(grad)
        assert torch.equal(leaf.grad, torch.where(survives, grad, torch.zeros_like(grad)))


def sample_trap(n: int, stride: int, offset: int) -> torch.Tensor:
    """Huge values on a regular grid: a strided sample sees only them, or none of them."""
    x = torch.randn(n)
    x[offset::stride] *= 1e6
    return x


def large_tensors(n: int) -> dict[str, torch.Tensor]:
    few = torch.zeros(n)
    few[torch.randperm(n)[:7]] = torch.randn(7)
    stride = max(1, n // 8192)
    return {
        "random": torch.randn(n),
        "ascending": torch.arange(n).float(),
        "descending": -torch.arange(n).flip(0).float(),
        "constant": torch.full((n,), -3.0),
        "rounded": torch.randn(n).round(),
        "all zeros": torch.zeros(n),
        "zeros but few": few,
        "first half zeros": torch.cat([torch.zeros(n // 2), torch.randn(n - n // 2)]),
        "huge values hit every sample": sample_trap(n, stride, 0),
        "huge values miss every sample": sample_trap(n, stride, stride // 2),
        "huge values on a coarser grid": sample_trap(n, 16 * stride, 0),
        "infinite values": sample_trap(n, 1000, 3) * 1e38,
    }


@pytest.mark.parametrize("n", [100_000, 262_144, 1_000_000])
def test_large_flat_tensors_equal_sorting_also_where_a_sample_misleads(n: int) -> None:
    for name, x in large_tensors(n).items():
        order = np.argsort(-np.abs(x.numpy()), kind="stable")
        for k in (1, 5, n // 1024, n // 64, n // 3, n - 1):
            expected = torch.zeros(n, dtype=torch.bool)
            expected[torch.from_numpy(order[:k])] = True
            assert torch.equal(top_mask_flat(x, k), expected), (name, k)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_large_flat_tensors_of_other_dtypes_equal_sorting(dtype: torch.dtype) -> None:
    n = 100_000
    for name, x in large_tensors(n).items():
        x = x.to(dtype)
        order = np.argsort(-np.abs(x.double().numpy()), kind="stable")
        for k in (1, n // 64, n // 3):
            expected = torch.zeros(n, dtype=torch.bool)
            expected[torch.from_numpy(order[:k])] = True
            assert torch.equal(top_mask_flat(x, k), expected), (name, k)


@pytest.mark.parametrize("shape", [(3001, 700), (2, 1_200_000), (1, 1_200_000)])
def test_threads_do_not_change_the_result(shape: tuple[int, int]) -> None:
    x = torch.randn(shape).mul(8).round()  # many ties
    k = shape[1] // 4
    with torch_threads(1):
        kept, mask = select_rows(x, k)
    for threads in (2, 5):
        with torch_threads(threads):
            kept_threaded, mask_threaded = select_rows(x, k)
        assert torch.equal(mask_threaded, mask)
        assert torch.equal(kept_threaded, kept)


def test_nan_in_any_threads_rows_is_an_error() -> None:
    for row in (0, 1500, 2999):
        x = torch.randn(3000, 700)
        x[row, 699] = NAN
        with torch_threads(4), pytest.raises(ValueError, match="NaN"):
            select_rows(x, 10)


@pytest.mark.parametrize("k", [0, 3, 7])
def test_the_operator_for_compiled_models_does_the_same(k: int) -> None:
    x = torch.randn(7, 3, 2).permute(2, 1, 0).requires_grad_()  # not contiguous
    again = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    kept, mask = torch.ops.sparse_model.abs_topk(again, k)
    assert torch.equal(kept, abs_topk(x, k))
    assert mask.shape == x.shape
    assert torch.equal(mask.sum(-1), torch.full((2, 3), k))
    above = torch.randn(2, 3, 7)
    abs_topk(x, k).backward(above)
    kept.backward(above)
    assert torch.equal(again.grad, x.grad)
    torch.library.opcheck(torch.ops.sparse_model.abs_topk.default, (again, k))

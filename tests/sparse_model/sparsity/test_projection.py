"""Weight projection: exactly the budget, the optimal set under the minimum per neuron, the course of annealing."""

import itertools
import math
import re

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.matrices import neuron_counts
from support.reference import projection_kept
from torch import nn

from sparse_model.config import SparsityConfig
from sparse_model.sparsity.projection import (
    SparseParameter,
    annealed_fraction,
    budget,
    check_budgets,
    project_together_,
    projection_mask,
)
from sparse_model.sparsity.topk import magnitude_bits
from sparse_model.sparsity.topk_torch import forced_masks

AXES = ["row", "column"]


@st.composite
def problems(draw: st.DrawFn, largest: int = 8, ties: bool = True) -> tuple[torch.Tensor, int, int, str]:
    """(matrix, k, j, axis) with a budget that holds the minimum; zeros and ties where `ties`."""
    rows, columns = draw(st.integers(1, largest)), draw(st.integers(1, largest))
    n = rows * columns
    if ties:
        flat = draw(st.lists(st.sampled_from([0.0, 0.0, 0.0, -0.0, 1.0, -1.0, 2.0]), min_size=n, max_size=n))
    else:
        sign = draw(st.lists(st.sampled_from([1.0, -1.0]), min_size=n, max_size=n))
        order = draw(st.permutations(range(1, n + 1)))
        flat = [a * b for a, b in zip(sign, order, strict=True)]
    axis = draw(st.sampled_from(AXES))
    neurons, inputs = (rows, columns) if axis == "row" else (columns, rows)
    j = draw(st.integers(0, inputs))
    k = draw(st.integers(j * neurons, n))
    return torch.tensor(flat).view(rows, columns), k, j, axis


@settings(max_examples=300, deadline=None)
@given(problem=problems(ties=False))
def test_the_kept_set_is_top_j_per_neuron_then_the_best_of_the_rest(problem) -> None:
    weight, k, j, axis = problem
    mask = projection_mask(weight, k, min_per_neuron=j, neuron_axis=axis)
    assert set(mask.flatten().nonzero().squeeze(1).tolist()) == projection_kept(weight, k, j, axis)


@settings(max_examples=300, deadline=None)
@given(problem=problems(ties=True))
def test_ties_and_zeros_still_give_the_budget_the_minimum_and_the_best_magnitudes(problem) -> None:
    weight, k, j, axis = problem
    mask = projection_mask(weight, k, min_per_neuron=j, neuron_axis=axis)
    assert mask.sum() == k
    assert (neuron_counts(mask, axis) >= j).all()
    expected = [abs(weight.flatten()[i].item()) for i in projection_kept(weight, k, j, axis)]
    assert sorted(weight[mask].abs().tolist()) == sorted(expected)


@settings(max_examples=200, deadline=None)
@given(problem=st.one_of(problems(ties=True), problems(ties=False)))
def test_counting_as_on_other_devices_equals_the_cpu_kernel(problem) -> None:
    weight, k, j, axis = problem
    if j > 0:
        expected = projection_mask(weight, k, min_per_neuron=j, neuron_axis=axis)
        assert torch.equal(forced_masks(magnitude_bits(weight)[None], k, j, axis)[0], expected)


@settings(max_examples=100, deadline=None)
@given(problem=st.one_of(problems(ties=True), problems(ties=False)))
def test_matrices_projected_together_equal_each_alone(problem) -> None:
    weight, k, j, axis = problem
    tensors = [weight.clone(), weight.flip(0).clone(), torch.zeros_like(weight)]
    expected = [torch.where(projection_mask(w, k, min_per_neuron=j, neuron_axis=axis), w, 0) for w in tensors]
    project_together_(tensors, k, j, axis)
    for found, wanted in zip(tensors, expected, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_matrix_equals_counting(axis: str, dtype: torch.dtype) -> None:
    weight = torch.randn(700, 300).to(dtype)  # bfloat16 ties often
    for k in (2100, 3000, 150_000):
        expected = forced_masks(magnitude_bits(weight)[None], k, 3, axis)[0]
        assert torch.equal(projection_mask(weight, k, min_per_neuron=3, neuron_axis=axis), expected)


@settings(max_examples=60, deadline=None)
@given(problem=st.one_of(problems(largest=3, ties=True), problems(largest=3, ties=False)))
def test_no_other_set_of_that_size_and_minimum_has_a_larger_magnitude(problem) -> None:
    weight, k, j, axis = problem
    magnitudes = weight.abs().flatten().tolist()
    width = weight.shape[1]
    n_neurons = weight.shape[0 if axis == "row" else 1]
    best = 0.0
    for chosen in itertools.combinations(range(weight.numel()), k):
        neurons = [i // width if axis == "row" else i % width for i in chosen]
        if all(neurons.count(neuron) >= j for neuron in range(n_neurons)):
            best = max(best, sum(magnitudes[i] for i in chosen))
    mask = projection_mask(weight, k, min_per_neuron=j, neuron_axis=axis)
    assert weight[mask].abs().sum().item() == best


def test_without_an_axis_there_is_no_minimum() -> None:
    weight = torch.tensor([[5.0, -6.0], [1.0, 2.0]])
    assert projection_mask(weight, 2, min_per_neuron=1).tolist() == [[True, True], [False, False]]
    assert projection_mask(torch.tensor([3.0, -4.0, 3.0]), 2).tolist() == [True, True, False]


@pytest.mark.parametrize("axis", AXES)
def test_the_minimum_is_capped_by_the_number_of_inputs(axis: str) -> None:
    weight = torch.randn(4, 2) if axis == "row" else torch.randn(2, 4)
    assert projection_mask(weight, 8, min_per_neuron=5, neuron_axis=axis).all()


@pytest.mark.parametrize("axis", AXES)
def test_an_all_zero_matrix_is_filled_to_the_budget(axis: str) -> None:
    mask = projection_mask(torch.zeros(6, 5), 17, min_per_neuron=2, neuron_axis=axis)
    assert mask.sum() == 17
    assert (neuron_counts(mask, axis) >= 2).all()


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dtype_and_memory_layout_do_not_matter(axis: str, dtype: torch.dtype) -> None:
    weight = torch.randperm(60).view(6, 10).to(dtype)
    expected = projection_mask(weight.double(), 25, min_per_neuron=2, neuron_axis=axis)
    view = weight.t().contiguous().t()
    assert torch.equal(projection_mask(weight, 25, min_per_neuron=2, neuron_axis=axis), expected)
    assert torch.equal(projection_mask(view, 25, min_per_neuron=2, neuron_axis=axis), expected)


@pytest.mark.parametrize("axis", AXES)
def test_a_budget_below_the_minimum_names_the_smallest_possible(axis: str) -> None:
    weight = torch.randn(7, 11)
    weight[0] *= 100  # so that the unconstrained choice leaves neurons empty
    with pytest.raises(ValueError, match="cannot hold 3") as error:
        projection_mask(weight, 12, min_per_neuron=3, neuron_axis=axis)
    smallest = int(re.search(r"keep at least (\d+)", str(error.value))[1])
    fraction = float(re.search(r"fraction ([\d.e-]+)", str(error.value))[1])
    assert budget(weight.numel(), fraction) == smallest
    mask = projection_mask(weight, smallest, min_per_neuron=3, neuron_axis=axis)
    assert neuron_counts(mask, axis).tolist() == [3] * (smallest // 3)
    with pytest.raises(ValueError, match="cannot hold 3"):
        projection_mask(weight, smallest - 1, min_per_neuron=3, neuron_axis=axis)


@pytest.mark.parametrize("axis", [None, *AXES])
def test_nan_weights_are_an_error(axis: str | None) -> None:
    weight = torch.randn(4, 4)
    weight[2, 1] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        projection_mask(weight, 6, min_per_neuron=1, neuron_axis=axis)


@pytest.mark.parametrize("k", [-1, 13])
def test_a_budget_outside_the_matrix_is_an_error(k: int) -> None:
    with pytest.raises(ValueError, match=f"k={k} is outside"):
        projection_mask(torch.randn(3, 4), k)


@pytest.mark.parametrize(
    ("entries", "fraction", "kept"), [(100, 0.25, 25), (100, 0.001, 1), (1, 1 / 64, 1), (10, 1.0, 10), (6, 0.49, 3)]
)
def test_budget_rounds_and_keeps_at_least_one(entries: int, fraction: float, kept: int) -> None:
    assert budget(entries, fraction) == kept


@settings(max_examples=300, deadline=None)
@given(
    rows=st.integers(1, 400),
    columns=st.integers(1, 400),
    j=st.integers(1, 6),
    axis=st.sampled_from(AXES),
    fraction=st.floats(1e-4, 1),
)
@example(rows=10, columns=2, j=3, axis="row", fraction=0.75)  # j above the number of inputs
@example(rows=4, columns=300, j=4, axis="column", fraction=0.5)
def test_check_budgets_refuses_exactly_the_impossible_and_its_remedies_work(
    rows: int, columns: int, j: int, axis: str, fraction: float
) -> None:
    weight = nn.Parameter(torch.zeros(rows, columns))
    neurons, inputs = (rows, columns) if axis == "row" else (columns, rows)

    def check(fraction: float, j: int) -> None:
        check_budgets(
            [SparseParameter("blocks.0.mlp.fc.weight", weight, fraction, axis)], SparsityConfig(min_per_neuron=j)
        )

    if budget(rows * columns, fraction) >= neurons * min(j, inputs):
        check(fraction, j)
        return
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.fc\.weight") as error:
        check(fraction, j)
    message = str(error.value)
    assert f"min_per_neuron={j}" in message
    check(float(re.search(r"at least ([\d.e+-]+)", message)[1]), j)
    check(fraction, int(re.search(r"lower min_per_neuron to (\d+)", message)[1]))


@pytest.mark.parametrize("final", [1 / 64, 1 / 1000, 0.5, 1.0])
def test_annealing_by_hand(final: float) -> None:
    linear = SparsityConfig(anneal="linear", anneal_start=0.2, anneal_stop=0.6)
    log = SparsityConfig(anneal="log", anneal_start=0.2, anneal_stop=0.6)
    for config in (linear, log):
        assert annealed_fraction(final, config, 0.0) == 1
        assert annealed_fraction(final, config, 0.2) == 1
        assert annealed_fraction(final, config, 0.6) == pytest.approx(final, rel=1e-12)
    assert annealed_fraction(final, linear, 0.4) == pytest.approx((1 + final) / 2)
    assert annealed_fraction(final, log, 0.4) == pytest.approx(math.sqrt(final))


@pytest.mark.parametrize("anneal", ["linear", "log"])
@settings(max_examples=200, deadline=None)
@given(final=st.floats(1e-4, 1), stop=st.floats(0, 1))
def test_the_target_is_reached_exactly(anneal: str, final: float, stop: float) -> None:
    """Otherwise the projection's budget differs from the one that check_budgets has checked."""
    config = SparsityConfig(anneal=anneal, anneal_stop=stop)
    assert annealed_fraction(final, config, stop) == final
    assert annealed_fraction(final, config, 1.0) == final


@settings(max_examples=200, deadline=None)
@given(
    final=st.floats(1e-4, 1),
    window=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted),
    anneal=st.sampled_from(["linear", "log"]),
)
def test_annealing_never_rises_and_stays_between_target_and_one(final: float, window: list[float], anneal: str) -> None:
    config = SparsityConfig(anneal=anneal, anneal_start=window[0], anneal_stop=window[1])
    course = [annealed_fraction(final, config, step / 50) for step in range(51)]
    assert all(a >= b for a, b in itertools.pairwise(course))
    assert all(final - 1e-12 <= f <= 1 for f in course)

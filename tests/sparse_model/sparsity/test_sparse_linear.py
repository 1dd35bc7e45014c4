"""Products that skip zeros: equal to dense ones, forward and backward, wherever they apply, and absent elsewhere."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparse_model.config import SparseConfig
from sparse_model.model.transformer import SparseTransformer
from sparse_model.sparsity import sparse_linear
from sparse_model.sparsity.sparse_linear import PackedMatrix, SparseLinear, multiply, pack_matrix, sparse_products


def sparse_matrix(rows: int, columns: int, share: float, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator, dtype=dtype)
    return torch.where(torch.rand(rows, columns, generator=generator) < share, w, 0)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 300),
    width=st.integers(1, 40),
    out=st.integers(1, 40),
    share=st.sampled_from([0.0, 0.03, 0.3, 1.0]),
    seed=st.integers(0, 9),
)
def test_a_packed_matrix_multiplies_like_the_matrix(tokens: int, width: int, out: int, share: float, seed: int) -> None:
    w = sparse_matrix(out, width, share, torch.float64, seed)
    x = torch.randn(tokens, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    packed = pack_matrix(w)
    assert packed is not None
    matrix, transposed = packed
    assert len(matrix.values) == len(transposed.values) == int(w.count_nonzero())
    torch.testing.assert_close(multiply(x, matrix), x @ w.T, rtol=1e-12, atol=1e-12)
    back = multiply(x @ w.T, transposed)
    torch.testing.assert_close(back, x @ w.T @ w, rtol=1e-12, atol=1e-12)


def test_by_hand() -> None:
    packed = pack_matrix(torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 0.0], [-1.0, 0.0, 3.0]]))
    assert packed is not None
    assert [part.tolist() for part in packed[0]] == [[0, 1, 1, 3], [1, 0, 2], [2.0, -1.0, 3.0]]
    assert [part.tolist() for part in packed[1]] == [[0, 1, 2, 3], [2, 0, 2], [-1.0, 2.0, 3.0]]
    assert multiply(torch.tensor([[1.0, 10.0, 100.0]]), packed[0]).tolist() == [[20.0, 0.0, 299.0]]


def test_a_matrix_with_more_nonzeros_than_pay_is_not_packed() -> None:
    w = torch.zeros(4, 8)
    w[0, :2] = 1
    assert pack_matrix(w, 2 / 32) is not None
    w[3, 7] = 1
    assert pack_matrix(w, 2 / 32) is None


@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_all_gradients_of_a_layer(bias: bool) -> None:
    layer = SparseLinear(24, 40, bias=bias, dtype=torch.float64)
    layer.weight.data = sparse_matrix(40, 24, 1 / 16, torch.float64)
    x = torch.randn(3, 5, 24, dtype=torch.float64).transpose(0, 1).requires_grad_()  # not contiguous
    toward = torch.randn(5, 3, 40, dtype=torch.float64)

    def run() -> list[torch.Tensor]:
        out = layer(x)
        return [out.detach(), *torch.autograd.grad((out * toward).sum(), [x, *layer.parameters()])]

    dense = run()
    with sparse_products(layer, most=0.5, least=0):
        assert layer.packed is not None
        sparse = run()
    assert layer.packed is None
    for a, b in zip(sparse, dense, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_the_whole_model_and_its_gradients_are_those_of_dense_products() -> None:
    torch.manual_seed(0)
    cfg = SparseConfig(n_layers=2, d_model=32, d_mlp=64, n_heads=4, d_head=8, n_ctx=16, d_vocab=50)
    model = SparseTransformer(cfg).double()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = sparse_matrix(*module.weight.shape, 1 / 16, torch.float64)
    tokens = torch.randint(50, (3, 16))

    def run() -> list[torch.Tensor]:
        logits = model(tokens)
        loss = logits.logsumexp(-1).sum()
        return [logits.detach(), *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])]

    dense = run()
    with sparse_products(model, most=0.2, least=0):
        assert all(m.packed is not None for m in model.modules() if isinstance(m, SparseLinear))
        sparse = run()
    for a, b in zip(sparse, dense, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_weights_may_change_between_contexts_and_an_error_leaves_nothing_behind() -> None:
    layer = SparseLinear(8, 8, bias=False)
    x = torch.randn(2, 8)
    for seed in (0, 1):
        layer.weight.data = sparse_matrix(8, 8, 0.05, torch.float32, seed)
        with sparse_products(layer, most=0.5, least=0):
            torch.testing.assert_close(layer(x), x @ layer.weight.T)
        assert layer.packed is None
    with pytest.raises(RuntimeError), sparse_products(layer, most=0.5, least=0):
        layer(torch.ones(2, 7))
    assert layer.packed is None


def test_other_types_autocast_and_small_matrices_keep_dense_products() -> None:
    layer = SparseLinear(8, 8, bias=False)
    layer.weight.data.zero_()
    with sparse_products(layer, least=64):
        assert layer.packed is not None
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(torch.ones(1, 8)).dtype == torch.bfloat16
    with sparse_products(layer, least=65):
        assert layer.packed is None
    half = SparseLinear(8, 8, bias=False, dtype=torch.bfloat16)
    half.weight.data.zero_()
    with sparse_products(half, least=0):
        assert half.packed is None


def test_the_nonzeros_are_what_is_multiplied_inside_and_only_there(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = SparseLinear(8, 6), torch.randn(2, 8)
    layer.weight.data = sparse_matrix(6, 8, 0.2, torch.float32)
    skipped: list[int] = []

    def counted(x: torch.Tensor, matrix: PackedMatrix) -> torch.Tensor:
        skipped.append(len(matrix.values))
        return multiply(x, matrix)

    monkeypatch.setattr(sparse_linear, "multiply", counted)
    with sparse_products(layer, most=1.0, least=1):
        layer(x)
        assert skipped == [int(layer.weight.count_nonzero())]
        with torch.autocast("cpu", torch.bfloat16):
            layer(x)
    layer(x)
    assert len(skipped) == 1

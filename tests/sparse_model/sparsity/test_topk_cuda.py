"""The Triton kernels equal the CPU's: run in Triton's interpreter here, on the device where there is one.

That they also compile for a GPU is tested by compiling them for one, which takes no GPU.
"""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.matrices import matrices

from sparse_model.sparsity import topk_torch as counting
from sparse_model.sparsity.topk import magnitude_bits, select_rows

if not (triton_kernels := counting.triton_kernels()):
    pytest.skip("an optional extra: pip install 'sparse-bridges[triton]'", allow_module_level=True)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@settings(max_examples=60, deadline=None)
@given(case=matrices())
def test_rows_equal_the_cpu_kernel(case: tuple[torch.Tensor, int]) -> None:
    x, k = case
    if x.dtype == torch.float64 or not 0 < k < x.shape[1]:
        return
    kept, mask = triton_kernels.select_rows(x.to(DEVICE), k)
    expected, expected_mask = select_rows(x, k)
    assert torch.equal(mask.cpu(), expected_mask)
    assert torch.equal(kept.cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [2, 513, 6144])
def test_wide_rows_equal_the_cpu_kernel(dtype: torch.dtype, width: int) -> None:
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(width)).to(dtype)
    kept, mask = triton_kernels.select_rows(x.to(DEVICE), max(1, width // 4))
    assert torch.equal(mask.cpu(), select_rows(x, max(1, width // 4))[1])
    assert torch.equal(kept.cpu(), x * mask.cpu())


@settings(max_examples=40, deadline=None)
@given(case=matrices(), seed=st.integers(0, 100))
def test_digit_counts_equal_those_of_torch(case: tuple[torch.Tensor, int], seed: int) -> None:
    x, _ = case
    if x.dtype == torch.float64:
        return
    bits = magnitude_bits(x).reshape(-1)
    bits[torch.rand(len(bits), generator=torch.Generator().manual_seed(seed)) < 0.2] = -1
    for shift in range(0, torch.iinfo(bits.dtype).bits, 8):
        for prefix in (torch.zeros_like(bits[0]), bits[0].clamp(min=0)):
            found = triton_kernels.count_digits(bits.to(DEVICE), prefix.to(DEVICE), shift)
            assert torch.equal(found.cpu(), counting.count_digits(bits, prefix, shift))


COMPILE = """
import warnings; warnings.simplefilter("ignore")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sparse_model.sparsity import topk_cuda as kernels

rows = dict(width="i32", k="i32", mask_ptr="*i8", BITS="constexpr", BLOCK="constexpr")
digits = dict(prefix_ptr="*i32", counts_ptr="*i32", n="i64", SHIFT="constexpr", BLOCK="constexpr")
for kernel, signature, constants in (
    (kernels.select_rows_kernel, dict(x_ptr="*fp32", out_ptr="*fp32", **rows), dict(BITS=32, BLOCK=512)),
    (kernels.select_rows_kernel, dict(x_ptr="*bf16", out_ptr="*bf16", **rows), dict(BITS=16, BLOCK=8192)),
    (kernels.count_digits_kernel, dict(bits_ptr="*i32", **digits), dict(SHIFT=24, BLOCK=2048)),
):
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    print(len(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]))
"""


@pytest.mark.slow
def test_the_kernels_compile_for_a_gpu(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(int(size) > 1000 for size in done.stdout.split())

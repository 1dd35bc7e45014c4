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
from sparse_model.sparsity.projection import NeuronAxis, project_together_, projection_mask
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
def test_digits_equal_those_of_torch(case: tuple[torch.Tensor, int], seed: int) -> None:
    x, k = case
    if x.dtype == torch.float64:
        return
    bits = magnitude_bits(x)
    bits[torch.rand(bits.shape, generator=torch.Generator().manual_seed(seed)) < 0.2] = -1
    for shift in range(0, torch.iinfo(bits.dtype).bits, 8):
        for prefix in (torch.zeros_like(bits[:, :1]), bits[:, :1].clamp(min=0)):
            counts = counting.count_digits(bits, prefix, shift)
            found = triton_kernels.count_digits(bits.to(DEVICE), prefix.to(DEVICE), shift)
            assert torch.equal(found.cpu().long(), counts)
            room = counts.sum(-1, keepdim=True).clamp(max=k)
            for ours, wanted in zip(
                triton_kernels.narrow(found, prefix.to(DEVICE), room.to(DEVICE), shift),
                counting.narrow(counts, prefix, room, shift),
                strict=True,
            ):
                assert torch.equal(ours.cpu(), wanted)


@settings(max_examples=60, deadline=None)
@given(case=matrices(), n=st.integers(1, 3), axis=st.sampled_from(["row", "column", None]), j=st.integers(0, 4))
def test_a_projection_of_several_equals_the_cpu_kernels(
    case: tuple[torch.Tensor, int], n: int, axis: NeuronAxis, j: int
) -> None:
    x, k = case
    if x.dtype == torch.float64:
        return
    if axis:
        neurons, inputs = x.shape if axis == "row" else reversed(x.shape)
        k = max(k, min(j, inputs) * neurons)
    several = [x.roll(i, 1) for i in range(n)]
    expected = [torch.where(projection_mask(w, k, min_per_neuron=j, neuron_axis=axis), w, 0) for w in several]
    found = [w.to(DEVICE) for w in several]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counting, "triton_for", lambda bits: triton_kernels)
        project_together_(found, k, j, axis)
    for ours, wanted in zip(found, expected, strict=True):
        assert torch.equal(ours.cpu(), wanted)


COMPILE = """
import warnings; warnings.simplefilter("ignore")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sparse_model.sparsity import topk_cuda as kernels

rows = dict(width="i32", k="i32", mask_ptr="*i8", BITS="constexpr", BLOCK="constexpr", WRITE="constexpr")
narrow = dict(counts_ptr="*i32", prefix_ptr="*i32", room_ptr="*i64", next_prefix_ptr="*i32", next_room_ptr="*i64")
narrow["SHIFT"] = "constexpr"
digits = dict(prefix_ptr="*i32", counts_ptr="*i32", n="i64", SHIFT="constexpr", BLOCK="constexpr")
for kernel, signature, constants in (
    (kernels.select_rows_kernel, dict(x_ptr="*fp32", out_ptr="*fp32", **rows), dict(BITS=32, BLOCK=512, WRITE=True)),
    (kernels.select_rows_kernel, dict(x_ptr="*bf16", out_ptr="*bf16", **rows), dict(BITS=16, BLOCK=8192, WRITE=False)),
    (kernels.count_digits_kernel, dict(bits_ptr="*i32", **digits), dict(SHIFT=24, BLOCK=2048)),
    (kernels.narrow_kernel, narrow, dict(SHIFT=24)),
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

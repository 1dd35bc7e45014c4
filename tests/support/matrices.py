"""Matrices for top-k: every dtype, ties, infinities, zeros of both signs."""

import torch
from hypothesis import strategies as st

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
INF, NAN = float("inf"), float("nan")

# Zeros of both signs, infinities, the smallest denormals of the four formats, and values that tie.
SPECIAL = [0.0, -0.0, INF, -INF, 5e-324, -1e-45, 6e-8, -9.2e-41, 1.0, -1.0, 2.0, -2.0, 65504.0]
values = st.one_of(
    st.sampled_from(SPECIAL), st.integers(-3, 3).map(float), st.floats(allow_nan=False), st.floats(-4, 4)
)


@st.composite
def matrices(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    """(rows x width matrix of any dtype, k)."""
    width, rows = draw(st.integers(1, 70)), draw(st.integers(1, 3))
    entries = draw(st.lists(values, min_size=rows * width, max_size=rows * width))
    x = torch.tensor(entries, dtype=torch.float64).view(rows, width).to(draw(st.sampled_from(DTYPES)))
    return x, draw(st.one_of(st.integers(0, width), st.sampled_from([0, 1, width])))


def neuron_counts(mask: torch.Tensor, axis: str) -> torch.Tensor:
    return mask.sum(1 if axis == "row" else 0)

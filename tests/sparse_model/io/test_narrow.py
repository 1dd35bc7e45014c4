"""Fewer bytes where nothing is lost; rounding that is as near as it says."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparse_model.io.narrow import narrowed, read_weights, rounded_half, rounded_rows


def there_and_back(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    save_file(narrowed(tensors), path)
    return read_weights(path)


def bits(t: Tensor) -> list[int]:
    return t.view(torch.int32).flatten().tolist()


def test_what_loses_nothing_takes_fewer_bytes(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    tensors = {
        "half": rounded_half(torch.randn(64, 48)),
        "rows": rounded_rows(torch.randn(64, 48)),
        "vector": rounded_half(torch.randn(48)),
        "other": torch.randn(64, 48),
        "indices": torch.arange(9, dtype=torch.int32),
    }
    back = there_and_back(file, tensors)
    assert back.keys() == tensors.keys()
    for name, t in tensors.items():
        assert back[name].dtype == t.dtype, name
        assert torch.equal(back[name], t), name
    stored = {name: t.dtype for name, t in load_file(file).items()}
    assert stored == {
        "half": torch.float16,
        "rows.int8": torch.int8,
        "rows.row_scale": torch.float32,
        "vector": torch.float16,
        "other": torch.float32,
        "indices": torch.int32,
    }


@pytest.mark.parametrize("odd", [-0.0, float("inf"), float("nan"), 1e-45, 65504.0, -65536.0])
def test_odd_numbers_come_back_bit_for_bit(odd: float, tmp_path: Path) -> None:
    for t in (torch.tensor([[odd, 1.0], [0.0, 0.0]]), torch.tensor([odd]), torch.zeros(0, 3), torch.zeros(3, 0)):
        assert bits(there_and_back(tmp_path / "w.safetensors", {"w": t})["w"]) == bits(t)


def test_rounding_to_half_is_to_the_nearest() -> None:
    t = torch.randn(1000)
    assert torch.equal(rounded_half(t), torch.from_numpy(t.numpy().astype("float16").astype("float32")))
    assert bits(rounded_half(torch.tensor([float("inf")]))) == bits(torch.tensor([float("inf")]))
    with pytest.raises(ValueError, match=r"7e\+04 is larger than half precision holds \(65504\)"):
        rounded_half(torch.tensor([1.0, -7e4]))


def test_rounded_rows_are_within_a_127th_and_stay_what_they_are() -> None:
    t = torch.randn(200, 300) * torch.logspace(-6, 6, 200)[:, None]
    t[3], t[4, 0] = 0.0, -0.0
    rounded = rounded_rows(t)
    largest = t.abs().amax(1, keepdim=True)
    assert bool(((rounded - t).abs() <= largest / 127).all())
    assert float((rounded - t).abs().div(largest.clamp(min=1e-30)).mean()) < 0.6 * (0.5 / 127)  # .5 at its worst
    assert len(rounded[0].unique()) <= 255
    assert torch.equal(rounded_rows(rounded), rounded)


@pytest.mark.parametrize(
    "parts",
    [
        {"w.int8": torch.ones(3, 2, dtype=torch.int8), "w.row_scale": torch.ones(2, 1)},
        {"w.int8": torch.ones(3, 2, dtype=torch.int8), "w.row_scale": torch.ones(3, 1, dtype=torch.int32)},
        {"w.int8": torch.ones(3, 2), "w.row_scale": torch.ones(3, 1)},
        {"w.int8": torch.ones(3, dtype=torch.int8), "w.row_scale": torch.ones(3, 1)},
    ],
)
def test_parts_that_do_not_fit_are_refused(parts: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(parts, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"w\.safetensors: the parts of w do not fit each other: copy the file again"):
        read_weights(tmp_path / "w.safetensors")


@pytest.mark.parametrize("kind", [torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.complex64])
def test_numbers_that_nothing_computes_with_are_refused(kind: torch.dtype, tmp_path: Path) -> None:
    save_file({"w.values": torch.zeros(3, dtype=torch.uint8).to(kind)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"w\.safetensors is damaged or not of this library \(w\.values holds \w+\)"):
        read_weights(tmp_path / "w.safetensors")

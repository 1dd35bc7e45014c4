"""A step on a GPU is bound by launches and by waiting for the device: both are counted, without one.

On the meta device every operation runs that would run on a GPU, and none that needs a number from it can.
"""

import itertools
from collections import Counter
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel

from bridges.config import BridgeConfig, RunConfig
from bridges.dense import DenseModel
from bridges.joint_trainer import JointTrainer
from bridges.run_folder import new_bridges
from sparse_model.config import SparseConfig, SparsityConfig
from sparse_model.model.transformer import SparseTransformer
from sparse_model.sparsity import topk_torch as counting
from sparse_model.sparsity.projection import project_

META = torch.device("meta")


class Launches(TorchDispatchMode):
    """Counts operations on the device; those that would wait for it raise."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.name()
        given = [x for x in _leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_device, on_host = ([x for x in given if x.is_meta is meta] for meta in (True, False))
        copies = name.startswith(("aten::_to_copy", "aten::copy_"))
        if on_device and name.startswith(("aten::_local_scalar_dense", "aten::nonzero", "aten::equal")):
            raise AssertionError(f"{name} waits for the device")
        if on_device and name.startswith("aten::index") and any(x.dtype is torch.bool for x in given):
            raise AssertionError(f"{name} with a mask waits for the device")
        if on_device and kwargs.get("device", META).type == "cpu":
            raise AssertionError(f"{name} copies to the host")
        if on_device and on_host and (not copies or not (args[2] if len(args) > 2 else kwargs.get("non_blocking"))):
            raise AssertionError(f"{name} copies a host tensor and waits")
        found = func(*args, **kwargs)
        made = [x for x in _leaves(found) if isinstance(x, torch.Tensor) and x.is_meta]
        if copies and made and on_host and not on_device and not kwargs.get("non_blocking"):
            raise AssertionError(f"{name} copies a host tensor and waits")
        if (made or on_device) and not any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns):
            self.counts[name] += 1
        return found


def _leaves(tree) -> list:
    if isinstance(tree, dict):
        tree = list(tree.values())
    return list(itertools.chain.from_iterable(map(_leaves, tree))) if isinstance(tree, (list, tuple)) else [tree]


# Each Triton kernel as one operation.
KERNELS = SimpleNamespace(
    MAX_WIDTH=32768,
    rows_mask=lambda bits, k: bits > k,
    select_rows=lambda x, k: (x.clone(), x > k),
    count_digits=lambda bits, prefix, shift: torch.zeros(len(bits), 256, dtype=torch.int32, device=bits.device).add_(1),
    narrow=lambda counts, threshold, room, shift: (threshold.clone(), room),
)


@pytest.fixture
def on_meta(monkeypatch: pytest.MonkeyPatch):
    """Accelerate, the fused optimizers and the Triton kernels take the meta device for a GPU."""
    monkeypatch.setattr(Accelerator, "device", property(lambda self: META))
    monkeypatch.setattr(counting, "triton_for", lambda bits: KERNELS if bits.is_meta else None)
    for module in ("torch.optim.adam", "torch.optim.optimizer"):
        monkeypatch.setattr(
            import_module(module), "_get_fused_kernels_supported_devices", lambda: ["meta"], raising=False
        )
    monkeypatch.setattr(import_module("torch.nn.utils.clip_grad"), "_device_has_foreach_support", lambda device: True)


def make_trainer(folder: Path, n_layers: int, **bridge) -> JointTrainer:
    sparse = SparseConfig(n_layers=n_layers, d_model=32, d_mlp=64, n_heads=2, n_ctx=16, d_vocab=48)
    config = RunConfig(
        steps=10,
        batch_size=2,
        sparse=sparse,
        sparsity=SparsityConfig(nonzero_fraction=1 / 4, anneal_stop=0.0),
        bridge=BridgeConfig(**bridge),
    )
    ends = {"bos_token_id": None, "eos_token_id": None}
    dense = GPT2Config(vocab_size=48, n_positions=16, n_embd=16, n_layer=n_layers, n_head=2, **ends)
    models = DenseModel(GPT2LMHeadModel(dense)), SparseTransformer(sparse), new_bridges(config, 16)
    return JointTrainer(config, *models, torch.randint(48, (8, 16)), folder, Accelerator(cpu=True))


def launches(trainer: JointTrainer) -> Counter[str]:
    """Of one step, after another that makes the optimizers' moments."""
    trainer.train_step()
    with Launches() as counted:
        trainer.train_step()
    return counted.counts


def test_a_step_never_waits_and_launches_little(tmp_path: Path, on_meta) -> None:
    two, four = (launches(make_trainer(tmp_path, n)) for n in (2, 4))
    assert two.total() <= 1150, two.total()
    assert four.total() <= 1700, four.total()


def test_without_triton_it_does_not_wait_either(tmp_path: Path, on_meta, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting, "triton_for", lambda bits: None)
    assert launches(make_trainer(tmp_path, 2)).total() > 1150


def test_the_projection_takes_the_same_launches_at_any_depth(tmp_path: Path, on_meta) -> None:
    counts = []
    for n in (2, 4):
        trainer = make_trainer(tmp_path, n)
        with Launches() as counted:
            project_(trainer.projected, trainer.config.sparsity)
        counts.append(counted.counts.total())
    assert counts[0] == counts[1] <= 9 * 40, counts


X, INDEX, HOST = torch.zeros(4, device=META), torch.zeros((), dtype=torch.long, device=META), torch.zeros(2).long()


@pytest.mark.parametrize(
    "waits",
    [
        lambda: X[INDEX],
        lambda: X.sum().item(),
        lambda: X[X > 0],
        lambda: X[HOST],
        lambda: HOST.to(META),
    ],
)
def test_what_waits_is_noticed(waits) -> None:
    with pytest.raises((AssertionError, RuntimeError)), Launches():
        waits()

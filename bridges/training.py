"""The joint trainer: sparse model and bridges beside a frozen dense model, on accelerate."""

import json
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm.auto import tqdm

from bridges.bridge import BridgeSet
from bridges.config import RunConfig
from bridges.dense import DenseModel
from bridges.joint import JointLosses, draw, joint_backward
from sparse_model.batches import BatchOrder
from sparse_model.checkpoint import load_checked, read_tensors
from sparse_model.config import from_json, require, to_json
from sparse_model.files import recover_folder, replace_folder
from sparse_model.optim import adamw, normalize_grad_rms_, schedule, set_lr
from sparse_model.projection import annealed_fraction, check_budgets, project_
from sparse_model.transformer import SparseTransformer

CHECKPOINT = "checkpoint"


class TrainingDiverged(RuntimeError):
    """A loss term became NaN or infinite; the message names it."""


class Interrupted(KeyboardInterrupt):
    """SIGTERM or Ctrl-C, raised once the checkpoint is written."""


class JointTrainer:
    """Trains a sparse model and bridges in a run folder.

    Two optimizers: the paper's AdamW (eps 0.1, gradient RMS) for sparse parameters, and a plain Adam for bridges and
    bigram table. Weights are projected after every step. Every random choice is a function of seed and step, so a
    checkpoint holds weights, moments and the step, and a resumed run repeats the uninterrupted one bit for bit.
    """

    def __init__(
        self,
        config: RunConfig,
        dense: DenseModel,
        sparse: SparseTransformer,
        bridges: BridgeSet,
        blocks: Tensor,
        folder: Path,
        accelerator: Accelerator | None = None,
    ) -> None:
        self.config, self.folder, self.blocks = config, folder, blocks
        self.accelerator = accelerator or Accelerator(cpu=not torch.cuda.is_available())
        check_fit(dense, sparse)
        device = self.accelerator.device
        self.dense, self.sparse, self.bridges = dense.to(device), sparse.to(device), bridges.to(device)
        sparsity = config.sparsity
        self.projected = sparse.sparse_parameters(
            sparsity.nonzero_fraction, sparsity.embed_fraction, sparsity.bias_fraction
        )
        check_budgets(self.projected, sparsity)
        self.free = [p for n, p in sparse.named_parameters() if n == "bigram" and p.requires_grad]
        self.free += list(bridges.parameters())
        self.main = [p for n, p in sparse.named_parameters() if n != "bigram"]
        self.optimizers = {
            "sparse": adamw(self.main, config.optim),
            "bridges": torch.optim.Adam(self.free, lr=config.bridge.lr, eps=config.bridge.eps, fused=True),
        }
        self.order = BatchOrder(
            len(blocks),
            config.batch_size,
            config.seed,
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )
        self.step = 0
        self._broadcast()

    def train(self) -> None:
        """Run to the configured number of steps, from the step where this trainer stands.

        Raises TrainingDiverged, with the last checkpoint kept, when a loss is no longer finite, and Interrupted after
        writing a checkpoint on SIGTERM or Ctrl-C.
        """
        config = self.config
        metrics = MetricsLog(self.folder / "metrics.jsonl", self.step) if self.accelerator.is_main_process else None
        start, first = time.monotonic(), self.step
        bar = tqdm(
            total=config.steps,
            initial=self.step,
            desc="joint",
            unit="step",
            disable=not self.accelerator.is_main_process,
        )
        with _signals() as stop_asked, bar:
            while self.step < config.steps:
                losses = self.train_step()
                last = self.step == config.steps
                if self.step % config.log_every == 0 or self.step == 1 or last:
                    self._check_finite(losses)
                    record = self._record(losses)
                    self.accelerator.log(flat(record), step=self.step)
                    if metrics:
                        record["seconds"] = round(time.monotonic() - start, 2)
                        metrics.write(record)
                        bar.set_postfix_str(summary(record))
                bar.update()
                if stop_asked:
                    self.save_checkpoint()
                    raise Interrupted(f"stopped at step {self.step}; go on with --resume")
                if self.step % config.checkpoint_every == 0 and not last:
                    self.save_checkpoint()
        self.seconds_per_step = (time.monotonic() - start) / max(1, self.step - first)

    def train_step(self) -> JointLosses:
        """One optimizer step on the next batch; returns its losses on the device."""
        config, accelerator = self.config, self.accelerator
        progress = self.step / config.steps
        tokens = self.blocks[self.order(self.step)].long().to(accelerator.device)
        drawn = draw(config.bridge, self.bridges.n_sites, tokens.shape[1], config.seed, self.step)
        try:
            with accelerator.autocast():
                losses = joint_backward(self.dense, self.sparse, self.bridges, tokens, drawn, config.bridge.weights)
        except ValueError as error:  # on the CPU, AbsTopK refuses NaN at once
            raise TrainingDiverged(self._diverged(f"an activation became NaN ({error})")) from error
        if accelerator.device.type == "cpu":  # elsewhere reading a loss waits for the device: at log steps only
            self._check_finite(losses)
        self._reduce_gradients()
        self.grad_rms = normalize_grad_rms_(self.main, config.optim.grad_rms)
        nn.utils.clip_grad_norm_(self.free, config.bridge.clip, foreach=True)

        kept = annealed_fraction(config.sparsity.nonzero_fraction, config.sparsity, progress)
        half_step = (self.step + 0.5) / config.steps  # so that neither the first nor the last step has rate zero
        set_lr(self.optimizers["sparse"], config.optim.lr * schedule(half_step, config.optim, kept))
        set_lr(self.optimizers["bridges"], config.bridge.lr * schedule(half_step, config.optim))
        for optimizer in self.optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        project_(self.projected, config.sparsity, self.step / config.steps)
        return losses

    def _reduce_gradients(self) -> None:
        """Average all gradients over the processes in one flattened call."""
        if self.accelerator.num_processes == 1:
            return
        grads = [p.grad for p in (*self.main, *self.free) if p.grad is not None]
        flat_grad = self.accelerator.reduce(torch.cat([g.reshape(-1) for g in grads]), reduction="mean")
        for g, part in zip(grads, flat_grad.split([g.numel() for g in grads]), strict=True):
            g.copy_(part.view_as(g))

    def _broadcast(self) -> None:
        """Equal initial weights on every process."""
        if self.accelerator.num_processes > 1:
            for p in (*self.main, *self.free):
                torch.distributed.broadcast(p.data, 0)

    def _record(self, losses: JointLosses) -> dict:
        """One line of metrics.jsonl; the only place where training waits for the device."""
        config = self.config
        record: dict = {"step": self.step, "tokens": self.step * config.batch_size * self.blocks.shape[1]}
        record["tokens"] *= self.accelerator.num_processes
        record |= {name: value.tolist() for name, value in losses._asdict().items()}
        record["grad_rms"] = float(self.grad_rms)
        record["lr"] = self.optimizers["sparse"].param_groups[0]["lr"]
        record["nonzero_fraction"] = annealed_fraction(
            config.sparsity.nonzero_fraction, config.sparsity, self.step / config.steps
        )
        return record

    def _check_finite(self, losses: JointLosses) -> None:
        for name, value in losses._asdict().items():
            finite = value.isfinite()
            if not finite.all():
                site = f" at site {int((~finite).nonzero()[0])}" if value.ndim else ""
                raise TrainingDiverged(self._diverged(f"{name}{site} is no longer finite"))

    def _diverged(self, what: str) -> str:
        return (
            f"{what} in step {self.step + 1}; the last checkpoint in {self.folder} is as it was. Train again with a "
            f"lower optim.lr (now {self.config.optim.lr:g}) or bridge.lr (now {self.config.bridge.lr:g})"
        )

    def save_checkpoint(self) -> None:
        """Write RUN/checkpoint: weights, moments, step. The previous one stays until the new one is whole."""
        from safetensors.torch import save_file

        if self.accelerator.is_main_process:
            with replace_folder(self.folder / CHECKPOINT) as folder:
                for name in ("sparse", "bridges"):
                    save_file(getattr(self, name).state_dict(), folder / f"{name}.safetensors")
                    torch.save(self.optimizers[name].state_dict(), folder / f"{name}_optimizer.pt")
                to_json(self.config, folder / "config.json")
                (folder / "step.json").write_text(json.dumps({"step": self.step}))
        self.accelerator.wait_for_everyone()

    def load_checkpoint(self) -> bool:
        """Restore the last checkpoint; false where there is none.

        Raises ValueError for one of another configuration, naming the options that differ, or for a damaged one.
        """
        folder = self.folder / CHECKPOINT
        recover_folder(folder)
        if not folder.exists():
            return False
        saved = from_json(RunConfig, folder / "config.json")
        different = [n for n in RunConfig.__dataclass_fields__ if getattr(saved, n) != getattr(self.config, n)]
        free_to_change = {"log_every", "checkpoint_every", "eval_tokens"}
        if set(different) - free_to_change:
            raise ValueError(
                f"{folder} was made with other settings ({', '.join(different)}): resume with the same ones"
            )
        for name in ("sparse", "bridges"):
            path = folder / f"{name}.safetensors"
            load_checked(getattr(self, name), read_tensors(path), path)
            try:
                state = torch.load(folder / f"{name}_optimizer.pt", weights_only=True, map_location="cpu")
            except Exception as error:  # truncated zip, pickle and I/O errors are of many kinds
                raise ValueError(f"{folder}/{name}_optimizer.pt is damaged: {error}; start without --resume") from error
            self.optimizers[name].load_state_dict(state)
        self.step = json.loads((folder / "step.json").read_text())["step"]
        return True

    def remove_checkpoint(self) -> None:
        """Drop the checkpoint once the run's final weights are saved."""
        if self.accelerator.is_main_process:
            shutil.rmtree(self.folder / CHECKPOINT, ignore_errors=True)


def check_fit(dense: DenseModel, sparse: SparseTransformer) -> None:
    """Raise ValueError unless the two models have the same depth and vocabulary and a context that fits."""
    require(
        dense.n_layers == sparse.n_layers,
        "sparse.n_layers",
        sparse.n_layers,
        f"the dense model has {dense.n_layers} layers and each sublayer needs its partner: use {dense.n_layers}",
    )
    require(
        dense.d_vocab == sparse.d_vocab,
        "sparse.d_vocab",
        sparse.d_vocab,
        f"the dense model's vocabulary has {dense.d_vocab} tokens: use {dense.d_vocab}",
    )
    require(
        dense.n_ctx >= sparse.n_ctx,
        "sparse.n_ctx",
        sparse.n_ctx,
        f"the dense model's context holds {dense.n_ctx} tokens: use at most that",
    )


class MetricsLog:
    """metrics.jsonl, appended line by line; on resume, lines after the checkpoint's step are dropped."""

    def __init__(self, path: Path, step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [r for r in read_metrics(path) if r["step"] <= step] if step and path.exists() else []
        path.write_text("".join(json.dumps(r) + "\n" for r in kept))
        self.path = path

    def write(self, record: dict) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def read_metrics(path: Path) -> list[dict]:
    """The records of a metrics.jsonl; a last line cut short by a kill is left out."""
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def flat(record: dict) -> dict[str, int | float]:
    """A record for trackers: per-site lists become name/site."""
    out: dict[str, int | float] = {}
    for name, value in record.items():
        if isinstance(value, list):
            out |= {f"{name}/{site}": v for site, v in enumerate(value)}
        else:
            out[name] = value
    return out


def summary(record: dict) -> str:
    """The progress bar's text."""
    mean = {n: sum(record[n]) / len(record[n]) for n in ("nmse_encode", "nmse_decode")}
    return (
        f"ce {record['ce']:.2f} nmse {mean['nmse_encode']:.2f}/{mean['nmse_decode']:.2f} "
        f"kl {record['kl_dense_to_sparse']:.2f}/{record['kl_sparse_to_dense']:.2f}"
    )


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT instead of dying in the middle of a step; a second one acts at once."""
    caught: list[int] = []
    old: dict[signal.Signals, object] = {}

    def note(number: int, _frame: object) -> None:
        caught.append(number)
        for name, handler in old.items():
            signal.signal(name, handler)  # type: ignore[arg-type]

    try:
        for name in (signal.SIGTERM, signal.SIGINT):
            old[name] = signal.signal(name, note)
    except ValueError:  # not the main thread: leave the process' handlers alone
        old = {}
    try:
        yield caught
    finally:
        for name, handler in old.items():
            signal.signal(name, handler)  # type: ignore[arg-type]

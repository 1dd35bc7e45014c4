"""The training loop of weight-sparse models: accelerate, projection after every step, checkpoints, exact resume.

`SparseTrainer` trains a sparse model alone; the joint trainer in `bridges.joint_trainer` puts its own losses in the
place of `backward` and adds the bridges to what is trained. One step:

1. The batch of this step, a function of seed and step (`sparse_model.data.batch_order`).
2. `backward`: losses, and gradients into the parameters.
3. Gradients are averaged over the processes in one flattened call.
4. Sparse parameters: gradient RMS rule, AdamW, learning rate with the sharkfin factor. Free parameters (the bigram
   table, bridges): gradient norm clipped, Adam, the same schedule without the factor.
5. Every sparse parameter is projected onto its budget (`sparse_model.sparsity.projection`).
"""

import time
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Tensor, nn

from sparse_model.config import TrainConfig
from sparse_model.data.batch_order import BatchOrder
from sparse_model.io.progress import progress_bar
from sparse_model.io.tensors import to_device
from sparse_model.model.transformer import SparseTransformer
from sparse_model.sparsity.projection import (
    SparseParameter,
    annealed_fraction,
    annealed_topk,
    check_budgets,
    project_,
)
from sparse_model.sparsity.sparse_linear import sparse_products
from sparse_model.sparsity.topk import NotFiniteError
from sparse_model.training.accelerator import matmul_precision
from sparse_model.training.checkpoints import CHECKPOINT, Checkpoints
from sparse_model.training.finite import TrainingDiverged, first_not_finite, gradients_of, parameters_of, state_of
from sparse_model.training.identity import Identity, digest_of, versions
from sparse_model.training.interrupts import Interrupted, stop_signals
from sparse_model.training.losses import next_token_loss
from sparse_model.training.metrics_log import MetricsLog, flat
from sparse_model.training.optim import adamw, normalize_grad_rms_, schedule, set_lr


class FreeRule(NamedTuple):
    """The optimizer of parameters that are not sparse."""

    lr: float
    """Peak learning rate."""
    eps: float
    """Adam's epsilon."""
    clip: float
    """Largest gradient norm."""


BIGRAM_RULE = FreeRule(lr=1e-2, eps=1e-8, clip=1.0)
"""How the bigram table of a model trained alone is optimized."""


class SparseLosses(NamedTuple):
    """The loss of one step of a sparse model alone, detached, on the device."""

    ce: Float[Tensor, ""]
    """Next-token cross-entropy, nats."""


class SparseTrainer:
    """Trains a sparse model in a folder.

    Every random choice is a function of seed and step, so a checkpoint holds weights, moments and the step, and a
    resumed run repeats the uninterrupted one bit for bit.
    """

    title = "sparse"

    def __init__(
        self,
        config: TrainConfig,
        sparse: SparseTransformer,
        blocks: Int[Tensor, "block pos"],
        folder: Path,
        accelerator: Accelerator | None = None,
        *,
        free_rule: FreeRule = BIGRAM_RULE,
        beside: dict[str, nn.Module] | None = None,
    ) -> None:
        self.config, self.folder, self.blocks, self.free_rule = config, folder, blocks, free_rule
        self.accelerator = accelerator or Accelerator(cpu=not torch.cuda.is_available())
        self.device = self.accelerator.device
        self.modules: dict[str, nn.Module] = {"sparse": sparse.to(self.device)}
        self.modules |= {name: module.to(self.device) for name, module in (beside or {}).items()}
        self.sparse = sparse
        if config.compile:
            sparse.compile_sublayers()
        self.skips_zeros = not config.compile and self.accelerator.mixed_precision == "no"
        self.projected = projected_parameters(sparse, config)
        self.main = [p for n, p in sparse.named_parameters() if n != "bigram"]
        self.free = [p for n, p in sparse.named_parameters() if n == "bigram" and p.requires_grad]
        self.free += [p for module in (beside or {}).values() for p in module.parameters()]
        self.optimizers: dict[str, torch.optim.Optimizer] = {"main": adamw(self.main, config.optim)}
        if self.free:
            self.optimizers["free"] = torch.optim.Adam(self.free, lr=free_rule.lr, eps=free_rule.eps, fused=True)
        self.order = BatchOrder(
            len(blocks),
            config.batch_size,
            config.seed,
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )
        # For fp16 only: gradients are scaled up so that they do not vanish, and a step that overflows is left out.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.accelerator.mixed_precision == "fp16")
        self.step = 0
        self.checkpoints = Checkpoints(folder / CHECKPOINT, self.modules, self.optimizers)
        self._broadcast()

    def backward(self, tokens: Int[Tensor, "batch pos"], batch: int, scale: float | Tensor) -> Any:
        """Add `scale` times the gradients of the batch-th batch of the run to the parameters' own.

        Returns a NamedTuple of detached, unscaled losses on the device; None stands for one that was not computed.
        """
        loss = next_token_loss(self.sparse(tokens), tokens)
        (scale * loss).backward()
        return SparseLosses(loss.detach())

    def extra_record(self) -> dict[str, float]:
        """More for a record of metrics.jsonl."""
        return {}

    def progress_text(self, record: dict) -> str:
        """The progress bar's text."""
        return f"ce {record['ce']:.3f}"

    def train(self, *, progress: bool = True) -> None:
        """Run to the configured number of steps, from the step where this trainer stands.

        Raises TrainingDiverged, with the last checkpoint kept, when a number is no longer finite, and Interrupted after
        writing a checkpoint on SIGINT, SIGTERM or SIGHUP.
        """
        config, main = self.config, self.accelerator.is_main_process
        shown = main and progress
        metrics = MetricsLog(self.folder / "metrics.jsonl", self.step) if main else None
        start = time.monotonic()
        bar = progress_bar(total=config.steps, initial=self.step, desc=self.title, unit="step", disable=not shown)
        with stop_signals() as stop_asked, bar:
            while self.step < config.steps:
                losses = self.train_step()
                last = self.step == config.steps
                checkpoint_due = self.step % config.checkpoint_every == 0
                if self.step % config.log_every == 0 or checkpoint_due or self.step == 1 or last:
                    self._check_finite(losses, self.step)
                    self._check_state()
                    record = self._record(losses) | self.extra_record()
                    self.accelerator.log(flat(record), step=self.step)
                    if metrics:
                        record["seconds"] = round(time.monotonic() - start, 2)
                        metrics.write(record)
                        bar.set_postfix_str(self.progress_text(record))
                bar.update()
                if self._stop_agreed(stop_asked):
                    self.save_checkpoint()
                    raise Interrupted(f"stopped at step {self.step}; go on with --resume")
                if checkpoint_due and not last:
                    self.save_checkpoint()

    def train_step(self) -> Any:
        """One optimizer step on the next batch; returns its losses on the device."""
        config = self.config
        self.set_topk((self.step + 1) / config.steps)
        losses = self._accumulate()
        self._reduce_gradients()
        for optimizer in self.optimizers.values():
            if self.scaler.is_enabled():
                self.scaler.unscale_(optimizer)
        if self.device.type == "cpu" and not self.scaler.is_enabled():  # elsewhere it would wait for the device
            self._refuse(first_not_finite(gradients_of(self.modules)), self.step + 1)
        self.grad_rms = normalize_grad_rms_(self.main, config.optim.grad_rms)
        if self.free:
            nn.utils.clip_grad_norm_(self.free, self.free_rule.clip, foreach=True)
        for optimizer, rate in zip(self.optimizers.values(), self._rates(self.step), strict=False):
            set_lr(optimizer, rate)
            self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        try:
            project_(self.projected, config.sparsity, (self.step + 1) / config.steps)
        except NotFiniteError as error:
            self._refuse(first_not_finite(parameters_of(self.modules)) or f"a weight ({error})", self.step + 1)
        self.step += 1
        return losses

    def set_topk(self, progress: float) -> None:
        """Set what AbsTopK keeps at this share of all steps."""
        self.sparse.keep_activations(annealed_topk(self.config.sparse.topk_fraction, self.config.sparsity, progress))

    def _rates(self, step: int) -> tuple[float, float]:
        """The learning rates of sparse and of free parameters in a step, counted from 0."""
        sparsity, optim, steps = self.config.sparsity, self.config.optim, self.config.steps
        kept = annealed_fraction(sparsity.nonzero_fraction, sparsity, step / steps)
        half_step = (step + 0.5) / steps  # so that neither the first nor the last step has rate zero
        return optim.lr * schedule(half_step, optim, kept), self.free_rule.lr * schedule(half_step, optim)

    def _accumulate(self) -> Any:
        """The losses of this step's batches, averaged, with their gradients in the parameters."""
        config, accelerator, parts = self.config, self.accelerator, []
        scale = self.scaler.scale(torch.full((), 1 / config.accumulate, device=self.device))
        for batch in range(self.step * config.accumulate, (self.step + 1) * config.accumulate):
            tokens = to_device(self.blocks[self.order(batch)].long(), self.device)
            precision = matmul_precision(self.device, config.tf32)
            products = sparse_products(self.sparse) if self.skips_zeros else nullcontext()
            try:
                with accelerator.autocast(), precision, products:
                    parts.append(self.backward(tokens, batch, scale))
            except NotFiniteError as error:  # on the CPU, top-k refuses NaN at once; other errors keep their meaning
                what = f"{self.where_not_finite(tokens)} became NaN ({error})"
                raise TrainingDiverged(self._diverged(what, self.step + 1)) from error
            if self.device.type == "cpu":  # elsewhere reading a loss waits for the device: at log steps only
                self._check_finite(parts[-1], self.step + 1)
        return parts[0] if len(parts) == 1 else mean_losses(parts)

    def _stop_agreed(self, asked: list[int]) -> bool:
        """Whether a process was asked to stop; several agree on it at every tenth step, so that all stop at one."""
        if self.accelerator.num_processes == 1:
            return bool(asked)
        if self.step % 10 and self.step != self.config.steps:
            return False
        return bool(self.total(torch.tensor([float(len(asked))], device=self.device)) > 0)

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        return self.accelerator.reduce(values, reduction="sum")

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

    def _record(self, losses: Any) -> dict:
        """One line of metrics.jsonl; the only place where training waits for the device."""
        config = self.config
        record: dict = {"step": self.step, "tokens": self.step * config.batch_size * self.blocks.shape[1]}
        record["tokens"] *= self.accelerator.num_processes * config.accumulate
        record |= {name: value.tolist() for name, value in losses._asdict().items() if value is not None}
        record["grad_rms"] = float(self.grad_rms)
        record["lr"] = self.optimizers["main"].param_groups[0]["lr"]
        record["nonzero_fraction"] = annealed_fraction(
            config.sparsity.nonzero_fraction, config.sparsity, self.step / config.steps
        )
        return record

    @torch.no_grad()
    def where_not_finite(self, tokens: Int[Tensor, "batch pos"]) -> str:
        """What, on the CPU, is not finite first in the passes over a batch."""
        return sublayer_not_finite(self.sparse, tokens) or "an activation"

    def _check_finite(self, losses: Any, step: int) -> None:
        """Raise TrainingDiverged for a loss term of a step, counted from 1, that is not finite."""
        for name, value in losses._asdict().items():
            finite = torch.ones(()) if value is None else value.isfinite()
            if not finite.all():
                self._refuse(f"{name} at site {int((~finite).nonzero()[0])}" if value.ndim else name, step)

    def _check_state(self) -> None:
        """Raise TrainingDiverged where a parameter or an optimizer's number is not finite after the last step."""
        self._refuse(first_not_finite(state_of(self.modules, self.optimizers.values())), self.step)

    def _refuse(self, name: str | None, step: int) -> None:
        if name is not None:
            raise TrainingDiverged(self._diverged(f"{name} is no longer finite", step))

    def _diverged(self, what: str, step: int) -> str:
        cause = first_not_finite(parameters_of(self.modules))
        cause = "" if cause is None or cause in what else f", where {cause} is not finite,"
        rate, free = self._rates(max(0, step - 1))
        return (
            f"{what} in step {step}{cause} at learning rate {rate:.3g} ({free:.3g} for free parameters); the last "
            f"checkpoint in {self.folder} is as it was. Train again with a lower learning rate (optim.lr is "
            f"{self.config.optim.lr:g}, that of free parameters {self.free_rule.lr:g})"
        )

    def save_checkpoint(self) -> None:
        """Write a checkpoint below FOLDER/checkpoint: weights, moments, step. The one before it stays.

        Raises TrainingDiverged instead where one of these numbers is not finite.
        """
        self._check_state()
        if self.accelerator.is_main_process:
            state = {"step": self.step, "scaler": self.scaler.state_dict(), "identity": self.identity}
            self.checkpoints.save(self.config, state)
        self.accelerator.wait_for_everyone()

    def load_checkpoint(self) -> bool:
        """Restore the last checkpoint that is whole; false where there is none.

        Raises ValueError as `sparse_model.training.checkpoints.Checkpoints.load`.
        """
        state = self.checkpoints.load(self.config, self.config.steps, self.identity)
        if state is None:
            return False
        self.step = state["step"]
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        return True

    @cached_property
    def identity(self) -> Identity:
        """What decides the weights besides the settings."""
        return {**versions(), "corpus": digest_of([self.blocks]), "processes": self.accelerator.num_processes}

    def remove_checkpoint(self) -> None:
        """Drop the checkpoints once the final weights are saved."""
        if self.accelerator.is_main_process:
            self.checkpoints.remove()


def sublayer_not_finite(sparse: SparseTransformer, tokens: Int[Tensor, "batch pos"]) -> str | None:
    """The first sublayer in which top-k meets NaN, on the CPU."""
    resid = sparse.embed(tokens)
    for i in range(2 * sparse.n_layers):
        try:
            resid = sparse.sublayer(i, resid)
        except NotFiniteError:
            return f"an activation of {('attn', 'mlp')[i % 2]}.{i // 2}"
    return None


def mean_losses(batches: list[Any]) -> Any:
    """The mean of several batches' losses, term by term, over the batches that have the term."""
    terms = zip(*batches, strict=True)
    kept = [[value for value in values if value is not None] for values in terms]
    return type(batches[0])(*(torch.stack(values).mean(0) if values else None for values in kept))


def projected_parameters(sparse: SparseTransformer, config: TrainConfig) -> list[SparseParameter]:
    """The parameters under projection with their final fractions.

    Raises ValueError where a budget cannot hold the minimum per neuron, naming the smallest one that can.
    """
    sparsity = config.sparsity
    parameters = sparse.sparse_parameters(sparsity.nonzero_fraction, sparsity.embed_fraction, sparsity.bias_fraction)
    check_budgets(parameters, sparsity)
    return parameters


def check_budgets_of(config: TrainConfig) -> None:
    """Raise what `projected_parameters` raises, before any model is made."""
    with torch.device("meta"):
        projected_parameters(SparseTransformer(config.sparse), config)

"""Training the small GPT-2 of the embedded default: a plain Hugging Face model, saved in Hugging Face format."""

import logging
import math
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerFast

from bridges.config import DenseTrainConfig, RunConfig
from bridges.loading import quiet
from sparse_model.data.batch_order import BatchOrder
from sparse_model.data.tokenizer import save_tokenizer
from sparse_model.io.atomic import replace_folder
from sparse_model.io.progress import progress_bar
from sparse_model.io.tensors import to_device
from sparse_model.training.checkpoints import Checkpoints
from sparse_model.training.finite import TrainingDiverged, first_not_finite, gradients_of, state_of
from sparse_model.training.identity import Identity, digest_of, versions
from sparse_model.training.interrupts import Interrupted, stop_signals
from sparse_model.training.losses import next_token_loss
from sparse_model.training.optim import set_lr

logger = logging.getLogger(__name__)

DENSE_CHECKPOINT = "dense-checkpoint"
_OTHERS_LR = 3e-3
"""Peak learning rate of what Muon does not train: embeddings, biases, gains."""


def train_dense(
    config: RunConfig,
    blocks: Tensor,
    tokenizer: PreTrainedTokenizerFast,
    device: torch.device,
    *,
    folder: Path | None = None,
    progress: bool = True,
) -> GPT2LMHeadModel:
    """Train a GPT-2 of the sparse model's depth, context and vocabulary on `blocks` [block, n_ctx].

    AdamW 3e-3 by default, gradient norm clipped to 1, 2 % warm-up, cosine decay to a tenth; bf16 autocast on CUDA, and
    on CPUs where asked for. No dropout: with well under one pass over enough text there is nothing to regularise, and
    the bridged model is used in eval mode. Goes on from the last checkpoint in `folder`, where there is one, and keeps
    its own there.

    Raises TrainingDiverged where a number is no longer finite, Interrupted on a signal, after a checkpoint, and
    ValueError for a checkpoint that is damaged or made from something else.
    """
    training = _DenseTraining(config, blocks, tokenizer, device, folder)
    options = config.dense_train
    bar = progress_bar(total=options.steps, initial=training.step, desc="dense", unit="step", disable=not progress)
    with stop_signals() as stop_asked, bar:
        while training.step < options.steps:
            loss = training.train_step()
            last = training.step == options.steps
            if (training.step - 1) % config.log_every == 0 or last:
                training.check(loss)
                bar.set_postfix_str(f"ce {loss.item():.3f}")
            bar.update()
            if (training.step % config.checkpoint_every == 0 and not last) or stop_asked:
                training.save_checkpoint(loss)
            if stop_asked:
                kept = "go on with --resume" if folder else "nothing of it is kept"
                raise Interrupted(f"stopped at step {training.step} of the dense model's training; {kept}")
    return training.model.eval()


class _DenseTraining:
    """The model with its optimizer, and the step where it stands."""

    def __init__(
        self,
        config: RunConfig,
        blocks: Tensor,
        tokenizer: PreTrainedTokenizerFast,
        device: torch.device,
        folder: Path | None,
    ) -> None:
        self.config, self.options, self.blocks, self.device = config, config.dense_train, blocks, device
        torch.manual_seed(self.options.seed)
        self.model = _new_gpt2(config, tokenizer.eos_token_id).to(device)  # type: ignore[arg-type]
        self.model.set_attn_implementation("sdpa")
        self.model.train()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizers = _optimizers(self.model, self.options)
        self.bf16 = device.type == "cuda" or (device.type == "cpu" and self.options.bf16_on_cpu and _has_bf16())
        self.order = BatchOrder(len(blocks), self.options.batch_size, self.options.seed)
        self.modules, self.step = {"dense": self.model}, 0
        self.checkpoints = None
        if folder is not None:
            self.checkpoints = Checkpoints(folder / DENSE_CHECKPOINT, self.modules, self.optimizers)
            shape = f"{config.sparse.n_layers} layers, context {config.sparse.n_ctx}, {config.sparse.d_vocab} tokens"
            self.identity: Identity = {**versions(), "corpus": digest_of([blocks]), "shape": shape}
            state = self.checkpoints.load(self.options, self.options.steps, self.identity)
            if state is not None:
                self.step = state["step"]
                logger.info("resuming the dense model's training at step %d of %d", self.step, self.options.steps)

    def train_step(self) -> Tensor:
        """One optimizer step on the next batch; returns its loss on the device."""
        for optimizer in self.optimizers.values():
            set_lr(optimizer, optimizer.defaults["lr"] * dense_rate(self.step, self.options.steps))
        tokens = to_device(self.blocks[self.order(self.step)].long(), self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            loss = next_token_loss(self.model(tokens).logits, tokens)
        loss.backward()
        if self.device.type == "cpu":  # elsewhere reading a number waits for the device
            self._refuse("the loss" if not loss.isfinite() else first_not_finite(gradients_of(self.modules)))
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss.detach()

    def check(self, loss: Tensor) -> None:
        """Raise TrainingDiverged where the last step's loss, or a number that it left, is not finite."""
        named = [("the loss", loss), *state_of(self.modules, self.optimizers.values())]
        self._refuse(first_not_finite(named), self.step - 1)

    def save_checkpoint(self, loss: Tensor) -> None:
        """Keep the state where it is finite."""
        self.check(loss)
        if self.checkpoints is not None:
            self.checkpoints.save(self.options, {"step": self.step, "identity": self.identity})

    def _refuse(self, name: str | None, step: int | None = None) -> None:
        step = self.step if step is None else step
        if name is not None:
            rate = self.options.lr * dense_rate(step, self.options.steps)
            raise TrainingDiverged(
                f"{name} of the dense model's training is no longer finite in step {step + 1} at learning rate "
                f"{rate:.3g}; the last checkpoint is as it was: train again with a lower "
                f"dense_train.lr={self.options.lr:g}"
            )


def _has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 numbers; elsewhere torch emulates that."""
    found = torch.cpu.get_capabilities()
    if found.get("avx512_bf16") or found.get("amx_bf16"):
        return True
    logger.info("this CPU has no instructions for bfloat16: dense_train.bf16_on_cpu is left aside, float32 it is")
    return False


def _optimizers(model: GPT2LMHeadModel, options: DenseTrainConfig) -> dict[str, torch.optim.Optimizer]:
    """One for each learning rate, by name."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if options.optimizer == "adamw":
        return {"dense": torch.optim.AdamW(parameters, options.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)}
    matrices = [p for p in model.transformer.h.parameters() if p.ndim == 2]
    others = [p for p in parameters if not any(p is matrix for matrix in matrices)]
    return {
        "matrices": torch.optim.Muon(matrices, options.lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        "others": torch.optim.AdamW(others, _OTHERS_LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    }


def small_gpt2(config: RunConfig, end_of_text: int | None = None) -> GPT2Config:
    """The configuration of the GPT-2 that a run trains for itself."""
    return GPT2Config(
        vocab_size=config.sparse.d_vocab,
        n_positions=config.sparse.n_ctx,
        n_embd=config.dense_train.d_model,
        n_layer=config.sparse.n_layers,
        n_head=config.dense_train.n_heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
    )


def _new_gpt2(config: RunConfig, end_of_text: int | None) -> GPT2LMHeadModel:
    model = GPT2LMHeadModel(small_gpt2(config, end_of_text))
    if not config.dense_train.positions:
        model.transformer.wpe.weight.data.zero_()
        model.transformer.wpe.requires_grad_(False)
    return model


def dense_rate(step: int, steps: int) -> float:
    """Factor on the dense model's learning rate: linear rise over 2 % of the steps, times a cosine from 1 to 0.1."""
    warmup = max(1, round(0.02 * steps))
    return min(1.0, (step + 1) / warmup) * (0.55 + 0.45 * math.cos(math.pi * step / steps))


def save_dense(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write model and tokenizer as one Hugging Face folder, by way of a temporary name."""
    with replace_folder(folder) as temporary:
        with quiet():
            model.save_pretrained(temporary)
        save_tokenizer(tokenizer, temporary / "tokenizer")
        for file in (temporary / "tokenizer").iterdir():
            file.rename(temporary / file.name)
        (temporary / "tokenizer").rmdir()

"""Training the small GPT-2 of the embedded default: a plain Hugging Face model, saved in Hugging Face format."""

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerFast

from bridges.config import RunConfig
from sparse_model.data.batch_order import BatchOrder
from sparse_model.data.tokenizer import save_tokenizer
from sparse_model.io.atomic import replace_folder
from sparse_model.io.tensors import to_device
from sparse_model.training.losses import next_token_loss
from sparse_model.training.optim import set_lr
from sparse_model.training.trainer import TrainingDiverged


def train_dense(
    config: RunConfig,
    blocks: Tensor,
    tokenizer: PreTrainedTokenizerFast,
    device: torch.device,
    *,
    progress: bool = True,
) -> GPT2LMHeadModel:
    """Train a GPT-2 of the sparse model's depth, context and vocabulary on `blocks` [block, n_ctx].

    AdamW 3e-3 by default, gradient norm clipped to 1, 2 % warm-up, cosine decay to a tenth; bf16 autocast on CUDA.
    No dropout: with well under one pass over enough text there is nothing to regularise, and the bridged model is used
    in eval mode. Raises TrainingDiverged where the loss is no longer finite.
    """
    options = config.dense_train
    torch.manual_seed(options.seed)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.sparse.d_vocab,
            n_positions=config.sparse.n_ctx,
            n_embd=options.d_model,
            n_layer=config.sparse.n_layers,
            n_head=options.n_heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    if not options.positions:
        model.transformer.wpe.weight.data.zero_()
        model.transformer.wpe.requires_grad_(False)
    model.to(device)  # type: ignore[arg-type]
    model.set_attn_implementation("sdpa")
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=options.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    order = BatchOrder(len(blocks), options.batch_size, options.seed)
    bar = tqdm(range(options.steps), desc="dense", unit="step", disable=not progress)
    for step in bar:
        set_lr(optimizer, options.lr * dense_rate(step, options.steps))
        tokens = to_device(blocks[order(step)].long(), device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = next_token_loss(model(tokens).logits, tokens)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % config.log_every == 0 or step == options.steps - 1:
            value = loss.item()
            if not math.isfinite(value):
                raise TrainingDiverged(f"dense loss is {value} at step {step}: lower dense_train.lr={options.lr:g}")
            bar.set_postfix_str(f"ce {value:.3f}")
    return model.eval()


def dense_rate(step: int, steps: int) -> float:
    """Factor on the dense model's learning rate: linear rise over 2 % of the steps, times a cosine from 1 to 0.1."""
    warmup = max(1, round(0.02 * steps))
    return min(1.0, (step + 1) / warmup) * (0.55 + 0.45 * math.cos(math.pi * step / steps))


def save_dense(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write model and tokenizer as one Hugging Face folder, by way of a temporary name."""
    with replace_folder(folder) as temporary:
        model.save_pretrained(temporary)
        save_tokenizer(tokenizer, temporary / "tokenizer")
        for file in (temporary / "tokenizer").iterdir():
            file.rename(temporary / file.name)
        (temporary / "tokenizer").rmdir()

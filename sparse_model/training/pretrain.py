"""Training a weight-sparse model alone: tokenizer, corpus, training with validation, the saved model.

A folder holds `config.json`, `tokenizer/`, `sparse/` (weights and their config), `metrics.jsonl` and `metrics.json`.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from sparse_model.config import TrainConfig, claim_folder
from sparse_model.data.prepare import check_corpus, prepare_corpus, tokenizer_documents
from sparse_model.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from sparse_model.io.atomic import write_text
from sparse_model.model.checkpoint import save_sparse
from sparse_model.model.transformer import SparseTransformer
from sparse_model.sparsity.projection import prove_sparsity
from sparse_model.training.accelerator import ending, make_accelerator, start_trackers
from sparse_model.training.losses import next_token_loss
from sparse_model.training.trainer import SparseTrainer, projected_parameters


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainConfig):
    """Training a sparse model alone."""


class ValidatedTrainer(SparseTrainer):
    """A `SparseTrainer` that also records the loss on held-out blocks at every checkpoint and at the end."""

    def __init__(self, *args, validation: Int[Tensor, "block pos"], **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.validation = validation

    def extra_record(self) -> dict[str, float]:
        """`val_ce` where a checkpoint is due."""
        if self.step % self.config.checkpoint_every and self.step != self.config.steps:
            return {}
        return {"val_ce": held_out_loss(self.sparse, self.validation)}


@torch.no_grad()
def held_out_loss(model: SparseTransformer, blocks: Int[Tensor, "block pos"], batch_size: int = 32) -> float:
    """Next-token cross-entropy on blocks of tokens, nats, mean over tokens."""
    device = next(model.parameters()).device
    losses = [
        next_token_loss(model(b.long().to(device)), b.long().to(device)) * len(b) for b in blocks.split(batch_size)
    ]
    return float(torch.stack(losses).sum() / len(blocks))


def pretrain(
    config: PretrainConfig,
    folder: Path,
    *,
    resume: bool = False,
    trackers: tuple[str, ...] = (),
    processes: int | None = None,
    progress: bool = True,
) -> dict:
    """Train a sparse model in `folder`; returns what metrics.json holds.

    Raises FileExistsError where the folder holds a model and `resume` is not set, ValueError where it holds one of
    other settings or a tokenizer does not fit, and what training raises.
    """
    check_corpus(config)
    accelerator = make_accelerator(folder, trackers, processes)
    if accelerator.is_main_process:
        claim_folder(config, folder, resume)
    start_trackers(accelerator, folder)
    with accelerator.main_process_first():
        tokenizer_folder = folder / "tokenizer"
        if tokenizer_folder.exists() or config.tokenizer:
            tokenizer = load_tokenizer(tokenizer_folder if tokenizer_folder.exists() else config.tokenizer or "")
        else:
            tokenizer = train_tokenizer(tokenizer_documents(config), config.sparse.d_vocab)
        if len(tokenizer) > config.sparse.d_vocab:
            raise ValueError(f"sparse.d_vocab={config.sparse.d_vocab}: the tokenizer has {len(tokenizer)} tokens")
        save_tokenizer(tokenizer, tokenizer_folder)
        blocks = prepare_corpus(config, tokenizer, progress=progress and accelerator.is_main_process)
    validation = blocks.val[: max(1, config.eval_tokens // config.sparse.n_ctx)]
    torch.manual_seed(config.seed)
    model = SparseTransformer(config.sparse)
    trainer = ValidatedTrainer(config, model, blocks.train, folder, accelerator, validation=validation)
    if resume and trainer.load_checkpoint() and accelerator.is_main_process:
        print(f"resuming at step {trainer.step} of {config.steps}")
    with ending(accelerator):
        trainer.train(progress=progress)
    if not accelerator.is_main_process:
        return {}
    counts = prove_sparsity(projected_parameters(model, config), config.sparsity)
    figures = {
        "val_ce": held_out_loss(model, validation),
        "nonzeros": sum(c.nonzeros for c in counts),
        "nonzero_fraction": sum(c.nonzeros for c in counts) / sum(c.entries for c in counts),
    }
    model.measured = {"held-out cross-entropy, nats": figures["val_ce"], "corpus": config.corpus, "steps": config.steps}
    save_sparse(model, folder / "sparse")
    trainer.remove_checkpoint()
    metrics = figures | {"corpus": blocks.report}
    write_text(folder / "metrics.json", json.dumps(metrics, indent=1) + "\n")
    return metrics

"""Training a weight-sparse model alone: tokenizer, corpus, training with validation, the saved model.

A folder holds `config.json`, `tokenizer/`, `sparse/` (weights and their config), `metrics.jsonl` and `metrics.json`.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from sparse_model.config import TrainConfig, check_folder, claim_folder
from sparse_model.data.prepare import (
    check_corpus,
    check_vocabulary,
    prepare_corpus,
    say_what_is_left_out,
    tokenizer_documents,
)
from sparse_model.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from sparse_model.io.atomic import write_text
from sparse_model.io.reading import read_json
from sparse_model.model.checkpoint import save_sparse
from sparse_model.model.transformer import SparseTransformer
from sparse_model.sparsity.projection import prove_sparsity
from sparse_model.training.accelerator import ending, make_accelerator, start_trackers, training_in
from sparse_model.training.bigram_counts import count_bigrams
from sparse_model.training.identity import keep_identity, run_identity
from sparse_model.training.interrupts import NOTHING_WRITTEN, RESUMES, interruptible
from sparse_model.training.losses import next_token_loss
from sparse_model.training.trainer import SparseTrainer, check_budgets_of

logger = logging.getLogger(__name__)


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
    device: str | None = None,
    progress: bool = True,
) -> dict:
    """Train a sparse model in `folder`; returns what metrics.json holds.

    Raises FileExistsError where the folder holds a model and `resume` is not set, ValueError where it holds one of
    other settings or a tokenizer does not fit, and what training raises. A start that is refused writes nothing there.
    """
    accelerator = make_accelerator(folder, trackers, processes, device)
    with training_in(folder, accelerator, lambda: check_folder(config, folder, resume)):
        return _pretrain(config, folder, accelerator, resume, progress)


def _pretrain(config: PretrainConfig, folder: Path, accelerator: Accelerator, resume: bool, progress: bool) -> dict:
    main, trained = accelerator.is_main_process, folder / "sparse"
    with interruptible(RESUMES), accelerator.main_process_first():
        with interruptible(NOTHING_WRITTEN):
            check_corpus(config)
            check_budgets_of(config)
            tokenizer = _tokenizer(config, folder)
            check_vocabulary(tokenizer, config.sparse)
            blocks = prepare_corpus(config, tokenizer, progress=progress and main)
        if main:
            say_what_is_left_out(blocks)
            claim_folder(config, folder, resume)
            keep_identity(folder, run_identity(blocks, tokenizer, accelerator.num_processes))
            if not (folder / "tokenizer").exists():
                save_tokenizer(tokenizer, folder / "tokenizer")
    start_trackers(accelerator, folder)
    validation = blocks.val[: max(1, config.eval_tokens // config.sparse.n_ctx)]
    torch.manual_seed(config.seed)
    model = SparseTransformer(config.sparse)
    count_bigrams(model, config, blocks.train)
    trainer = ValidatedTrainer(config, model, blocks.train, folder, accelerator, validation=validation)
    if trained.exists():  # written last
        trainer.remove_checkpoint()
        return read_json(folder / "metrics.json", "train in another folder", finite=False) if main else {}
    if resume and trainer.load_checkpoint() and main:
        logger.info("resuming at step %d of %d", trainer.step, config.steps)
    with ending(accelerator):
        trainer.train(progress=progress)
    if not main:
        return {}
    with interruptible(RESUMES):
        metrics = _figures(trainer, validation) | {"corpus": blocks.report}
        model.measured = {"held-out cross-entropy, nats": metrics["val_ce"], "corpus": config.corpus}
        model.measured |= {"steps": config.steps}
        write_text(folder / "metrics.json", json.dumps(metrics, indent=1) + "\n")
        save_sparse(model, trained)
        trainer.remove_checkpoint()
    return metrics


def _tokenizer(config: PretrainConfig, folder: Path) -> PreTrainedTokenizerFast:
    """The folder's tokenizer, the one named, or a BPE trained on the corpus."""
    kept = folder / "tokenizer"
    if kept.exists() or config.tokenizer:
        return load_tokenizer(kept if kept.exists() else config.tokenizer or "")
    return train_tokenizer(tokenizer_documents(config), config.sparse.d_vocab)


def _figures(trainer: ValidatedTrainer, validation: Int[Tensor, "block pos"]) -> dict[str, float]:
    """Held-out loss and nonzeros; the latter are proved to be within their budgets."""
    counts = prove_sparsity(trainer.projected, trainer.config.sparsity)
    nonzeros = sum(count.nonzeros for count in counts)
    return {
        "val_ce": held_out_loss(trainer.sparse, validation),
        "nonzeros": nonzeros,
        "nonzero_fraction": nonzeros / sum(count.entries for count in counts),
    }

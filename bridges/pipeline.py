"""The main job up to the evaluation: tokenizer, corpus, dense model, joint training, metrics.

1. Tokenizer, corpus blocks and dense model are made, or taken from the run folder where --resume finds them.
2. Sparse model and bridges are trained jointly (`bridges.joint_trainer`).
3. The result is evaluated on held-out text and saved.
"""

import logging
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from jaxtyping import Int
from torch import Tensor

from bridges import run_folder as run_folder
from bridges.config import KEPT, RunConfig
from bridges.dense import DenseModel, cast_parameters
from bridges.dense_start import DENSE, begin_as_dense
from bridges.dense_training import DENSE_CHECKPOINT
from bridges.evaluation import evaluate, evaluation_table
from bridges.joint_trainer import JointTrainer
from bridges.scales import measure_scales
from bridges.self_text import keep_samples, share_of_self
from sparse_model.config import check_folder, claim_folder, to_json
from sparse_model.data.prepare import prepare_corpus, say_what_is_left_out
from sparse_model.data.tokenizer import save_tokenizer
from sparse_model.io.lock import one_writer
from sparse_model.io.manifest import FILE as MANIFEST
from sparse_model.model.device import default_device
from sparse_model.model.transformer import SparseTransformer
from sparse_model.model.weight_files import write_measured
from sparse_model.sparsity.projection import prove_sparsity
from sparse_model.training.accelerator import ending, make_accelerator, start_trackers, training_in
from sparse_model.training.bigram_counts import count_bigrams
from sparse_model.training.identity import digest_of, keep_identity, run_identity
from sparse_model.training.interrupts import NOTHING_WRITTEN, RESUMES, interruptible
from sparse_model.training.losses import next_token_loss

logger = logging.getLogger(__name__)


def train_bridge(
    config: RunConfig,
    folder: str | Path,
    *,
    resume: bool = False,
    trackers: tuple[str, ...] = (),
    processes: int | None = None,
    device: str | None = None,
    progress: bool = True,
) -> dict:
    """Train a sparse model and bridges beside a frozen dense model in `folder`; returns what metrics.json holds.

    device: cpu, cuda or cuda:N; None: a CUDA device where there is one.

    Raises FileExistsError where the folder already holds a run and `resume` is not set, ValueError where it holds one
    of another configuration, and what training raises. A start that is refused writes nothing there.
    """
    folder = Path(folder)
    accelerator = make_accelerator(folder, trackers, processes, device)
    with training_in(folder, accelerator, lambda: check_start(config, folder, resume)):
        return _train_bridge(config, folder, accelerator, resume, progress and accelerator.is_main_process)


def check_start(config: RunConfig, folder: Path, resume: bool) -> None:
    """Raise where a folder holds what a training of this configuration must not overwrite."""
    check_folder(config, folder, resume)
    run_folder.check_unfinished(folder, resume)


def _train_bridge(config: RunConfig, folder: Path, accelerator: Accelerator, resume: bool, progress: bool) -> dict:
    main = accelerator.is_main_process
    with interruptible(RESUMES), accelerator.main_process_first():
        with interruptible(NOTHING_WRITTEN):
            parts = run_folder.check_parts(config, folder, accelerator.device, progress=progress)
        if main:
            say_what_is_left_out(parts.blocks)
            claim_folder(config, folder, resume)
            if parts.samples is not None:
                keep_samples(parts.samples, folder)
            keep_identity(folder, run_identity(parts.blocks, parts.tokenizer, accelerator.num_processes))
            if not (folder / "tokenizer").exists():
                save_tokenizer(parts.tokenizer, folder / "tokenizer")
    start_trackers(accelerator, folder)
    with interruptible(RESUMES), accelerator.main_process_first():
        started = time.monotonic()
        hf = run_folder.prepare_dense(config, folder, parts, accelerator.device, progress=progress)
        if main:
            keep_identity(folder, {"dense": digest_of(hf.parameters())})
        dense_seconds = time.monotonic() - started
    blocks = parts.blocks
    torch.manual_seed(config.seed)
    cast_parameters(hf, getattr(torch, config.dense_dtype))
    dense, sparse = DenseModel(hf), parts.sparse or _new_sparse(config, blocks.train)
    bridges = run_folder.new_bridges(config, dense.d_model)
    if config.start_from == DENSE and not run_folder.has_begun(folder):
        begin_as_dense(sparse, bridges, hf, blocks.train, config.sparsity, progress=progress)
    trainer = JointTrainer(config, dense, sparse, bridges, blocks.train, folder, accelerator)
    if (folder / "bridges").exists():  # written last
        return _finish(trainer, run_folder.open_run(folder), blocks.val, progress) if main else {}
    if resume and trainer.load_checkpoint() and main:
        logger.info("resuming at step %d of %d", trainer.step, config.steps)
    started = time.monotonic()
    with ending(accelerator):
        trainer.train(progress=progress)
    joint_seconds = time.monotonic() - started
    if not main:
        return {}
    prove_sparsity(trainer.projected, config.sparsity)
    run = run_folder.Run(folder, config, parts.tokenizer, dense.float(), sparse.eval(), bridges)
    with interruptible(RESUMES):
        measure_scales(run.dense, sparse, bridges, held_out_blocks(config, blocks.val))
        training = {
            "dense_seconds": round(dense_seconds, 1),
            "joint_seconds": round(joint_seconds, 1),
            "steps": config.steps,
            "processes": accelerator.num_processes,
            "device": str(accelerator.device),
            "threads": torch.get_num_threads(),
            "corpus": blocks.report,
        }
        run_folder.update_metrics(folder, training=training)
        run_folder.save_trained(folder, sparse, bridges)
    return _finish(trainer, run, blocks.val, progress)


def _new_sparse(config: RunConfig, blocks: Int[Tensor, "block pos"]) -> SparseTransformer:
    sparse = SparseTransformer(config.sparse)
    count_bigrams(sparse, config, blocks)
    return sparse


def make_dense(
    config: RunConfig, folder: Path, *, resume: bool = False, device: str | None = None, progress: bool = True
) -> float:
    """Make the run's tokenizer and dense model only; returns its cross-entropy on held-out text, nats.

    Raises FileExistsError where the training of one was stopped and `resume` is not set, and what training raises.
    """
    where = default_device(device)
    with training_in(folder, None, lambda: run_folder.check_unfinished(folder, resume)):
        with interruptible(NOTHING_WRITTEN):
            parts = run_folder.check_parts(config, folder, where, progress=progress)
            say_what_is_left_out(parts.blocks)
            if not (folder / "tokenizer").exists():
                save_tokenizer(parts.tokenizer, folder / "tokenizer")
            _keep_dense_config(config, folder)
        if parts.dense is not None and config.dense is None:
            logger.info("taking the dense model that is in %s", folder / "dense")
        with interruptible(RESUMES):
            hf = run_folder.prepare_dense(config, folder, parts, where, progress=progress)
            return _held_out_loss(DenseModel(hf).to(where), held_out_blocks(config, parts.blocks.val))


def _keep_dense_config(config: RunConfig, folder: Path) -> None:
    """Keep the configuration of the dense model's training, that of one that has begun as it is."""
    path = folder / KEPT[1]
    begun = any((folder / part).exists() for part in ("dense", DENSE_CHECKPOINT))
    if not (begun and path.exists()):
        to_json(config, path)


@torch.no_grad()
def _held_out_loss(dense: DenseModel, blocks: Int[Tensor, "block pos"]) -> float:
    device = next(dense.parameters()).device
    batches = blocks.long().to(device).split(32)
    losses = [next_token_loss(dense(tokens), tokens) * len(tokens) for tokens in batches]
    return float(torch.stack(losses).sum() / len(blocks))


def held_out_blocks(config: RunConfig, val: Int[Tensor, "block pos"]) -> Int[Tensor, "held_out pos"]:
    """The held-out blocks on which a run is measured when its training ends."""
    return val[: max(1, config.eval_tokens // config.sparse.n_ctx)]


def _finish(trainer: JointTrainer, run: run_folder.Run, val: Int[Tensor, "block pos"], progress: bool) -> dict:
    """What follows once sparse/ and bridges/ are written; a run that was killed meanwhile comes here again."""
    trainer.remove_checkpoint()
    if not (run.folder / MANIFEST).exists():
        run_folder.write_digests(run.folder)
    with interruptible(f"{run.folder} is trained, and not evaluated: --resume does that"):
        metrics = evaluate_run(run, blocks=val, text=run.config.corpus, progress=progress)
        run.sparse.measured = card_figures(metrics) | {"corpus": run.config.corpus, "steps": run.config.steps}
        write_measured(run.sparse.measured, run.folder / "sparse")
    logger.info("%s", evaluation_table(metrics))
    return metrics


def evaluate_run(
    run: run_folder.Run,
    *,
    tokens: int | None = None,
    blocks: Tensor | None = None,
    text: str = "blocks of the caller's",
    progress: bool = True,
) -> dict:
    """Evaluate a run on held-out text and set metrics.json, nothing else; returns the metrics.

    tokens: how many; None: as many as the run's config says. blocks: of them [block, pos]; None: the run's own corpus.
    text: what the blocks are of, for the record.

    Raises InUse where another process writes into the run.
    """
    with one_writer(run.folder):
        if blocks is None:
            blocks = prepare_corpus(run.config, run.tokenizer, samples=run.samples, progress=progress).val
            text = run.config.corpus
        n_blocks = max(1, (tokens or run.config.eval_tokens) // blocks.shape[1])
        metrics = evaluate(run.dense, run.sparse, run.bridges, blocks[:n_blocks], progress=progress)
        metrics["held_out_text"] = text_in_words(text, run.config)
        run_folder.update_metrics(run.folder, **metrics)
    return metrics


def text_in_words(text: str, config: RunConfig) -> str:
    """What figures stand on: the corpus, and where the dense model's own text is in it, how that was drawn."""
    if text != config.corpus or not share_of_self(text):
        return text
    begin = f"from prompts in {config.samples.prompts}" if config.samples.prompts else "from the beginning of a text"
    return f"{text}, where self was sampled from {config.dense} {begin} at temperature {config.samples.temperature:g}"


def card_figures(metrics: dict) -> dict[str, float]:
    """The figures of an evaluation that stand in the sparse model's card."""
    sites = metrics["sites"]
    means = {
        "NMSE of the encoders, mean over sites": "nmse_encode",
        "NMSE of the decoders": "nmse_decode",
        "KL of the hybrids, dense to sparse, nats": "kl_dense_to_sparse",
        "KL of the hybrids, sparse to dense, nats": "kl_sparse_to_dense",
    }
    return {
        "held-out cross-entropy, nats": metrics["sparse"]["ce"],
        "that of the dense model it is bridged to": metrics["dense"]["ce"],
    } | {title: sum(site[name] for site in sites) / len(sites) for title, name in means.items()}

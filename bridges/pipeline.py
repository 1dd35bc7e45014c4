"""The main job up to the evaluation: tokenizer, corpus, dense model, joint training, metrics.

1. Tokenizer, corpus blocks and dense model are made, or taken from the run folder where --resume finds them.
2. Sparse model and bridges are trained jointly (`bridges.joint_trainer`).
3. The result is evaluated on held-out text and saved.
"""

import time
from pathlib import Path

import torch
from torch import Tensor

from bridges import run_folder as run_folder
from bridges.config import RunConfig
from bridges.dense import DenseModel
from bridges.evaluation import evaluate, evaluation_table
from bridges.joint_trainer import JointTrainer
from sparse_model.config import claim_folder
from sparse_model.data.prepare import check_corpus, prepare_corpus
from sparse_model.model.transformer import SparseTransformer
from sparse_model.model.weight_files import write_measured
from sparse_model.sparsity.projection import prove_sparsity
from sparse_model.training.accelerator import ending, make_accelerator, start_trackers
from sparse_model.training.losses import next_token_loss
from sparse_model.training.trainer import CHECKPOINT


def train_run(
    config: RunConfig,
    folder: Path,
    *,
    resume: bool = False,
    trackers: tuple[str, ...] = (),
    processes: int | None = None,
    progress: bool = True,
) -> dict:
    """Make the run in `folder`; returns the metrics that metrics.json holds.

    Raises FileExistsError where the folder already holds a run and `resume` is not set, ValueError where it holds one
    of another configuration, and what training raises.
    """
    check_corpus(config)
    accelerator = make_accelerator(folder, trackers, processes)
    if accelerator.is_main_process:
        claim_folder(config, folder, resume)
    start_trackers(accelerator, folder)
    progress = progress and accelerator.is_main_process
    with accelerator.main_process_first():
        tokenizer = run_folder.prepare_tokenizer(config, folder)
        blocks = prepare_corpus(config, tokenizer, progress=progress)
        started = time.monotonic()
        hf = run_folder.prepare_dense(config, folder, tokenizer, blocks, accelerator.device, progress=progress)
        dense_seconds = time.monotonic() - started
    if (folder / "bridges").exists() and not (folder / CHECKPOINT).exists():
        return _finish(run_folder.open_run(folder), blocks.val, progress)
    torch.manual_seed(config.seed)
    dense, sparse = DenseModel(hf.to(getattr(torch, config.dense_dtype))), SparseTransformer(config.sparse)
    bridges = run_folder.new_bridges(config, dense.d_model)
    trainer = JointTrainer(config, dense, sparse, bridges, blocks.train, folder, accelerator)
    if resume and trainer.load_checkpoint() and accelerator.is_main_process:
        print(f"resuming at step {trainer.step} of {config.steps}")
    started = time.monotonic()
    with ending(accelerator):
        trainer.train(progress=progress)
    joint_seconds = time.monotonic() - started
    if not accelerator.is_main_process:
        return {}
    prove_sparsity(trainer.projected, config.sparsity)
    run_folder.save_trained(folder, sparse, bridges)
    trainer.remove_checkpoint()
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
    return _finish(
        run_folder.Run(folder, config, tokenizer, dense.float(), sparse.eval(), bridges), blocks.val, progress
    )


@torch.no_grad()
def make_dense(config: RunConfig, folder: Path, *, progress: bool = True) -> float:
    """Make the run's tokenizer and dense model only; returns its cross-entropy on held-out text, nats."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = run_folder.prepare_tokenizer(config, folder)
    blocks = prepare_corpus(config, tokenizer, progress=progress)
    with torch.enable_grad():
        hf = run_folder.prepare_dense(config, folder, tokenizer, blocks, device, progress=progress)
    dense = DenseModel(hf).to(device)
    batches = blocks.val[: max(1, config.eval_tokens // config.sparse.n_ctx)].long().split(32)
    losses = [next_token_loss(dense(tokens.to(device)), tokens.to(device)) * len(tokens) for tokens in batches]
    return float(torch.stack(losses).sum() / sum(len(tokens) for tokens in batches))


def _finish(run: run_folder.Run, val: Tensor, progress: bool) -> dict:
    metrics = evaluate_run(run, val, run.config.eval_tokens, progress=progress)
    print(evaluation_table(metrics))
    return metrics


def evaluate_run(run: run_folder.Run, val: Tensor, eval_tokens: int, *, progress: bool = True) -> dict:
    """Evaluate a run on held-out blocks, save its bridges' scales and metrics.json, and return the metrics."""
    n_blocks = max(1, eval_tokens // val.shape[1])
    metrics = evaluate(run.dense, run.sparse, run.bridges, val[:n_blocks], progress=progress)
    run_folder.save_bridges(run.bridges, run.folder / "bridges")
    run.sparse.measured = card_figures(metrics) | {"corpus": run.config.corpus, "steps": run.config.steps}
    write_measured(run.sparse.measured, run.folder / "sparse")
    run_folder.update_metrics(run.folder, **metrics)
    return metrics


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

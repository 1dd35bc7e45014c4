"""A finished run in half the bytes: weights rounded to what float16 holds, and all that was measured measured again."""

from pathlib import Path

import torch
from torch import Tensor, nn

from bridges.dense_training import save_dense
from bridges.packaged import find_run
from bridges.pipeline import evaluate_run, held_out_blocks
from bridges.run_folder import Run, open_run, read_metrics, save_trained, update_metrics, write_digests
from bridges.scales import measure_scales
from bridges.self_text import keep_samples
from sparse_model.config import to_json
from sparse_model.data.prepare import prepare_corpus
from sparse_model.data.tokenizer import save_tokenizer
from sparse_model.io.atomic import check_writable, replace_folder
from sparse_model.io.narrow import rounded_half, rounded_rows


def halve_run(run: str | Path, out: str | Path, *, device: str = "cpu", progress: bool = True) -> dict:
    """Write a finished run, or a packaged bundle, anew in half precision, and evaluate it; returns the metrics.

    Weights are rounded, the bigram table further, to 8 bits and a scale for each row. All still compute in float32.
    Channels, circuits and steering belong to the weights as they were, and are found anew.

    Raises FileExistsError where `out` is not empty, OSError where it cannot be written, ValueError for weights beyond
    half precision's range, and what `find_run`, `open_run` and reading the run's corpus raise.
    """
    folder = Path(out).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not empty: name another folder for the halved run")
    check_writable(folder)
    source = open_run(find_run(run), device)
    blocks = prepare_corpus(source.config, source.tokenizer, samples=source.samples, progress=progress).val
    for part, model in (("dense", source.dense), ("sparse", source.sparse), ("bridges", source.bridges)):
        round_weights(model, f"{source.folder / part}")
    measure_scales(source.dense, source.sparse, source.bridges, held_out_blocks(source.config, blocks))
    training = read_metrics(source.folder).get("training")
    with replace_folder(folder) as temporary:
        _write(source, temporary)
        if training:
            update_metrics(temporary, training=training)
    return evaluate_run(source._replace(folder=folder), blocks=blocks, text=source.config.corpus, progress=progress)


def _write(run: Run, folder: Path) -> None:
    save_tokenizer(run.tokenizer, folder / "tokenizer")
    save_dense(run.dense.hf.half(), run.tokenizer, folder / "dense")
    run.dense.float()
    to_json(run.config, folder / "config.json")
    if run.samples is not None:
        keep_samples(run.samples, folder)
    save_trained(folder, run.sparse, run.bridges)
    write_digests(folder)


@torch.no_grad()
def round_weights(model: nn.Module, name: str) -> None:
    """Round every parameter in place; ValueError, beginning with the name, for one beyond half precision's range."""
    for key, p in model.named_parameters():
        try:
            p.copy_(_rounded(key, p))
        except ValueError as error:
            raise ValueError(f"{name}: {key} cannot be halved: {error}") from error


def _rounded(key: str, p: Tensor) -> Tensor:
    return rounded_rows(p) if key == "bigram" else rounded_half(p)

"""Small sweeps of weight-sparse training: loss against width and nonzeros, and what each rule of training is worth.

1. A `Variant` is a training configuration under a label; it is trained with every learning rate at the first seed.
2. The rate of lowest held-out loss is kept and trained with the other seeds (the paper sweeps the rate per experiment).
3. Each trained model is measured on held-out text: loss, nonzeros, kurtosis of the final residual stream, dead neurons.

Every training has a folder of its own below the sweep's, so a killed sweep goes on where it stopped.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparse_model.config import SparseConfig
from sparse_model.data.prepare import prepare_corpus, tokenizer_documents
from sparse_model.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from sparse_model.io.atomic import write_text
from sparse_model.io.progress import progress_bar
from sparse_model.io.reading import read_json, typed
from sparse_model.model.checkpoint import load_sparse
from sparse_model.model.transformer import SparseTransformer
from sparse_model.training.finite import TrainingDiverged
from sparse_model.training.pretrain import PretrainConfig, pretrain


class Variant(NamedTuple):
    """One configuration of a sweep, up to learning rate and seed."""

    label: str
    """Its name in tables and folders."""
    config: PretrainConfig
    """How it is trained."""


class Outcome(NamedTuple):
    """One trained and measured model."""

    label: str
    lr: float
    seed: int
    loss: float
    """Held-out next-token cross-entropy, nats; infinite where training diverged."""
    nonzeros: int
    entries: int
    """Of the parameters under projection."""
    kurtosis: float
    """Of the final residual stream, see `kurtosis`."""
    dead_neurons: int
    """MLP neurons that are active at no held-out token."""
    neurons: int


class Job(NamedTuple):
    """One training of a sweep."""

    label: str
    config: PretrainConfig
    folder: Path


def run_sweep(
    variants: list[Variant], rates: tuple[float, ...], seeds: tuple[int, ...], folder: Path, *, jobs: int = 1
) -> dict[str, list[Outcome]]:
    """Train every variant; returns its outcomes at its best rate, one per seed, by label.

    All rates are compared at the first seed. `jobs` processes of one thread each work side by side. Raises ValueError
    where the folder holds outcomes of other settings.
    """
    _shared_tokenizer(variants[0].config, folder / "tokenizer")
    first = {(variant.label, rate): _job(variant, rate, seeds[0], folder) for variant in variants for rate in rates}
    by_rate = dict(zip(first, _run_jobs(list(first.values()), jobs, "rates"), strict=True))
    best = {variant.label: min(rates, key=lambda rate: by_rate[variant.label, rate].loss) for variant in variants}
    others = [_job(variant, best[variant.label], seed, folder) for variant in variants for seed in seeds[1:]]
    outcomes = {variant.label: [by_rate[variant.label, best[variant.label]]] for variant in variants}
    for outcome in _run_jobs(others, jobs, "seeds"):
        outcomes[outcome.label].append(outcome)
    return outcomes


def _job(variant: Variant, rate: float, seed: int, folder: Path) -> Job:
    config = dataclasses.replace(
        variant.config,
        seed=seed,
        tokenizer=str(folder / "tokenizer"),
        optim=dataclasses.replace(variant.config.optim, lr=rate),
    )
    slug = re.sub(r"[^a-z0-9.]+", "-", variant.label.lower()).strip("-")
    return Job(variant.label, config, folder / f"{slug}-lr{rate:g}-seed{seed}")


def _shared_tokenizer(config: PretrainConfig, folder: Path) -> None:
    """One tokenizer for all, so that losses compare."""
    if not folder.exists():
        save_tokenizer(train_tokenizer(tokenizer_documents(config), config.sparse.d_vocab), folder)


def _run_jobs(jobs: list[Job], processes: int, title: str) -> list[Outcome]:
    """Outcomes in the order of the jobs."""
    context = get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = [pool.submit(run_job, job) for job in jobs]
        try:
            for future in progress_bar(as_completed(futures), total=len(futures), desc=title, unit="model"):
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [future.result() for future in futures]


def _read_outcome(path: Path) -> Outcome:
    again = "remove it, and the model is measured again"
    data = read_json(path, again, finite=False)
    if isinstance(data, dict) and data.get("loss", 0) is None:  # diverged
        data |= {"loss": math.inf, "kurtosis": math.nan}
    return typed(Outcome, data, path, again)


def run_job(job: Job) -> Outcome:
    """Train and measure one model, or read what an earlier call found."""
    path = job.folder / "outcome.json"
    if path.exists():
        return _read_outcome(path)
    config = job.config
    neurons = config.sparse.n_layers * config.sparse.d_mlp
    try:
        metrics = pretrain(config, job.folder, resume=True, progress=False)
    except TrainingDiverged:
        outcome = Outcome(
            job.label, config.optim.lr, config.seed, math.inf, 0, total_entries(config.sparse), math.nan, 0, neurons
        )
        write_text(path, json.dumps(outcome._replace(loss=None, kurtosis=None)._asdict()))  # type: ignore[arg-type]
        return outcome
    model = load_sparse(job.folder / "sparse")
    blocks = prepare_corpus(config, load_tokenizer(job.folder / "tokenizer"), progress=False)
    held_out = blocks.val[: max(1, config.eval_tokens // config.sparse.n_ctx)].long()
    outcome = Outcome(
        job.label,
        config.optim.lr,
        config.seed,
        metrics["val_ce"],
        metrics["nonzeros"],
        round(metrics["nonzeros"] / metrics["nonzero_fraction"]),
        float(kurtosis(final_residual(model, held_out))),
        dead_neurons(model, held_out),
        neurons,
    )
    write_text(path, json.dumps(outcome._asdict()))
    return outcome


@torch.no_grad()
def final_residual(model: SparseTransformer, blocks: Int[Tensor, "block pos"]) -> Float[Tensor, "block pos d_model"]:
    """The residual stream at site 2L."""
    name = f"blocks.{model.n_layers - 1}.hook_resid_post"
    return torch.cat([model.run_with_cache(b, names_filter=name)[1][name] for b in blocks.split(64)])


def kurtosis(resid: Float[Tensor, "*batch d"]) -> Float[Tensor, ""]:
    """Mean over tokens of the fourth standardised moment over channels; 3 for a Gaussian, higher where few stand out.

    It measures how far a stream's channels are a privileged basis (the paper shows it to rise with weight sparsity).
    """
    centred = resid - resid.mean(-1, keepdim=True)
    return (centred.pow(4).mean(-1) / centred.pow(2).mean(-1).square()).mean()


@torch.no_grad()
def dead_neurons(model: SparseTransformer, blocks: Int[Tensor, "block pos"]) -> int:
    """MLP neurons whose activation, after AbsTopK, is zero at every token."""
    names = [f"blocks.{layer}.mlp.hook_post" for layer in range(model.n_layers)]
    alive = torch.zeros(model.n_layers, model.cfg.d_mlp, dtype=torch.bool)
    for batch in blocks.split(64):
        _, cache = model.run_with_cache(batch, names_filter=names)
        alive |= torch.stack([(cache[name] != 0).flatten(0, 1).any(0) for name in names])
    return int((~alive).sum())


def total_entries(sparse: SparseConfig) -> int:
    """Number of entries under projection of a model of these sizes."""
    with torch.device("meta"):
        return sum(p.tensor.numel() for p in SparseTransformer(sparse).sparse_parameters(1.0))


def grid(base: PretrainConfig, nonzeros: Iterable[int], widths: Iterable[int], *, dense: bool = True) -> list[Variant]:
    """Variants of every width and number of nonzeros, and of every width without weight sparsity.

    Heads have 16 channels and there are four MLP neurons per channel, so that width scales all of them. A number of
    nonzeros that a width cannot have, or that cannot hold the minimum per neuron, is a ValueError of the model.
    """
    variants = []
    for width in widths:
        sparse = dataclasses.replace(base.sparse, d_model=width, d_mlp=4 * width, n_heads=width // 16, d_head=16)
        wide = dataclasses.replace(base, sparse=sparse)
        entries = total_entries(sparse)
        for count in nonzeros:
            if count > entries:
                raise ValueError(f"nonzeros={count}: a model of width {width} has only {entries} entries")
            sparsity = dataclasses.replace(base.sparsity, nonzero_fraction=count / entries)
            variants.append(Variant(f"width {width} nonzeros {count}", dataclasses.replace(wide, sparsity=sparsity)))
        if dense:
            sparsity = dataclasses.replace(base.sparsity, nonzero_fraction=1.0)
            variants.append(Variant(f"width {width} dense", dataclasses.replace(wide, sparsity=sparsity)))
    return variants


ABLATIONS: dict[str, dict[str, dict]] = {
    "as it is": {},
    "eps 1e-8": {"optim": {"eps": 1e-8}},
    "eps 1e-3": {"optim": {"eps": 1e-3}},
    "eps 1": {"optim": {"eps": 1.0}},
    "gradient RMS clipped only": {"optim": {"grad_rms": "clip"}},
    "no sharkfin": {"optim": {"sharkfin": False}},
    "no annealing": {"sparsity": {"anneal_stop": 0.0}},
    "no annealing, no sharkfin": {"sparsity": {"anneal_stop": 0.0}, "optim": {"sharkfin": False}},
    "linear annealing": {"sparsity": {"anneal": "linear"}},
    "linear, until 50 %": {"sparsity": {"anneal": "linear", "anneal_stop": 0.5}},
    "linear, until 50 %, no sharkfin": {
        "sparsity": {"anneal": "linear", "anneal_stop": 0.5},
        "optim": {"sharkfin": False},
    },
    "linear, until 80 %": {"sparsity": {"anneal": "linear", "anneal_stop": 0.8}},
    "logarithmic, until 50 %": {"sparsity": {"anneal_stop": 0.5}},
    "j = 0": {"sparsity": {"min_per_neuron": 0}},
    "j = 2": {"sparsity": {"min_per_neuron": 2}},
}
"""Each rule of training changed by itself, as overrides of the configuration's parts."""


def ablations(base: PretrainConfig) -> list[Variant]:
    """The variants of `ABLATIONS`."""
    return [
        Variant(
            label,
            dataclasses.replace(
                base, **{part: dataclasses.replace(getattr(base, part), **kw) for part, kw in changes.items()}
            ),
        )
        for label, changes in ABLATIONS.items()
    ]

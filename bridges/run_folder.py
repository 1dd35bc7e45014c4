"""A run folder: what a run is made of, how it is prepared, saved and opened.

config.json  identity.json  digests.json  tokenizer/  dense/  sparse/  bridges/  metrics.jsonl  metrics.json
channels.json  report.html; dense-config.json (of train-dense); self.jsonl (what `self` in its corpus stands for); while
it trains: dense-checkpoint/  checkpoint/; while a command writes into it: .lock
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from bridges.bridge import SCALES, BridgeSet, kept_by_encoders, load_bridges, save_bridges
from bridges.bundle_format import check_format, dense_files, load_dense_part
from bridges.config import RunConfig
from bridges.dense import DenseModel, check_fit
from bridges.dense_start import DENSE, check_dense_start
from bridges.dense_training import DENSE_CHECKPOINT, save_dense, small_gpt2, train_dense
from bridges.lens_view import boot
from bridges.loading import load_lm, read_config
from bridges.packaged import dense_source, packaged
from bridges.self_text import SAMPLES, sample_documents, share_of_self
from sparse_model.config import SparseConfig, differing, from_json
from sparse_model.data.corpus import CorpusBlocks
from sparse_model.data.prepare import check_corpus, check_vocabulary, prepare_corpus, tokenizer_documents
from sparse_model.data.tokenizer import has_tokenizer, load_tokenizer, tokenizer_fingerprint, train_tokenizer
from sparse_model.io.atomic import recover_folder, remove_folder, write_text
from sparse_model.io.commands import command_line
from sparse_model.io.local import local_path
from sparse_model.io.lock import one_writer
from sparse_model.io.manifest import check_manifest, write_manifest
from sparse_model.io.reading import read_sealed, sealed
from sparse_model.io.tensors import check_finite, digest
from sparse_model.model.checkpoint import load_sparse, save_sparse
from sparse_model.model.device import check_device
from sparse_model.model.transformer import SparseTransformer
from sparse_model.training.checkpoints import CHECKPOINT
from sparse_model.training.trainer import check_budgets_of

_PARTS = {
    *("training", "dense", "sparse", "sites", "paths", "val_ce"),
    *("dense_task", "task_prompts", "tasks", "steering", "bases", "circuit_size"),
}
"""Of which metrics.json has one at least."""


class Run(NamedTuple):
    """A finished run, opened."""

    folder: Path
    config: RunConfig
    tokenizer: PreTrainedTokenizerFast
    dense: DenseModel
    sparse: SparseTransformer
    bridges: BridgeSet

    @property
    def samples(self) -> Path | None:
        """The documents that the corpus source `self` stands for; None where the run has none."""
        return samples_in(self.folder)


def samples_in(folder: Path) -> Path | None:
    """The documents that a run's dense model sampled for its corpus, where there are any."""
    return folder / SAMPLES if (folder / SAMPLES).is_file() else None


class Parts(NamedTuple):
    """What a run starts from, in memory."""

    tokenizer: PreTrainedTokenizerFast
    dense: PreTrainedModel | None
    """None where a small one is to be trained."""
    blocks: CorpusBlocks
    samples: Path | None = None
    """What `self` in the corpus stands for."""
    sparse: SparseTransformer | None = None
    """The sparse model that the joint training begins with; None for a new one."""


def check_parts(config: RunConfig, folder: Path, device: torch.device, *, progress: bool = True) -> Parts:
    """Make or read all that a run starts from, so that a start is refused before it writes into its folder.

    device: where text is sampled from the dense model, if any is.

    Raises ValueError for a budget that cannot hold the minimum per neuron, for tokenizers that differ and for a dense
    or a sparse model that does not fit; what reading the tokenizer, the dense model and the corpus raises.
    """
    check_corpus(config, folder / SAMPLES if config.dense else None)
    check_budgets_of(config)
    if config.start_from == DENSE and config.dense is None:
        check_dense_start(config.sparse, small_gpt2(config))
    for part in ("tokenizer", "dense"):
        recover_folder(folder / part)
    if config.dense and not (folder / "dense").exists():
        read_config(dense_source(config.dense))
    tokenizer = _tokenizer(config, folder)
    dense = _dense(config, folder, tokenizer)
    if dense is not None:
        if config.start_from == DENSE:
            check_dense_start(config.sparse, dense.config)
        check_fit(DenseModel(dense), config.sparse)
        boot(dense, tokenizer)  # what cannot be steered afterwards is refused before it is trained
    sparse = _sparse(config, folder, tokenizer)
    samples = samples_in(folder)
    if samples is None and dense is not None and share_of_self(config.corpus):
        samples = sample_documents(config, dense, tokenizer, device, progress=progress)
    blocks = prepare_corpus(config, tokenizer, samples=samples, progress=progress)
    return Parts(tokenizer, dense, blocks, samples, sparse)


def _tokenizer(config: RunConfig, folder: Path) -> PreTrainedTokenizerFast:
    """The run folder's tokenizer, the one named, the dense model's, or a BPE trained on the corpus."""
    tokenizer_folder = folder / "tokenizer"
    named = dense_source(config.dense) if config.dense else None
    dense_folder = local_path(named) if named else None
    bare = dense_folder is not None and dense_folder.is_dir() and not has_tokenizer(dense_folder)
    with_dense = None if bare else named
    if tokenizer_folder.exists():
        tokenizer = load_tokenizer(tokenizer_folder)
    elif config.tokenizer or with_dense:
        tokenizer = load_tokenizer(config.tokenizer or with_dense or "")
    elif config.dense:
        raise ValueError(
            f"{config.dense} has no tokenizer (no tokenizer.json, nor vocab.json with merges.txt): name the one that "
            "it was trained with by --tokenizer"
        )
    else:
        tokenizer = train_tokenizer(tokenizer_documents(config), config.sparse.d_vocab)
    if with_dense and not (folder / "dense").exists():
        name = str(tokenizer_folder) if tokenizer_folder.exists() else config.tokenizer or with_dense
        check_same_tokenizer(tokenizer, load_tokenizer(with_dense), name, with_dense)
    if config.dense is None:
        check_vocabulary(tokenizer, config.sparse)
    return tokenizer


def _dense(config: RunConfig, folder: Path, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel | None:
    """The run folder's dense model or the one named; None where a small one is to be trained."""
    dense_folder = folder / "dense"
    if dense_folder.exists():
        check_same_tokenizer(tokenizer, load_tokenizer(dense_folder), str(folder / "tokenizer"), str(dense_folder))
        return load_lm(dense_folder)
    if config.dense is None:
        return None
    model, largest = load_lm(dense_source(config.dense)), max(tokenizer.get_vocab().values())
    if largest >= model.config.vocab_size:
        raise ValueError(
            f"the vocabulary of {config.dense} has {model.config.vocab_size} tokens, but its tokenizer gives ids up to "
            f"{largest}: name the one that it was trained with by --tokenizer"
        )
    return model


def _sparse(config: RunConfig, folder: Path, tokenizer: PreTrainedTokenizerFast) -> SparseTransformer | None:
    """The model that the configuration names to begin with; None where none is, or the training has begun."""
    if config.start_from in (None, DENSE) or has_begun(folder):
        return None
    start = packaged(config.start_from) or Path(config.start_from).expanduser()
    if not (start / "sparse").is_dir():
        raise FileNotFoundError(
            f"start_from={config.start_from}: no trained sparse model is in {start / 'sparse'}; train one with "
            + command_line("train-sparse", "--run", config.start_from)
        )
    sparse = load_sparse(start / "sparse")
    if different := differing(sparse.cfg, config.sparse):
        values = ", ".join(f"sparse.{name}={getattr(sparse.cfg, name)!r}" for name in different)
        raise ValueError(f"the sparse model of start_from={config.start_from} has {values}: give the same shape")
    if tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(load_tokenizer(start / "tokenizer")):
        raise ValueError(
            f"the sparse model of start_from={config.start_from} has another tokenizer than this run: token ids would "
            f"mean different text; use the one in {start / 'tokenizer'} for both models"
        )
    return sparse


def check_same_tokenizer(a: PreTrainedTokenizerFast, b: PreTrainedTokenizerFast, name_a: str, name_b: str) -> None:
    """Raise ValueError unless two tokenizers are the same."""
    if tokenizer_fingerprint(a) != tokenizer_fingerprint(b):
        raise ValueError(
            f"the tokenizer {name_a} is not that of {name_b}: token ids would mean different text; "
            "use the tokenizer that the dense model was trained with"
        )


def prepare_dense(
    config: RunConfig, folder: Path, parts: Parts, device: torch.device, *, progress: bool = True
) -> PreTrainedModel:
    """The run's dense model, trained now, or to its end, where there is none yet, in the run's dense/ folder."""
    model, dense_folder = parts.dense, folder / "dense"
    if model is None and dense_folder.exists():  # another process has just trained it
        return load_lm(dense_folder)
    if model is None:
        blocks = parts.blocks.train
        model = train_dense(config, blocks, parts.tokenizer, device, folder=folder, progress=progress)
    if not dense_folder.exists():
        save_dense(model, parts.tokenizer, dense_folder)
    remove_folder(folder / DENSE_CHECKPOINT)
    return model


def has_begun(folder: Path) -> bool:
    """Whether there is a sparse model in the folder that is trained or in training."""
    return any((folder / part).exists() for part in (CHECKPOINT, "sparse"))


def check_unfinished(folder: Path, resume: bool) -> None:
    """Raise FileExistsError where a training was stopped and is not to go on."""
    for part, what in ((DENSE_CHECKPOINT, "a dense model"), (CHECKPOINT, "a sparse model")):
        if (folder / part).exists() and not resume:
            raise FileExistsError(
                f"{folder} holds the unfinished training of {what}: add --resume to go on with it, or name another "
                "folder with --run"
            )


def new_bridges(config: RunConfig, d_dense: int) -> BridgeSet:
    """Untrained bridges of a run's shape."""
    sparse = config.sparse
    kept = kept_by_encoders(config.bridge.encoder_topk, sparse.d_model)
    return BridgeSet(sparse.n_sites, d_dense, sparse.d_model, kept)


def save_trained(folder: Path, sparse: SparseTransformer, bridges: BridgeSet) -> None:
    """Write sparse/ and, last, bridges/: a run that has them is trained."""
    save_sparse(sparse, folder / "sparse")
    save_bridges(bridges, folder / "bridges")


def write_digests(folder: Path) -> None:
    """Write RUN/digests.json, by which `open_run` notices damage to any part."""
    write_manifest(
        folder, ("config.json", "tokenizer", "dense", "sparse/config.json", "sparse/model.safetensors", "bridges")
    )


def _check_bridged(folder: Path) -> None:
    """Raise FileNotFoundError, with what to do, for the folder of a training that makes no bridges."""
    for part in ("bridges", "dense", "sparse"):
        recover_folder(folder / part)
    has = {part for part in ("bridges", "dense", "sparse") if (folder / part).is_dir()}
    if has == {"dense"} and not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} has a dense model and no bridges: "
            f"{command_line('train-bridge', '--run', folder, '--resume')} goes on with it"
        )
    if has == {"sparse"}:
        raise FileNotFoundError(
            f"{folder} has a sparse model that was trained alone, without bridges: train one with a dense model by "
            "sparse-bridges train-bridge --run ANOTHER"
        )


def open_run(folder: str | Path, device: str | torch.device = "cpu") -> Run:
    """Open a finished run, its models on a device.

    Raises FileNotFoundError for a folder that is not one or whose training has not finished, ValueError for parts that
    are damaged or do not belong together, each naming the file, and for a device that torch does not have here.
    """
    device = check_device(device)
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"no run at {folder}: train one with {command_line('train-bridge', '--run', folder)}")
    _check_bridged(folder)
    check_format(folder)
    config = from_json(RunConfig, folder / "config.json")
    if (folder / "bridges").exists():  # otherwise it is not finished, which load_bridges says
        check_manifest(folder)
    bridges = load_bridges(folder / "bridges")
    sparse = load_sparse(folder / "sparse").eval()
    check_finite(sparse.state_dict(), folder / "sparse")
    check_sparse_config(folder, config.sparse, sparse.cfg)
    dense, source = DenseModel(load_dense_part(folder)), dense_files(folder)
    tokenizer = sparse.tokenizer = load_tokenizer(folder / "tokenizer")
    check_same_tokenizer(tokenizer, load_tokenizer(source), str(folder / "tokenizer"), str(source))
    for name, found, wanted in (
        ("sites", bridges.n_sites, 2 * dense.n_layers + 1),
        ("dense width", bridges.d_dense, dense.d_model),
        ("sparse width", bridges.d_sparse, sparse.d_model),
        ("sparse layers", sparse.n_layers, dense.n_layers),
    ):
        if found != wanted:
            raise ValueError(
                f"{folder / 'bridges'} does not fit the run's models: {name} {found}, expected {wanted}; copy the "
                "parts of one run"
            )
    for part in (dense, sparse, bridges):
        part.to(device)
    return Run(folder, config, tokenizer, dense, sparse, bridges)


def check_sparse_config(folder: Path, of_run: SparseConfig, of_model: SparseConfig) -> None:
    """Raise ValueError where sparse/ is another model than the one that the run's config.json describes."""
    for name in differing(of_run, of_model):
        raise ValueError(
            f"{folder / 'sparse' / 'config.json'}: {name}={getattr(of_model, name)!r}, but sparse.{name}="
            f"{getattr(of_run, name)!r} in {folder / 'config.json'}: copy the parts of one run"
        )


def fingerprint(run: Run) -> str:
    """Hex digest of the weights of a run's dense and sparse models and bridges: what a circuit belongs to.

    Without the streams' scales, which are measured and not trained.
    """
    parts = {"dense": run.dense, "sparse": run.sparse, "bridges": run.bridges}
    tensors = {(part, name): t for part, model in parts.items() for name, t in model.state_dict().items()}
    return digest({f"{part}.{name}": t for (part, name), t in tensors.items() if name not in SCALES})


def update_metrics(folder: Path, *, merge: bool = False, **parts: Any) -> None:
    """Set top-level keys of RUN/metrics.json, keeping the others; `merge` keeps the keys below them too.

    Raises InUse where another process writes into the run.
    """
    path = folder / "metrics.json"
    with one_writer(folder):
        metrics = read_metrics(folder)
        metrics |= {name: metrics.get(name, {}) | part if merge else part for name, part in parts.items()}
        write_text(path, sealed(metrics))


def read_metrics(folder: Path) -> dict[str, Any]:
    """RUN/metrics.json; empty where there is none. Raises ValueError where it is damaged."""
    path = folder / "metrics.json"
    if not path.exists():
        return {}
    remedy = f"remove it and run {command_line('evaluate', '--run', folder)} again"
    metrics = read_sealed(path, remedy, finite=False)  # what is not defined, such as a share of nothing, is NaN
    if metrics and not _PARTS & metrics.keys():  # of an earlier version, without a digest, or another file in its place
        raise ValueError(f"{path} is damaged (it holds {', '.join(sorted(metrics)[:3])}, no figures): {remedy}")
    return metrics

"""A run as one steerable object: the dense model, in TransformerLens or as it is, with its bridges and channels.

TransformerLens and what is built on it are imported where they are needed: `load_hf` works without them.
"""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from bridges.bridge import BridgeSet, load_bridges
from bridges.bundle_format import check_format, load_dense_part, read_reference
from bridges.families import Anatomy
from bridges.packaged import find_run
from interventions.bundle.channels import FILE as CHANNELS
from interventions.bundle.channels import Channel, load_channels
from interventions.bundle.generating import AnnouncedGenerate
from interventions.bundle.generation_check import check_generation
from interventions.bundle.passes import Calls
from sparse_model.config import SparseConfig, from_json
from sparse_model.io.commands import command_line
from sparse_model.io.manifest import check_manifest
from sparse_model.io.narrow import read_weights
from sparse_model.io.tensors import digest
from sparse_model.model.device import check_device


class Bundle:
    """What an intervention needs beside the dense model; `dense.bundle` of a model from `load_dense` or `load_hf`."""

    def __init__(self, folder: Path, hf: PreTrainedModel, bridges: BridgeSet, calls: Calls, run: Any = None) -> None:
        self.folder, self.hf, self.bridges, self.calls = folder, hf, bridges, calls
        self.anatomy = Anatomy(hf)
        self.channels: dict[str, Channel] = load_channels(folder)
        self.shape = run.sparse.cfg if run else from_json(SparseConfig, folder / "sparse" / "config.json")
        self._run = run
        if (self.shape.d_model, self.shape.n_sites) != (bridges.d_sparse, bridges.n_sites):
            raise ValueError(
                f"{folder / 'sparse' / 'config.json'} has {self.shape.n_sites} sites of width {self.shape.d_model}, "
                f"{folder / 'bridges'} {bridges.n_sites} of {bridges.d_sparse}: copy the parts of one run"
            )
        for channel in self.channels.values():
            if channel.site >= bridges.n_sites or max(channel.indices) >= bridges.d_sparse:
                raise ValueError(
                    f"{folder / CHANNELS}: channel {channel.name!r} ({channel}) is not of this run, which has "
                    f"{bridges.n_sites} sites of {bridges.d_sparse} channels: run "
                    f"{command_line('find-channel', '--run', folder)} again"
                )

    def __repr__(self) -> str:
        return f"<bundle {self}>"

    def __str__(self) -> str:
        sites = f"{self.bridges.n_sites} sites, dense width {self.bridges.d_dense}, sparse {self.bridges.d_sparse}"
        return f"{self.folder}: {sites}; channels: {', '.join(self.channels) or 'none'}"

    @property
    def run(self) -> Any:
        """The opened `bridges.run_folder.Run`; ValueError for a plain Hugging Face model, which has none."""
        if self._run is None:
            raise ValueError("a model from load_hf has no open run: use load_dense for everything but intervene()")
        return self._run

    @cached_property
    def sparse(self) -> Any:
        """The sparse model (`SparseTransformer`), read from the run on first use: only `toward` needs it."""
        if self._run is not None:
            return self._run.sparse
        try:
            from sparse_model.model.checkpoint import load_sparse
        except ImportError as error:
            raise ImportError(
                f"toward runs the sparse model, which is built on TransformerLens: {error}. Install transformer-lens, "
                "or use delta, set_to or intervene_vector"
            ) from error
        return load_sparse(self.folder / "sparse").eval().to(self.bridges.rms_sparse.device)

    def identity(self) -> dict[str, Any]:
        """What an intervention belongs to: the layer count, and a digest of each part's weights as they are now.

        Raises ValueError where some of them are not in memory.
        """
        if any(tensor.is_meta for tensor in self.hf.state_dict().values()):
            raise ValueError(
                "the dense model's weights are offloaded, so what the intervention belongs to cannot be told: save or "
                "load it on a model that is in memory"
            )
        return {
            "layers": self.shape.n_layers,
            "dense": digest(self.hf.state_dict()),
            "dense dtype": str(self.hf.dtype).removeprefix("torch."),
            "sparse": self._sparse_digest(),
            "bridges": digest(self.bridges.state_dict()),
        }

    def _sparse_digest(self) -> str:
        """Of the nonzeros, so that the file will do where the model was not built."""
        if self._run is None and "sparse" not in self.__dict__:
            return digest(read_weights(self.folder / "sparse" / "model.safetensors"))
        state = self.sparse.state_dict()
        if self.shape.tied:  # stored once
            del state["unembedding.weight"]
        return digest(state)


def load_dense(
    folder: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    revision: str | None = None,
) -> Any:
    """The dense model of a run as a TransformerLens model (`TransformerBridge`) whose `bundle` holds its bridges.

    A packaged bundle's name ("demo" comes with the package), a run folder ("./demo", or a `Path`), or a bundle's name
    on the hub (owner/name; revision: its branch, tag or commit), of which no code is run. Raw mode: activations and
    logits are those of the HF model. The sparse model and the bridges stay in float32 whatever the dtype. Raises what
    `find_run` and `bridges.run_folder.open_run` raise, and ValueError for a model that TransformerLens sees otherwise
    than Hugging Face does.
    """
    from bridges.lens_view import boot
    from bridges.run_folder import open_run
    from interventions.bundle.lens import threaded

    run = open_run(find_run(folder, revision), device)
    run.dense.to(dtype)
    run.bridges.requires_grad_(False)
    dense = threaded(boot(run.dense.hf, run.tokenizer, device))
    check_generation(dense, "use_past_kv_cache", run.dense.d_vocab, run.dense.n_ctx)
    tokenizer = run.tokenizer
    dense.bundle = Bundle(
        run.folder,
        run.dense.hf,
        run.bridges,
        watched(dense.original_model, (tokenizer.pad_token_id, tokenizer.bos_token_id)),
        run,
    )
    return dense


def load_hf(
    folder: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    revision: str | None = None,
) -> PreTrainedModel:
    """The dense model of a run as a plain Hugging Face model that `intervene` takes; no TransformerLens is needed.

    `folder` and `revision` as in `load_dense`. Frozen, in eval mode. The bridges stay in float32 whatever the dtype.
    `toward` also loads the sparse model, which does need TransformerLens. Raises FileNotFoundError for a folder that is
    not a finished run, ValueError for bridges that are damaged or do not fit, and what `find_run` raises.
    """
    check_device(device)
    folder = find_run(folder, revision)
    check_format(folder)
    held = () if read_reference(folder) else ("dense/config.json",)
    for part in (*held, "bridges/config.json", "bridges/bridges.safetensors", "sparse/config.json"):
        if not (folder / part).is_file():
            raise FileNotFoundError(f"{folder / part} does not exist: is {folder} a run whose training has finished?")
    check_manifest(folder, ("dense/", "bridges/", "sparse/"))
    hf: Any = load_dense_part(folder, dtype).eval()
    hf.requires_grad_(False)
    hf.to(device)
    bridges = load_bridges(folder / "bridges").eval().requires_grad_(False).to(device)
    anatomy = Anatomy(hf)
    if (bridges.n_sites, bridges.d_dense) != (2 * anatomy.n_layers + 1, anatomy.d_model):
        raise ValueError(
            f"{folder / 'bridges'} has {bridges.n_sites} sites of dense width {bridges.d_dense}, the dense model "
            f"{2 * anatomy.n_layers + 1} of {anatomy.d_model}: they are not of one run"
        )
    check_generation(hf, "use_cache", anatomy.d_vocab, anatomy.n_ctx)
    hf.bundle = Bundle(folder, hf, bridges, watched(hf))
    return hf


def watched(hf: Any, padding: tuple[int | None, int | None] | None = None) -> Calls:
    """Watch the passes of a Hugging Face model and its `generate`.

    padding: the ids of the padding token and of the one that begins a text; from the model's config when None.
    """
    if padding is None:
        config = hf.config
        pad = config.eos_token_id if config.pad_token_id is None else config.pad_token_id
        padding = (pad if isinstance(pad, int) else None, config.bos_token_id)
    calls = Calls(Anatomy(hf).body, padding)
    hf.generate = AnnouncedGenerate(hf, calls)
    return calls


def uncompiled(dense: nn.Module) -> nn.Module:
    """The model behind `torch.compile(model)`; any other as it is."""
    return getattr(dense, "_orig_mod", dense)


def get_bundle(dense: nn.Module) -> Bundle:
    """The bundle of a model from `load_dense` or `load_hf`; another model is a ValueError that says so."""
    bundle = getattr(dense, "bundle", None)
    if not isinstance(bundle, Bundle):
        raise ValueError(
            f"this {type(dense).__name__} has no bridges: get the dense model from interventions.load_dense(run folder)"
        )
    return bundle


def check_raw(dense: nn.Module) -> None:
    """Raise ValueError for a TransformerLens model whose weights were processed, or that is in compatibility mode."""
    if getattr(dense, "compatibility_mode", False) or getattr(dense, "_weights_processed", False):
        raise ValueError(
            "the dense model is in TransformerLens' compatibility mode: its processed weights (folded norms, centred "
            "stream) give another residual stream than the one the bridges were trained on. Load it again with "
            "load_dense and leave it in raw mode"
        )

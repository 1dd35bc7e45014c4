"""A run as one steerable object: the dense model in TransformerLens, with its bridges and channels.

TransformerLens calls its wrapper of an HF model `TransformerBridge`; that class has nothing to do with the bridges
between models that this library trains.
"""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from bridges.run import Run, fingerprint, open_run
from interventions.channels import Channel, load_channels
from sparse_model.transformer import check_length


@dataclass(frozen=True)
class Bundle:
    """What an intervention needs beside the dense model; `dense.bundle` of a model from `load_dense`."""

    run: Run
    channels: dict[str, Channel]
    fingerprint: str
    """Digest of the weights of dense and sparse model and bridges."""


def load_dense(folder: str | Path, device: str | torch.device = "cpu") -> TransformerBridge:
    """The dense model of a run as a TransformerLens model whose `bundle` holds its bridges and channels.

    Raw mode: activations and logits are those of the HF model. Raises what `bridges.run.open_run` raises.
    """
    run = open_run(folder)
    for part in (run.dense, run.sparse, run.bridges):
        part.to(device)
    dense = boot(run.dense.hf, run.tokenizer, device)
    dense.bundle = Bundle(run, load_channels(run.folder), fingerprint(run))
    return dense


def boot(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, device: str | torch.device = "cpu"
) -> TransformerBridge:
    """A TransformerLens view of an HF model that shares its tensors and leaves the HF object as it was.

    Booting changes the object it is given (modules renamed, attention made eager), hence the copy. A sequence longer
    than the context is a ValueError.
    """
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    name = tokenizer.name_or_path or "dense"
    dense = TransformerBridge.boot_transformers(
        name, hf_model=copy.deepcopy(model, shared), tokenizer=tokenizer, device=str(device)
    ).eval()
    n_ctx = model.config.n_positions

    def refuse_long(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        ids = inputs[0]
        # Reading a position's value waits for a device; there only the length of one call is checked.
        check_length(int(ids.max()) + 1 if ids.device.type == "cpu" and ids.numel() else ids.shape[-1], n_ctx)

    dense.pos_embed.register_forward_pre_hook(refuse_long)
    return dense


def get_bundle(dense: TransformerBridge) -> Bundle:
    """The bundle of a model from `load_dense`; another model is a ValueError that says so."""
    bundle = getattr(dense, "bundle", None)
    if not isinstance(bundle, Bundle):
        raise ValueError(
            f"this {type(dense).__name__} has no bridges: get the dense model from interventions.load_dense(run folder)"
        )
    return bundle

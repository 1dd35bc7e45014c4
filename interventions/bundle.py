"""A run as one steerable object: the dense model in TransformerLens, with its bridges and channels.

TransformerLens calls its wrapper of an HF model `TransformerBridge`; that class has nothing to do with the bridges
between models that this library trains.
"""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from bridges.run import Run, fingerprint, open_run
from interventions.channels import Channel, load_channels


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

    Booting changes the object it is given (modules renamed, attention made eager), hence the copy.
    """
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    name = tokenizer.name_or_path or "dense"
    return TransformerBridge.boot_transformers(
        name, hf_model=copy.deepcopy(model, shared), tokenizer=tokenizer, device=str(device)
    ).eval()


def get_bundle(dense: TransformerBridge) -> Bundle:
    """The bundle of a model from `load_dense`; another model is a ValueError that says so."""
    bundle = getattr(dense, "bundle", None)
    if not isinstance(bundle, Bundle):
        raise ValueError(
            f"this {type(dense).__name__} has no bridges: get the dense model from interventions.load_dense(run folder)"
        )
    return bundle

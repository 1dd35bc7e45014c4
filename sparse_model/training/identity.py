"""What a training is made from, besides its settings: what has changed is noticed when it goes on.

A resumed training ends with the same bits only from the same text, tokenizer, dense model and number of processes.
"""

import hashlib
import json
import logging
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from sparse_model.data.corpus import CorpusBlocks
from sparse_model.data.tokenizer import tokenizer_fingerprint
from sparse_model.io.atomic import write_text
from sparse_model.io.reading import read_typed

logger = logging.getLogger(__name__)

Identity = dict[str, str | int]

FILE = "identity.json"
_WORDS = {
    "corpus": "another text (files were changed, added or removed)",
    "tokenizer": "another tokenizer",
    "dense": "other weights of the dense model",
    "shape": "another shape of the dense model",
}
_VERSIONS = ("torch", "transformers")


def versions() -> Identity:
    """Of the libraries that decide the last bits."""
    return {name: version(name) for name in _VERSIONS}


def digest_of(tensors: Iterable[Tensor]) -> str:
    """Hex digest of the bytes of tensors in their order."""
    sha = hashlib.sha256()
    for t in tensors:
        sha.update(f"{t.dtype} {tuple(t.shape)}".encode())
        sha.update(t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()[:16]


def run_identity(blocks: CorpusBlocks, tokenizer: PreTrainedTokenizerFast, processes: int) -> Identity:
    """Of a run, as far as it is known when it begins."""
    text, fingerprint = digest_of([blocks.train, blocks.val]), tokenizer_fingerprint(tokenizer)
    return {**versions(), "corpus": text, "tokenizer": fingerprint, "processes": processes}


def check_identity(begun: Identity, now: Identity, folder: Path) -> None:
    """Raise ValueError where a training was begun with other parts than it has now; warn of other versions."""
    other = [name for name in begun if name in now and begun[name] != now[name]]
    parts = [_WORDS.get(name, f"{begun[name]} {name}, not {now[name]}") for name in other if name not in _VERSIONS]
    if parts:
        raise ValueError(
            f"{folder} was begun with {' and '.join(parts)}: resume with the same, or begin another run with --run"
        )
    if other:
        said = ", ".join(f"{name} {begun[name]}, now {now[name]}" for name in other)
        logger.warning("%s was begun with %s: the weights need not be the same to the last bit", folder, said)


def keep_identity(folder: Path, now: Identity) -> None:
    """Check what a run was begun with, and keep what it has not kept so far. Raises as `check_identity`."""
    path = folder / FILE
    begun: Identity = {}
    if path.exists():
        begun = read_typed(dict[str, str | int], path, "remove it to go on with what the run has now")
        check_identity(begun, now, folder)
    if now.keys() - begun.keys():
        write_text(path, json.dumps(now | begun, indent=1) + "\n")

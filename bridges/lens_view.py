"""A dense model as TransformerLens sees it, compared with what Hugging Face computes before anybody relies on it.

TransformerLens calls its wrapper of an HF model `TransformerBridge`; that class has nothing to do with the bridges
between models that this library trains.
"""

import copy
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from bridges.families import Anatomy
from bridges.loading import check_same_logits, sample_tokens

_REMEDY = "train beside a model that it knows; a run that is trained already opens without it by load_hf"


def boot(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, device: str | torch.device = "cpu") -> Any:
    """A TransformerLens view of an HF model that shares its tensors and leaves the HF object as it was.

    Booting changes the object it is given (modules renamed, attention made eager), hence the copy. Raises ValueError
    for a model that TransformerLens does not know, or for which it computes other logits than Hugging Face (it knows
    one scale of GPT-2's attention, for instance).
    """
    from transformer_lens.model_bridge import TransformerBridge

    anatomy = Anatomy(model)
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    name = tokenizer.name_or_path or "dense"
    what = f"TransformerLens' view of this {type(model).__name__}"
    try:
        dense = TransformerBridge.boot_transformers(
            name, hf_model=copy.deepcopy(model, shared), tokenizer=tokenizer, device=str(device)
        ).eval()
    except (ValueError, TypeError, RuntimeError, AttributeError, KeyError) as error:
        raise ValueError(f"{what} cannot be made ({error}): {_REMEDY}") from error
    _compare(dense, anatomy, what)
    return dense


@torch.no_grad()
def _compare(dense: Any, anatomy: Anatomy, what: str) -> None:
    model = anatomy.model
    tokens = sample_tokens(anatomy.d_vocab, anatomy.n_ctx).to(model.device)
    wanted = model(tokens, use_cache=False).logits
    try:
        found = dense(tokens)
    except Exception as error:
        raise ValueError(f"{what} does not run ({type(error).__name__}: {error}): {_REMEDY}") from error
    # A GPU may be set to round its products to ten bits.
    exact = model.device.type == "cpu" and wanted.dtype == torch.float32
    check_same_logits(found, wanted, what, 1e-4 if exact else 5e-2)

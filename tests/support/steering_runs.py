"""A run of random weights that is steered, and the small experiment of the tests of steering."""

import random
from functools import cache
from pathlib import Path

import pytest
import torch
from support import helpers
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedTokenizerFast

from bridges.run_folder import Run
from interventions import Channel, load_dense
from interventions.bases.comparison_config import Comparison
from interventions.bundle.bundle import get_bundle
from interventions.bundle.channels import save_channel
from interventions.steering.experiment import Experiment
from interventions.steering.steered_prompts import Prompts
from sparse_model.data.generated_python import generate_document
from sparse_model.data.tokenizer import train_tokenizer

VOCAB = 512
TASK = "single_double_quote"
CHANNEL = Channel(name="pair", site=2, indices=(3, 11), weights=(1.0, -0.5), selection={"task": TASK})
SMALL = Experiment(
    channel="pair",
    sets=((3,), (3, 11)),
    strengths=(0, 0.5, 1),
    pairs=6,
    draws=3,
    maps=2,
    searches=2,
    resamples=50,
    ridge_tokens=512,
    text_tokens=128,
    task_pairs=2,
    new_tokens=3,
)

SMALL_COMPARISON = Comparison(
    channel=CHANNEL.name,
    sizes=(1, 3),
    kept=(4,),
    coder_tokens=20_000,
    pairs=6,
    draws=5,
    ridge_tokens=512,
    text_tokens=128,
    task_pairs=2,
    new_tokens=2,
)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Large enough to present every task."""
    rng = random.Random(0)
    return train_tokenizer([generate_document(rng) for _ in range(600)], VOCAB)


def make_run(folder: Path, **widths: int) -> Run:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(helpers, "TINY_VOCAB", VOCAB)
        patch.setattr(helpers, "tiny_tokenizer", tokenizer)
        return helpers.make_tiny_run(folder, **widths)


def steerable_dense(folder: Path) -> TransformerBridge:
    """The run as `load_dense` gives it, with a named channel, and decoders whose edits are felt."""
    make_run(folder)
    save_channel(folder, CHANNEL)
    dense = load_dense(folder)
    for decoder in get_bundle(dense).bridges.decoders:
        decoder.weight.data *= 300
    return dense


def p_target(logits: torch.Tensor, prompts: Prompts) -> torch.Tensor:
    row = torch.arange(len(prompts.last))
    return logits.detach()[row, prompts.last].softmax(-1)[row, prompts.target]

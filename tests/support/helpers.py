"""What several test files build on: run folders with random weights, made without any training."""

import hashlib
import random
from functools import cache
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerFast

from bridges.config import DenseTrainConfig, RunConfig
from bridges.dense import DenseModel
from bridges.dense_training import save_dense
from bridges.run_folder import Run, new_bridges, open_run, save_trained
from bridges.scales import measure_scales
from interventions import Channel
from sparse_model.config import SparseConfig, to_json
from sparse_model.data.generated_python import generate_document
from sparse_model.data.tokenizer import save_tokenizer, train_tokenizer
from sparse_model.model.transformer import SparseTransformer

HANG_SECONDS = 1800
"""After this a command hangs. Far longer than any takes on a busy machine: no test is timed."""

TINY_VOCAB = 384

CHANNEL = Channel(name="pair", site=2, indices=(3, 11), weights=(1.0, -0.5))
"""A named channel of the tiny run that the tests of interventions share."""


@cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of generated Python, trained once per test process."""
    rng = random.Random(0)
    return train_tokenizer([generate_document(rng) for _ in range(200)], TINY_VOCAB)


def make_tiny_run(
    folder: Path,
    *,
    n_layers: int = 2,
    d_dense: int = 16,
    d_sparse: int = 32,
    seed: int = 0,
    lm: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> Run:
    """Write a complete run of random weights, or around the dense model `lm`, into `folder` and open it."""
    torch.manual_seed(seed)
    d_vocab = len(tokenizer) if tokenizer else TINY_VOCAB
    tokenizer = tokenizer or tiny_tokenizer()
    shape = SparseConfig(n_layers=n_layers, d_model=d_sparse, d_mlp=2 * d_sparse, n_heads=2, n_ctx=64, d_vocab=d_vocab)
    config = RunConfig(
        corpus_tokens=20_000, seed=seed, sparse=shape, dense_train=DenseTrainConfig(d_model=d_dense, n_heads=2)
    )
    dense = DenseModel(lm or _random_gpt2(shape, d_dense, tokenizer.eos_token_id))
    sparse, bridges = SparseTransformer(shape), new_bridges(config, d_dense)
    tokens = torch.randint(TINY_VOCAB, (4, shape.n_ctx))
    measure_scales(dense, sparse, bridges, tokens)
    to_json(config, folder / "config.json")
    save_tokenizer(tokenizer, folder / "tokenizer")
    save_dense(dense.hf, tokenizer, folder / "dense")
    save_trained(folder, sparse, bridges)
    return open_run(folder)


def _random_gpt2(shape: SparseConfig, d_dense: int, end_of_text: int) -> GPT2LMHeadModel:
    options = GPT2Config(
        vocab_size=shape.d_vocab,
        n_positions=shape.n_ctx,
        n_embd=d_dense,
        n_layer=shape.n_layers,
        n_head=2,
        # ten times the usual standard deviation: logits that differ enough between tokens to test anything with
        initializer_range=0.2,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
    )
    return GPT2LMHeadModel(options)


def digests(folder: Path) -> dict[str, str]:
    """A digest of every file below a folder, to see what a command has changed."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

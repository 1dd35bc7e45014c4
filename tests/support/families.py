"""A tiny random model of every family that can be the dense model."""

from typing import Any

import torch
from support.helpers import TINY_VOCAB
from transformers import AutoConfig, AutoModelForCausalLM

_ENDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_LLAMA = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
}
_SOME_SLIDE = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
SETTINGS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "gpt_neo": {
        "hidden_size": 16,
        "num_layers": 2,
        "num_heads": 2,
        "max_position_embeddings": 64,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 4,
    },
    "opt": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "ffn_dim": 24,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 16,
    },
    "llama": _LLAMA,
    "mistral": _LLAMA | {"sliding_window": 4},
    "qwen2": _LLAMA | _SOME_SLIDE,
    "qwen3": _LLAMA | _SOME_SLIDE | {"head_dim": 8},
    "gemma": _LLAMA | {"head_dim": 8},
    "phi3": _LLAMA | {"sliding_window": 4},
    "smollm3": _LLAMA | {"no_rope_layers": [1, 0]},
    "starcoder2": _LLAMA,
    "stablelm": _LLAMA | {"num_attention_heads": 2, "num_key_value_heads": 1},
}
"""Grouped queries wherever the family has them, and windows shorter than the tests' prompts."""


def tiny_lm(kind: str, seed: int = 0, **settings: Any) -> Any:
    """A random model of a family whose norms, biases and logits differ enough to test anything with."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **{"vocab_size": TINY_VOCAB} | _ENDS | SETTINGS[kind] | settings)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model

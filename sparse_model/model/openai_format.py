"""OpenAI's released checkpoint format (github.com/openai/circuit_sparsity), read and written.

A model folder holds `beeg_config.json` and the weights, `final_model.pt` (loaded with `weights_only=True`, so that no
code runs) or the same keys in `model.safetensors`. The layout of the copy on the Hugging Face hub could not be checked
offline; where it differs, rename its files to these two.

Names of theirs and ours (ours are TransformerLens'):

    i.resid_in  hook_resid_pre      i.attn.act_in  attn.hook_in     i.attn.{q,k,v}  attn.hook_{q,k,v}
    i.attn.y    attn.hook_z         i.attn.resid_delta  hook_attn_out   i.resid_mid  hook_resid_mid
    i.mlp.act_in  mlp.hook_in       i.mlp.post_act  mlp.hook_post       i.mlp.resid_delta  hook_mlp_out
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_model.config import SparseConfig, require
from sparse_model.io.atomic import replace_folder
from sparse_model.io.reading import read_typed, typed
from sparse_model.io.tensors import check_finite, load_checked, read_tensors
from sparse_model.model.transformer import SparseTransformer, sinusoidal_table
from sparse_model.model.weight_files import check_layers

CONFIG, WEIGHTS, SAFE_WEIGHTS = "beeg_config.json", "final_model.pt", "model.safetensors"

_BRIDGES = SparseConfig(
    n_layers=4,
    d_model=2048,
    d_mlp=8192,
    n_heads=128,
    d_head=16,
    n_ctx=256,
    d_vocab=2048,
    positions="learned",
    bigram="fixed",
    topk_fraction=1 / 8,
)
RELEASED: dict[str, tuple[SparseConfig, float]] = {
    "csp_yolo2": (
        dataclasses.replace(
            _BRIDGES, n_layers=8, positions="concat_learned", d_pos=32, sink=True, bigram="learned", topk_fraction=1 / 4
        ),
        1 / 1024,
    ),
    "csp_bridges1": (_BRIDGES, 1 / 128),
    "csp_bridges2": (_BRIDGES, 1 / 128),
}
"""Shapes of released models with the share of weights that is nonzero, as far as their configs are public."""

# Training options that do not change what the model computes.
_IGNORED = {
    "afrac_approx", "ignore_dw_grad", "bigram_table_rank", "pfrac", "expansion_factor", "expansion_factor_mlp",
    "debug_exact_topk", "sparse_matmul_impl", "rtopk", "n_embd", "flash", "grad_checkpointing",
    "enable_sparse_kernels", "debug_nans", "dropout", "dropout_cat_pos_emb", "tokenizer_name",
}  # fmt: skip
_KNOWN = {
    "block_size", "vocab_size", "n_layer", "n_head", "d_head", "d_model", "d_mlp", "n_mlp", "rms_norm",
    "activation_type", "residual_activation_type", "afrac", "afrac_loctypes", "tied_unembed", "enable_bigram_table",
    "learnable_bigram_table", "d_pos_emb", "sinusoidal_cat_pos_emb", "sink", "bias", "ln_bias",
}  # fmt: skip
_SIZES = {"block_size", "vocab_size", "n_layer", "n_head", "d_head", "d_model"}
_DEFAULT_LOCATIONS = "attn_in,attn_out,mlp_in,mlp_out"

# Longer names first: they are replaced in this order.
_RENAMED = [
    ("transformer.h.", "blocks."),
    ("transformer.wte.", "token_embed."),
    ("transformer.wpe.", "pos_embed."),
    ("transformer.ln_f.", "ln_final."),
    ("lm_head.", "unembedding."),
    (".ln_p1.", ".ln1_pos."),
    (".ln_p2.", ".ln2_pos."),
    (".ln_1.", ".ln1."),
    (".ln_2.", ".ln2."),
    (".attn.c_attn.", ".attn.qkv."),
    (".attn.c_proj.", ".attn.out."),
    (".attn.attn_imp.sink_logit", ".attn.sink_logit"),
    (".mlp.c_fc.", ".mlp.fc."),
    (".mlp.c_proj.", ".mlp.out."),
    ("bigram_table", "bigram"),
    ("final_logits_bias", "logits_bias"),
]


def from_openai(folder: str | Path) -> SparseTransformer:
    """A model from a folder in OpenAI's format, with equal logits.

    Raises FileNotFoundError for a missing folder or file, ValueError for an unknown field, for a missing, unknown or
    misshaped tensor, and for a damaged or truncated file, each naming it.
    """
    folder = Path(folder).expanduser()
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: a folder in OpenAI's format holds {CONFIG} and {WEIGHTS}")
    raw = read_typed(dict[str, Any], path, "copy it again")
    try:
        cfg = config_from_openai(raw)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    weights = folder / SAFE_WEIGHTS if (folder / SAFE_WEIGHTS).exists() else folder / WEIGHTS
    state = {our_name(name): t for name, t in _read_weights(weights).items()}
    if cfg.tied and _equal(state.get("unembedding.weight"), state.get("token_embed.weight")):
        del state["unembedding.weight"]  # torch saves it under both names
    check_layers(cfg, {name: tuple(t.shape) for name, t in state.items()}, weights)
    with torch.device("meta"):
        model = SparseTransformer(cfg)
    state.setdefault("logits_bias", torch.zeros(cfg.d_vocab))
    if cfg.tied and "token_embed.weight" in state:
        state["unembedding.weight"] = state["token_embed.weight"]
    if cfg.positions == "concat_sinusoidal":
        table = state.pop("pos_embed.weight", None)
        state["pos_table"] = sinusoidal_table(cfg.n_ctx, cfg.d_pos) if table is None else table
    load_checked(model, state, weights, assign=True)
    check_finite(state, weights)
    if cfg.tied:
        model.unembedding.weight = model.token_embed.weight
    return model


def to_openai(model: SparseTransformer, folder: str | Path) -> None:
    """Write a model so that OpenAI's code reads it. Raises ValueError for what their format cannot express."""
    cfg = model.cfg
    require(
        cfg.positions != "none",
        "positions",
        cfg.positions,
        "their code always adds position embeddings; use 'learned' with zeros for the same function",
    )
    state = {}
    for name, t in model.state_dict().items():
        if not (cfg.tied and name == "unembedding.weight"):
            state[their_name("pos_embed.weight" if name == "pos_table" else name)] = t.detach().cpu().contiguous()
    with replace_folder(Path(folder)) as temporary:
        (temporary / CONFIG).write_text(json.dumps(config_to_openai(cfg), indent=1) + "\n", encoding="utf-8")
        torch.save(state, temporary / WEIGHTS)


def config_from_openai(raw: dict[str, Any]) -> SparseConfig:
    """Our config for one of theirs; an unknown or unsupported field is a ValueError that names it."""
    unknown = sorted(set(raw) - _KNOWN - _IGNORED)
    if unknown:
        raise ValueError(f"unknown field {', '.join(unknown)}: it could change what the model computes")
    for name, wanted in (("rms_norm", True), ("residual_activation_type", "identity")):
        require(raw.get(name, wanted) == wanted, name, raw.get(name), f"only {wanted!r} is supported")
    missing = sorted(_SIZES - set(raw))
    if missing:
        raise ValueError(f"missing field {', '.join(missing)}")
    typed(dict[str, int], {name: raw[name] for name in sorted(_SIZES)}, "the config", "copy it again")
    d_pos = raw.get("d_pos_emb") or 0
    positions = "learned"
    if d_pos:
        positions = "concat_sinusoidal" if raw.get("sinusoidal_cat_pos_emb") else "concat_learned"
    bigram = "none"
    if raw.get("enable_bigram_table"):
        bigram = "learned" if raw.get("learnable_bigram_table") else "fixed"
    fraction = raw.get("afrac")
    locations = str(raw.get("afrac_loctypes", _DEFAULT_LOCATIONS)) if fraction is not None else ""
    fields: dict[str, Any] = {
        "n_layers": raw["n_layer"],
        "d_model": raw["d_model"],
        "d_mlp": raw.get("d_mlp") or raw.get("n_mlp") or 4 * raw["d_model"],
        "n_heads": raw["n_head"],
        "d_head": raw["d_head"],
        "n_ctx": raw["block_size"],
        "d_vocab": raw["vocab_size"],
        "positions": positions,
        "d_pos": d_pos,
        "sink": raw.get("sink", False),
        "bigram": bigram,
        "act_fn": raw.get("activation_type", "gelu"),
        "topk_fraction": 1.0 if fraction is None else fraction,
        "topk_locations": tuple(x for x in locations.split(",") if x),
        "bias": raw.get("bias", True),
        "tied": raw.get("tied_unembed", True),
    }
    return typed(SparseConfig, fields, "their config, in our words,", "copy it again")


def config_to_openai(cfg: SparseConfig) -> dict[str, Any]:
    """Their config for one of ours."""
    return {
        "block_size": cfg.n_ctx,
        "vocab_size": cfg.d_vocab,
        "n_layer": cfg.n_layers,
        "n_head": cfg.n_heads,
        "d_head": cfg.d_head,
        "d_model": cfg.d_model,
        "d_mlp": cfg.d_mlp,
        "rms_norm": True,
        "residual_activation_type": "identity",
        "activation_type": cfg.act_fn,
        "afrac": cfg.topk_fraction,
        "afrac_loctypes": ",".join(cfg.topk_locations),
        "tied_unembed": cfg.tied,
        "enable_bigram_table": cfg.bigram != "none",
        "learnable_bigram_table": cfg.bigram == "learned",
        "d_pos_emb": cfg.d_pos or None,
        "sinusoidal_cat_pos_emb": cfg.positions == "concat_sinusoidal",
        "sink": cfg.sink,
        "bias": cfg.bias,
        "ln_bias": True,
    }


def our_name(name: str) -> str:
    """Our state dict key for one of theirs."""
    for theirs, ours in _RENAMED:
        name = name.replace(theirs, ours)
    return name


def their_name(name: str) -> str:
    """Their state dict key for one of ours."""
    for theirs, ours in _RENAMED:
        if name.startswith(ours) or (ours.startswith(".") and ours in name):
            name = name.replace(ours, theirs, 1)
    return name


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and a.shape == b.shape and torch.equal(a, b)


def _read_weights(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return read_tensors(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: the folder needs {WEIGHTS} or {SAFE_WEIGHTS}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a cut zip, a foreign pickle and an I/O error are of many kinds
        raise ValueError(f"{path} is damaged, truncated or no plain state dict ({type(error).__name__})") from error
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise ValueError(f"{path} is no plain state dict")
    return state

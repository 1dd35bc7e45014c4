"""Brute-force references, written from the method's description and not from the library's code.

Everything is plain Python or numpy loops in double precision: sorting for top-k, explicit softmax for attention.
"""

import math

import numpy as np
import torch

from sparse_model.config import SparseConfig
from sparse_model.model.transformer import SparseTransformer


def top_k_indices(values, k: int) -> list[int]:
    """The k entries of largest magnitude, ties to the lower index, by sorting."""
    return sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))[:k]


def top_k_mask(values, k: int) -> list[bool]:
    kept = set(top_k_indices(values, k))
    return [i in kept for i in range(len(values))]


def projection_kept(weight: torch.Tensor, k: int, j: int, axis: str | None) -> set[int]:
    """Flat indices of the entries kept: the top j of every neuron, then the best of the rest."""
    rows, columns = weight.shape
    flat = weight.flatten().tolist()
    neurons = {
        "row": [[r * columns + c for c in range(columns)] for r in range(rows)],
        "column": [[r * columns + c for r in range(rows)] for c in range(columns)],
        None: [],
    }[axis]
    kept = {neuron[i] for neuron in neurons for i in top_k_indices([flat[i] for i in neuron], j)}
    rest = [i for i in range(len(flat)) if i not in kept]
    return kept | {rest[i] for i in top_k_indices([flat[i] for i in rest], k - len(kept))}


def random_model(cfg: SparseConfig, seed: int = 0, dtype: torch.dtype = torch.float64) -> SparseTransformer:
    """A model whose every parameter, gains and biases included, is far from its initial value."""
    generator = torch.Generator().manual_seed(seed)
    model = SparseTransformer(cfg).to(dtype)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name == "pos_table":
                continue
            tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=dtype) * 0.4)
            if name.split(".")[-2:-1] and name.split(".")[-2].startswith("ln"):
                tensor.add_(1)
    return model


def _rms_norm(x: np.ndarray, gain: np.ndarray) -> np.ndarray:
    return x / math.sqrt(sum(v * v for v in x) / len(x) + np.finfo(np.float64).eps) * gain


def _sinusoid(position: int, width: int) -> np.ndarray:
    wave = [position / 10_000 ** (2 * (c // 2) / width) for c in range(width)]
    return np.array([math.sin(a) if c % 2 == 0 else math.cos(a) for c, a in enumerate(wave)])


def _activation(kind: str, value: float) -> float:
    return max(value, 0.0) if kind == "relu" else value * (1 + math.erf(value / 2**0.5)) / 2


def _attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, sink: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Pattern [head, query, key] and mixed values [query, head, channel] of causal attention."""
    n, heads, width = q.shape
    pattern, z = np.zeros((heads, n, n)), np.zeros((n, heads, width))
    for head in range(heads):
        for query in range(n):
            powers = [math.exp(q[query, head] @ k[key, head] / width**0.5) for key in range(query + 1)]
            extra = 0.0 if sink is None else math.exp(sink[head])
            for key, power in enumerate(powers):
                pattern[head, query, key] = power / (sum(powers) + extra)
                z[query, head] += pattern[head, query, key] * v[key, head]
    return pattern, z


def naive_run(model: SparseTransformer, tokens: list[int]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits [position, vocabulary] and activations by hook name of one sequence."""
    cfg, n = model.cfg, len(tokens)
    w = {name: t.detach().double().numpy() for name, t in model.state_dict().items()}
    seen: dict[str, np.ndarray] = {}

    def sparsify(location: str, x: np.ndarray) -> np.ndarray:
        if location not in cfg.topk_locations:
            return x
        return np.where(top_k_mask(x.tolist(), int(len(x) * cfg.topk_fraction)), x, 0.0)

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return w[f"{name}.weight"] @ x + (w[f"{name}.bias"] if cfg.bias else 0.0)

    def position(p: int) -> np.ndarray:
        return _sinusoid(p, cfg.d_pos) if cfg.positions == "concat_sinusoidal" else w["pos_embed.weight"][p]

    def reads(layer: int, norm: str, location: str, resid: list[np.ndarray]) -> list[np.ndarray]:
        read = []
        for p in range(n):
            x = _rms_norm(resid[p], w[f"blocks.{layer}.{norm}.weight"])
            if cfg.d_pos:
                x = np.concatenate([x, _rms_norm(position(p), w[f"blocks.{layer}.{norm}_pos.weight"])])
            read.append(sparsify(location, x))
        return read

    resid = [w["token_embed.weight"][t] for t in tokens]
    if cfg.positions == "learned":
        resid = [x + position(p) for p, x in enumerate(resid)]
    for layer in range(cfg.n_layers):
        block = f"blocks.{layer}"
        seen[f"{block}.hook_resid_pre"] = np.array(resid)
        read = reads(layer, "ln1", "attn_in", resid)
        seen[f"{block}.attn.hook_in"] = np.array(read)
        inner = cfg.n_heads * cfg.d_head
        qkv = [linear(f"{block}.attn.qkv", x) for x in read]
        q, k, v = (
            np.array([sparsify(f"attn_{name}", x[i * inner : (i + 1) * inner]) for x in qkv]).reshape(
                n, cfg.n_heads, cfg.d_head
            )
            for i, name in enumerate("qkv")
        )
        seen |= {f"{block}.attn.hook_{name}": value for name, value in zip("qkv", (q, k, v), strict=True)}
        pattern, z = _attend(q, k, v, w[f"{block}.attn.sink_logit"] if cfg.sink else None)
        seen[f"{block}.attn.hook_pattern"], seen[f"{block}.attn.hook_z"] = pattern, z
        write = [sparsify("attn_out", linear(f"{block}.attn.out", x.reshape(-1))) for x in z]
        seen[f"{block}.hook_attn_out"] = np.array(write)
        resid = [sparsify("resid_post_attn", x + y) for x, y in zip(resid, write, strict=True)]
        seen[f"{block}.hook_resid_mid"] = np.array(resid)

        read = reads(layer, "ln2", "mlp_in", resid)
        seen[f"{block}.mlp.hook_in"] = np.array(read)
        pre = [linear(f"{block}.mlp.fc", x) for x in read]
        seen[f"{block}.mlp.hook_pre"] = np.array(pre)
        neurons = [np.array([_activation(cfg.act_fn, value) for value in x]) for x in pre]
        neurons = [sparsify("mlp_neuron", x) for x in neurons]
        seen[f"{block}.mlp.hook_post"] = np.array(neurons)
        write = [sparsify("mlp_out", linear(f"{block}.mlp.out", x)) for x in neurons]
        seen[f"{block}.hook_mlp_out"] = np.array(write)
        resid = [sparsify("resid_post_mlp", x + y) for x, y in zip(resid, write, strict=True)]
        seen[f"{block}.hook_resid_post"] = np.array(resid)

    unembedding = w["token_embed.weight"] if cfg.tied else w["unembedding.weight"]
    logits = []
    for token, x in zip(tokens, resid, strict=True):
        row = unembedding @ _rms_norm(x, w["ln_final.weight"]) + w["logits_bias"]
        logits.append(row + (w["bigram"][token] if cfg.bigram != "none" else 0.0))
    return np.array(logits), seen

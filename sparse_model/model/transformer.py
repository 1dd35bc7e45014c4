"""The weight-sparse transformer: a GPT-2-style decoder, evaluated sublayer by sublayer (paper 2.1, A.1).

Residual sites i = 0 .. 2L: site 2l is before the attention of layer l, site 2l+1 before its MLP, site 2L after the
last MLP. Sublayer i, residual add included, maps site i to site i+1:

    read  = AbsTopK(RMSNorm(resid))           "residual read", hook blocks.l.{attn,mlp}.hook_in
    write = AbsTopK(attention or MLP (read))  "residual write", hook blocks.l.hook_{attn,mlp}_out
    resid = resid + write

The residual stream itself is never sparsified in the paper's models. Hook points carry TransformerLens' names, so
`run_with_cache`, `run_with_hooks` and `hooks()` work; all values are taken after AbsTopK.
"""

import math
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint

from sparse_model.config import SparseConfig
from sparse_model.model.generation import generate_steps
from sparse_model.model.hub import HubModel
from sparse_model.model.lengths import check_length
from sparse_model.model.lens_weights import LensWeights
from sparse_model.model.text import Prompts, ReadsText
from sparse_model.sparsity.abs_topk import abs_topk
from sparse_model.sparsity.projection import NeuronAxis, SparseParameter
from sparse_model.sparsity.sparse_linear import SparseLinear

Resid = Float[Tensor, "batch pos d_model"]


class KVCache:
    """Keys and values of the tokens already seen, for generation; one entry per layer."""

    def __init__(self) -> None:
        self.length = 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def extend(
        self, layer: int, k: Float[Tensor, "batch head pos d_head"], v: Float[Tensor, "batch head pos d_head"]
    ) -> tuple[Tensor, Tensor]:
        """Append the new tokens' keys and values of a layer; returns those of all tokens."""
        if layer in self._layers:
            old_k, old_v = self._layers[layer]
            k, v = torch.cat([old_k, k], dim=2), torch.cat([old_v, v], dim=2)
        self._layers[layer] = k, v
        return k, v

    def copy(self, rows: Int[Tensor, " row"] | slice = slice(None)) -> "KVCache":
        """One that begins as this one, or as these rows of it; extending either leaves the other as it is."""
        other = KVCache()
        other.length = self.length
        other._layers = {layer: (k[rows], v[rows]) for layer, (k, v) in self._layers.items()}
        return other


class RMSNorm(nn.Module):
    """x / rms(x) * weight, with the dtype's machine epsilon, as torch.nn.RMSNorm; hooks as in TransformerLens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.hook_normalized = HookPoint()

    def forward(self, x: Float[Tensor, "batch pos width"]) -> Float[Tensor, "batch pos width"]:
        return self.hook_normalized(F.rms_norm(x, (x.shape[-1],), self.weight))


class Sublayer(nn.Module):
    """What attention and MLP share: the sparsified read of the residual stream."""

    def __init__(self, cfg: SparseConfig, location: str) -> None:
        super().__init__()
        self.cfg = cfg
        self.topk_fraction = cfg.topk_fraction  # training may begin with more
        self.location = location
        self.hook_in = HookPoint()

    def sparsify(self, location: str, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """AbsTopK where the config asks for it."""
        if location not in self.cfg.topk_locations:
            return x
        return abs_topk(x, int(self.topk_fraction * x.shape[-1]))

    def read(self, normalized: Float[Tensor, "batch pos width"]) -> Float[Tensor, "batch pos width"]:
        """The sublayer's sparsified residual read."""
        return self.hook_in(self.sparsify(self.location, normalized))


class Attention(Sublayer):
    """Causal attention over sparsified q, k, v, with an optional sink."""

    def __init__(self, cfg: SparseConfig, layer: int) -> None:
        super().__init__(cfg, "attn_in")
        self.layer = layer
        inner = cfg.n_heads * cfg.d_head
        self.qkv = SparseLinear(cfg.d_model + cfg.d_pos, 3 * inner, bias=cfg.bias)
        self.out = SparseLinear(inner, cfg.d_model, bias=cfg.bias)
        self.sink_logit = nn.Parameter(torch.zeros(cfg.n_heads)) if cfg.sink else None
        self.hook_q, self.hook_k, self.hook_v = HookPoint(), HookPoint(), HookPoint()
        self.hook_attn_scores, self.hook_pattern, self.hook_z = HookPoint(), HookPoint(), HookPoint()

    def forward(self, normalized: Float[Tensor, "batch pos width"], cache: KVCache | None = None) -> Resid:
        """The residual write before AbsTopK."""
        q, k, v = self.qkv(self.read(normalized)).chunk(3, dim=-1)
        hooks = (self.hook_q, self.hook_k, self.hook_v)
        # AbsTopK spans all heads together.
        q, k, v = (
            hook(rearrange(self.sparsify(f"attn_{n}", x), "b p (h d) -> b p h d", d=self.cfg.d_head)).transpose(1, 2)
            for n, x, hook in zip("qkv", (q, k, v), hooks, strict=True)
        )
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        z = self.hook_z(self._mix(q, k, v).transpose(1, 2))
        return self.out(rearrange(z, "b p h d -> b p (h d)"))

    def _mix(
        self,
        q: Float[Tensor, "batch head query d_head"],
        k: Float[Tensor, "batch head key d_head"],
        v: Float[Tensor, "batch head key d_head"],
    ) -> Float[Tensor, "batch head query d_head"]:
        hooked = any(h.fwd_hooks or h.bwd_hooks for h in (self.hook_attn_scores, self.hook_pattern))
        if self.sink_logit is None and not hooked and q.shape[2] == k.shape[2]:
            # Flash attention knows no fp32; beside TF32's ten bits bfloat16's eight lose little.
            half = q.is_cuda and q.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
            if half:
                return F.scaled_dot_product_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), is_causal=True).float()
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        scores = einsum(q, k, "b h q d, b h k d -> b h q k") / math.sqrt(self.cfg.d_head)
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device)
        future = future.triu(1 + k.shape[2] - q.shape[2])
        scores = self.hook_attn_scores(scores.masked_fill(future, float("-inf")))
        if self.sink_logit is None:
            pattern = scores.softmax(-1)
        else:
            # A key and value of zeros: it takes attention away and gives nothing.
            sink = self.sink_logit.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
            pattern = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
        return einsum(self.hook_pattern(pattern), v, "b h q k, b h k d -> b h q d")


class MLP(Sublayer):
    """Two linear maps around a sparsified non-linearity."""

    def __init__(self, cfg: SparseConfig) -> None:
        super().__init__(cfg, "mlp_in")
        self.fc = SparseLinear(cfg.d_model + cfg.d_pos, cfg.d_mlp, bias=cfg.bias)
        self.out = SparseLinear(cfg.d_mlp, cfg.d_model, bias=cfg.bias)
        self.hook_pre, self.hook_post = HookPoint(), HookPoint()

    def forward(self, normalized: Float[Tensor, "batch pos width"]) -> Resid:
        """The residual write before AbsTopK."""
        pre = self.hook_pre(self.fc(self.read(normalized)))
        activation = F.gelu if self.cfg.act_fn == "gelu" else F.relu
        return self.out(self.hook_post(self.sparsify("mlp_neuron", activation(pre))))


class Block(nn.Module):
    """One layer's two sublayers, their norms and residual hooks."""

    def __init__(self, cfg: SparseConfig, layer: int) -> None:
        super().__init__()
        self.ln1, self.ln2 = RMSNorm(cfg.d_model), RMSNorm(cfg.d_model)
        self.attn, self.mlp = Attention(cfg, layer), MLP(cfg)
        if cfg.d_pos:
            self.ln1_pos, self.ln2_pos = RMSNorm(cfg.d_pos), RMSNorm(cfg.d_pos)
        self.hook_resid_pre, self.hook_resid_mid, self.hook_resid_post = HookPoint(), HookPoint(), HookPoint()
        self.hook_attn_out, self.hook_mlp_out = HookPoint(), HookPoint()

    def with_positions(
        self, normalized: Resid, positions: Float[Tensor, "pos d_pos"] | None, norm: str
    ) -> Float[Tensor, "batch pos width"]:
        """Concatenate the read-only positions, normalised apart, where the model has them."""
        if positions is None:
            return normalized
        rows = positions.to(normalized.dtype).expand(len(normalized), -1, -1)
        return torch.cat([normalized, getattr(self, norm)(rows)], -1)


class SparseTransformer(ReadsText, LensWeights, HookedRootModule, HubModel):
    """The weight-sparse model. `sublayer` and its companions are the interface that bridges are written against."""

    pos_table: Float[Tensor, "n_ctx d_pos"]

    def __init__(self, cfg: SparseConfig) -> None:
        super().__init__()
        self.cfg, self.measured = cfg, {}
        self._compiled: tuple[Callable, Callable] | None = None
        self.token_embed = nn.Embedding(cfg.d_vocab, cfg.d_model)
        if cfg.positions in ("learned", "concat_learned"):
            self.pos_embed = nn.Embedding(cfg.n_ctx, cfg.d_pos or cfg.d_model)
        elif cfg.positions == "concat_sinusoidal":
            self.register_buffer("pos_table", sinusoidal_table(cfg.n_ctx, cfg.d_pos))
        self.blocks = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.n_layers))
        self.ln_final = RMSNorm(cfg.d_model)
        self.unembedding = SparseLinear(cfg.d_model, cfg.d_vocab, bias=False)
        if cfg.tied:
            self.unembedding.weight = self.token_embed.weight
        if cfg.bigram != "none":
            self.bigram = nn.Parameter(torch.zeros(cfg.d_vocab, cfg.d_vocab), requires_grad=cfg.bigram == "learned")
        self.register_buffer("logits_bias", torch.zeros(cfg.d_vocab))
        self.hook_embed, self.hook_logits = HookPoint(), HookPoint()
        self._init_weights()
        self.setup()

    n_layers = property(lambda self: self.cfg.n_layers)
    d_model = property(lambda self: self.cfg.d_model)
    n_ctx = property(lambda self: self.cfg.n_ctx)
    d_vocab = property(lambda self: self.cfg.d_vocab)

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=self.cfg.embed_std)

    def embed(self, tokens: Int[Tensor, "batch pos"], cache: KVCache | None = None) -> Resid:
        """Residual stream at site 0. With a cache, the tokens follow those already in it."""
        offset = cache.length if cache else 0
        check_length(offset + tokens.shape[1], self.cfg.n_ctx)
        resid = self.token_embed(tokens)
        if self.cfg.positions == "learned":
            resid = resid + self.pos_embed.weight[offset : offset + tokens.shape[1]]
        return self.hook_embed(resid)

    def sublayer(self, i: int, resid: Resid, cache: KVCache | None = None) -> Resid:
        """Sublayer i with its residual add: site i to site i + 1."""
        block = self.blocks[i // 2]
        assert isinstance(block, Block)
        positions = self._positions(cache.length if cache else 0, resid.shape[1])
        run = (attention_sublayer, mlp_sublayer) if cache or not self._compiled else self._compiled
        return run[0](block, resid, positions, cache) if i % 2 == 0 else run[1](block, resid, positions)

    def _positions(self, offset: int, length: int) -> Float[Tensor, "pos d_pos"] | None:
        """What is concatenated to the reads of these positions, where the model does that."""
        if not self.cfg.d_pos:
            return None
        table = self.pos_embed.weight if self.cfg.positions == "concat_learned" else self.pos_table
        return table[offset : offset + length]

    def keep_activations(self, fraction: float) -> None:
        """Let AbsTopK keep another share than the configuration's, until it is set again; for training."""
        for block in self.blocks:
            block.attn.topk_fraction = block.mlp.topk_fraction = fraction

    def compile_sublayers(self, **options: Any) -> None:
        """Run the sublayers through torch.compile (its options apply), one graph for all attentions, one for all MLPs.

        Hooks added later than the first call are not seen, and generation with a cache is left as it is.
        """
        self._compiled = torch.compile(attention_sublayer, **options), torch.compile(mlp_sublayer, **options)

    def unembed(self, resid: Resid, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits from the residual stream at site 2L; the tokens select the bigram table's rows."""
        logits = self.unembedding(self.ln_final(resid)) + self.logits_bias
        if self.cfg.bigram != "none":
            logits = logits + F.embedding(tokens, self.bigram)
        return self.hook_logits(logits)

    def forward(self, tokens: Prompts, cache: KVCache | None = None) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits of every position given, of tokens or text. A cache is extended by these tokens."""
        tokens = self.to_tokens(tokens).to(self.token_embed.weight.device)
        resid = self.embed(tokens, cache)
        for i in range(2 * self.cfg.n_layers):
            resid = self.sublayer(i, resid, cache)
        if cache is not None:
            cache.length += tokens.shape[1]
        return self.unembed(resid, tokens)

    @torch.no_grad()
    def generate(
        self, tokens: Int[Tensor, "batch pos"], max_new_tokens: int, temperature: float = 0.0
    ) -> Int[Tensor, "batch new_pos"]:
        """Continue the prompts with a KV cache; greedy at temperature 0. Returns prompt and continuation."""
        check_length(tokens.shape[1] + max_new_tokens, self.cfg.n_ctx)
        cache = KVCache()
        steps = generate_steps(lambda given: self(given, cache)[:, -1], tokens, temperature)
        return torch.cat([tokens, *(step.tokens[:, None] for step in islice(steps, max_new_tokens))], 1)

    def sparse_parameters(
        self, fraction: float, embed_fraction: float | None = None, bias_fraction: float | None = None
    ) -> list[SparseParameter]:
        """Every parameter under projection, with its final fraction and its neuron axis.

        All matrices and biases, embeddings included; not the norms' gains, the sinks, the positions that are
        concatenated, nor the bigram table (paper A.1, A.2).
        """
        axes: dict[str, NeuronAxis] = {"qkv": "row", "fc": "row", "out": "column"}
        parameters = []
        for name, p in self.named_parameters():
            parts = name.split(".")
            if name == "bigram" or "sink_logit" in name or parts[-2].startswith("ln"):
                continue
            if parts[-2] == "pos_embed" and self.cfg.d_pos:
                continue
            embedding = parts[-2] in ("token_embed", "unembedding", "pos_embed")
            if embedding:
                share = embed_fraction or fraction
            else:
                share = (bias_fraction or fraction) if parts[-1] == "bias" else fraction
            axis = None if embedding or parts[-1] == "bias" else axes[parts[-2]]
            parameters.append(SparseParameter(name, p, share, axis))
        return parameters


def attention_sublayer(
    block: Block, resid: Resid, positions: Float[Tensor, "pos d_pos"] | None, cache: KVCache | None = None
) -> Resid:
    """A block's attention with its residual add."""
    resid = block.hook_resid_pre(resid)
    write = block.attn(block.with_positions(block.ln1(resid), positions, "ln1_pos"), cache)
    resid = resid + block.hook_attn_out(block.attn.sparsify("attn_out", write))
    return block.attn.sparsify("resid_post_attn", resid)


def mlp_sublayer(block: Block, resid: Resid, positions: Float[Tensor, "pos d_pos"] | None) -> Resid:
    """A block's MLP with its residual add."""
    resid = block.hook_resid_mid(resid)
    write = block.mlp(block.with_positions(block.ln2(resid), positions, "ln2_pos"))
    resid = resid + block.hook_mlp_out(block.mlp.sparsify("mlp_out", write))
    return block.hook_resid_post(block.mlp.sparsify("resid_post_mlp", resid))


def sinusoidal_table(n_ctx: int, width: int) -> Float[Tensor, "n_ctx width"]:
    """Sines in the even columns, cosines in the odd, wavelengths from 2 pi to 10,000 * 2 pi."""
    angle = torch.arange(n_ctx)[:, None] * torch.exp(-math.log(10_000) * torch.arange(0, width, 2) / width)
    table = torch.zeros(n_ctx, width)
    table[:, 0::2], table[:, 1::2] = angle.sin(), angle.cos()[:, : width // 2]
    return table

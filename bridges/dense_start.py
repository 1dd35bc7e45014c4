"""A sparse model and bridges that begin as the dense model itself, in a basis that AbsTopK hurts little.

A GPT-2 is a sparse model with no zeros: once what it writes to the stream is centred, its LayerNorms are RMSNorms, and
a norm's bias is part of the next matrix. Its stream may be turned by any P with P^T P = 1 (x becomes P x, each reading
matrix W becomes W P^T), into more channels too, so P is free: it is chosen such that few entries of P x hold most of x,
for what is read as for the weights that read and write. The bridges begin as P and its transpose, with NMSE and KL near
0. Projection and AbsTopK then take little away, and training makes up for that.

The paper trains its sparse models from nothing, on ten billion tokens; this is for those with a dense model and little
time.
"""

import math
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from bridges.bridge import BridgeSet
from bridges.dense import DenseModel
from bridges.hybrid import residuals
from sparse_model.config import SparseConfig, SparsityConfig, require
from sparse_model.io.progress import progress_bar
from sparse_model.model.transformer import SparseTransformer
from sparse_model.sparsity.abs_topk import abs_topk

DENSE = "dense"
"""What `start_from` calls the dense model."""

ACTIVATIONS: dict[str, Literal["gelu", "relu"]] = {
    "gelu": "gelu",
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_fast": "gelu",
    "relu": "relu",
}
"""The sparse model's non-linearity for each of a GPT-2's; tanh approximations of GELU differ by 5e-4."""

_SAMPLE = 16_384  # tokens of which each site's stream is looked at
_STEPS = 400
_ROWS = 1024


def check_dense_start(cfg: SparseConfig, dense: PretrainedConfig) -> None:
    """Raise ValueError, naming the field, unless a sparse model of this shape can be the dense model."""
    if dense.model_type != "gpt2" or dense.activation_function not in ACTIVATIONS:
        raise ValueError(
            f"start_from=dense: the dense model is a {dense.model_type!r} model with {_activation(dense)} neurons, and "
            f"the sparse model can begin as a GPT-2 with {', '.join(ACTIVATIONS)} alone: leave start_from out"
        )
    heads, width = dense.n_head, dense.n_embd
    wanted = {
        "n_heads": heads,
        "d_head": width // heads,
        "d_mlp": dense.n_inner or 4 * width,
        "positions": "learned",
        "act_fn": ACTIVATIONS[dense.activation_function],
        "tied": False,
        "bias": True,
    }
    for name, value in wanted.items():
        given = getattr(cfg, name)
        remedy = f"a sparse model that begins as the dense one (start_from=dense) has its: use {value}"
        require(given == value, f"sparse.{name}", given, remedy)
    require(cfg.d_model >= width, "sparse.d_model", cfg.d_model, f"the dense model's stream does not fit: use {width}")


def begin_as_dense(
    sparse: SparseTransformer,
    bridges: BridgeSet,
    hf: PreTrainedModel,
    blocks: Int[Tensor, "block pos"],
    sparsity: SparsityConfig,
    *,
    progress: bool = True,
) -> Float[Tensor, "d_sparse d_dense"]:
    """Give sparse model and bridges the dense model's weights, in place; returns P, which turns its stream into theirs.

    With topk_fraction 1 the sparse model's logits are then the dense model's. What `blocks` of training text make the
    dense model read, and its weights, decide on P. Raises what `check_dense_start` raises.
    """
    check_dense_start(sparse.cfg, hf.config)
    width = sparse.d_model
    frame = sparsest_frame(
        stream_sample(hf, blocks),
        stream_weights(hf),
        width,
        max(1, int(sparse.cfg.topk_fraction * width)),
        max(1, int(sparsity.nonzero_fraction * width)),
        progress=progress,
    )
    copy_weights(sparse, hf, frame)
    with torch.no_grad():
        for encoder, decoder in zip(bridges.encoders, bridges.decoders, strict=True):
            encoder.weight.copy_(_centred(frame))  # type: ignore[operator]
            decoder.weight.copy_(frame.T)  # type: ignore[operator]
    return frame


@torch.no_grad()
def stream_sample(hf: PreTrainedModel, blocks: Int[Tensor, "block pos"]) -> Float[Tensor, "token d_dense"]:
    """What the dense model's sublayers read, before gain and bias: the normalised stream at every site but the last."""
    device = next(hf.parameters()).device
    picked = torch.randperm(len(blocks))[: max(1, _SAMPLE // blocks.shape[1])].sort().values
    dense, rows = DenseModel(hf), []
    for some in blocks[picked].split(8):
        streams = residuals(dense, some.long().to(device))[:-1]
        rows += [nn.functional.layer_norm(x.flatten(0, 1), x.shape[-1:]).float().cpu() for x in streams]
    return torch.cat(rows)


@torch.no_grad()
def stream_weights(hf: PreTrainedModel) -> list[Float[Tensor, "_ d_dense"]]:
    """Every matrix that reads or writes the stream, a neuron a row, gains in it, each with an RMS of 1."""
    body: Any = hf.transformer
    head: Any = hf.get_output_embeddings()
    found = [_centred(body.wte.weight), head.weight * body.ln_f.weight]
    for block in body.h:
        found += [block.attn.c_attn.weight.T * block.ln_1.weight, _centred(block.attn.c_proj.weight)]
        found += [block.mlp.c_fc.weight.T * block.ln_2.weight, _centred(block.mlp.c_proj.weight)]
    return [(w / w.square().mean().sqrt()).float().cpu() for w in found]


def sparsest_frame(
    reads: Float[Tensor, "token d_dense"],
    weights: list[Float[Tensor, "_ d_dense"]],
    width: int,
    active: int,
    nonzeros: int,
    *,
    steps: int = _STEPS,
    progress: bool = False,
) -> Float[Tensor, "width d_dense"]:
    """P with P^T P = 1 such that little is lost of reads and of neurons' weights where few entries of P x are kept.

    Adam on the sum of two shares of power: what P^T AbsTopK(P x) misses of reads x with `active` entries kept, and of
    neurons' weights x with `nonzeros` kept. P is A times the inverse of a triangular root of A^T A; A begins as the
    stream's own axes, and random ones beside them where it is wider.
    """
    d_dense = reads.shape[1]
    axes = [torch.eye(d_dense)]
    while len(axes) * d_dense < width:
        axes.append(torch.linalg.qr(torch.randn(d_dense, d_dense))[0])
    start = torch.cat(axes)[:width]
    if min(active, nonzeros) >= width:
        return _isometry(start)
    a = nn.Parameter(start + 0.01 * torch.randn_like(start))
    optimizer = torch.optim.Adam([a], lr=2e-3)
    rows = max(1, _ROWS // len(weights))

    def missed(x: Tensor, frame: Tensor, kept: int) -> Tensor:
        return (abs_topk(x @ frame.T, kept) @ frame - x).square().sum() / x.square().sum()

    bar = progress_bar(total=steps, desc="basis", unit="step", disable=not progress)
    with bar:
        for _ in range(steps):
            frame = _isometry(a)
            some_reads = reads[torch.randint(len(reads), (_ROWS,))]
            some_weights = torch.cat([w[torch.randint(len(w), (rows,))] for w in weights])
            of_reads, of_weights = missed(some_reads, frame, active), missed(some_weights, frame, nonzeros)
            optimizer.zero_grad()
            (of_reads + of_weights).backward()
            optimizer.step()
            bar.set_postfix_str(
                f"lost of reads {float(of_reads.detach()):.3f}, of weights {float(of_weights.detach()):.3f}"
            )
            bar.update()
    return _isometry(a).detach()


def _isometry(a: Float[Tensor, "width d_dense"]) -> Float[Tensor, "width d_dense"]:
    root = torch.linalg.cholesky(a.T @ a)
    return torch.linalg.solve_triangular(root, a.T, upper=False).T


@torch.no_grad()
def copy_weights(sparse: SparseTransformer, hf: PreTrainedModel, frame: Float[Tensor, "d_sparse d_dense"]) -> None:
    """The dense model's weights as the sparse model's, its stream turned by `frame`; the same function at topk 1."""
    body: Any = hf.transformer
    frame = frame.to(body.wte.weight.device)
    # The turned stream has the same length in d_sparse channels, so that its RMS is smaller.
    shrink = math.sqrt(frame.shape[1] / frame.shape[0])

    def read(linear: Any, weight: Tensor, bias: Tensor | None, norm: Any) -> None:
        linear.weight.copy_((weight * norm.weight * shrink).float() @ frame.T)
        if bias is not None:
            linear.bias.copy_(bias + weight @ norm.bias)

    def write(linear: Any, weight: Tensor, bias: Tensor) -> None:
        linear.weight.copy_((_centred(weight.float()) @ frame.T).T)
        linear.bias.copy_(frame @ _centred(bias.float()))

    sparse.token_embed.weight.copy_(_centred(body.wte.weight.float()) @ frame.T)
    sparse.pos_embed.weight.copy_((_centred(body.wpe.weight.float()) @ frame.T)[: sparse.n_ctx])
    blocks: Any = sparse.blocks
    for theirs, ours in zip(body.h, blocks, strict=True):
        read(ours.attn.qkv, theirs.attn.c_attn.weight.T, theirs.attn.c_attn.bias, theirs.ln_1)
        write(ours.attn.out, theirs.attn.c_proj.weight, theirs.attn.c_proj.bias)
        read(ours.mlp.fc, theirs.mlp.c_fc.weight.T, theirs.mlp.c_fc.bias, theirs.ln_2)
        write(ours.mlp.out, theirs.mlp.c_proj.weight, theirs.mlp.c_proj.bias)
    head: Any = hf.get_output_embeddings()
    read(sparse.unembedding, head.weight, None, body.ln_f)
    sparse.logits_bias.copy_(head.weight @ body.ln_f.bias)
    if sparse.cfg.bigram != "none":  # whatever it was made of, the dense model has none
        sparse.bigram.zero_()


def _centred(rows: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
    return rows - rows.mean(-1, keepdim=True)


def _activation(dense: PretrainedConfig) -> str:
    names = ("activation_function", "hidden_act")
    return next((str(kind) for name in names if (kind := getattr(dense, name, None))), "other")

"""What the basis of `--start-from dense` is worth before any training.

The basis that is chosen stands beside the stream's own axes and a random turn. For a GPT-2 it builds the sparse model
that begins as the dense one, lets AbsTopK and projection take away their share, and prints the cross-entropy on
held-out text as a Markdown table. Nothing is trained.

Example:
    python scripts/studies/dense_start.py runs/code/dense --topk 0.5 0.25 --kept 0.5 0.25 --widths 256 512
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated

import torch
import tyro
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from bridges.config import RunConfig
from bridges.dense import DenseModel
from bridges.dense_start import check_dense_start, copy_weights, sparsest_frame, stream_sample, stream_weights
from bridges.loading import load_lm
from bridges.packaged import dense_source
from bridges.shape import fit_to
from interventions.cli.options import report_errors
from sparse_model.config import SparseConfig, SparsityConfig, require
from sparse_model.data.prepare import prepare_corpus
from sparse_model.data.tokenizer import load_tokenizer
from sparse_model.model.transformer import SparseTransformer
from sparse_model.sparsity.projection import project_
from sparse_model.training.losses import next_token_loss

STREAM = ("attn_in", "attn_out", "mlp_in", "mlp_out")
"""Where AbsTopK sees the stream's basis; queries, keys, values and neurons have none to choose."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the basis of `--start-from dense` is worth before any training."""

    dense: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DENSE")]
    """Folder of a GPT-2 with its tokenizer, such as RUN/dense, or the name of a packaged bundle."""
    corpus: str = "stdlib"
    """Text on which the basis is chosen and, held out, the loss is measured."""
    corpus_tokens: int = 1_000_000
    """Tokens of it."""
    topk: tuple[float, ...] = (0.5, 0.25)
    """Shares that AbsTopK keeps; at a width above the dense model's, of as many channels as that has."""
    kept: tuple[float, ...] = (0.5, 0.25)
    """Weights that projection keeps of each matrix, as shares of the dense model's, at every width alike."""
    widths: tuple[int, ...] = ()
    """Widths of the sparse stream; unset: the dense model's."""
    eval_tokens: int = 8192
    """Held-out tokens."""
    seed: int = 0
    """Seeds the choice of the basis and the random turn."""

    def __post_init__(self) -> None:
        for share in (*self.topk, *self.kept):
            require(0 < share <= 1, "topk, kept", share, "must lie in (0, 1]")


def main(options: Options) -> list[tuple[str, float, float, float]]:
    """Print the table; returns its rows: basis, AbsTopK's share, the share of weights, cross-entropy in nats."""
    source = dense_source(options.dense)
    hf = load_lm(source).eval()
    config = RunConfig(dense=options.dense, corpus=options.corpus, corpus_tokens=options.corpus_tokens)
    config = fit_to(replace(config, start_from="dense"), hf.config)
    check_dense_start(config.sparse, hf.config)
    blocks = prepare_corpus(config, load_tokenizer(source))
    held_out = blocks.val[: max(1, options.eval_tokens // blocks.val.shape[1])].long()
    whole, rows = hf.config.n_embd, []
    with torch.no_grad():
        print(f"dense model: {float(next_token_loss(DenseModel(hf)(held_out), held_out)):.3f} nats\n")
    print("| basis | AbsTopK keeps | weights kept | cross-entropy |\n|---|---|---|---|")
    for width in options.widths or (whole,):
        for name, frame_of in _bases(hf, blocks.train, width, options.seed).items():
            for topk, kept in [(share, 1.0) for share in options.topk] + [(1.0, share) for share in options.kept]:
                active, nonzeros = max(1, int(topk * whole)), max(1, int(kept * whole))
                shape = replace(config.sparse, d_model=width, topk_locations=STREAM)
                loss = _loss(shape, hf, frame_of(active, nonzeros), active / width, nonzeros / width, held_out)
                rows.append((f"{name}, width {width}", topk, kept, loss))
                print(f"| {rows[-1][0]} | {topk:g} | {kept:g} | {loss:.2f} |", flush=True)
    return rows


def _bases(
    hf: PreTrainedModel, blocks: Int[Tensor, "block pos"], width: int, seed: int
) -> dict[str, Callable[[int, int], Float[Tensor, "width d_dense"]]]:
    """By name: a function of how many entries of a read and of a neuron's weights are kept."""
    torch.manual_seed(seed)
    whole = hf.config.n_embd
    reads, weights = stream_sample(hf, blocks), stream_weights(hf)
    turn = torch.linalg.qr(torch.randn(width, width))[0][:, :whole]
    chosen = {"chosen": lambda active, nonzeros: sparsest_frame(reads, weights, width, active, nonzeros, progress=True)}
    return {"axes": lambda *_: torch.eye(width, whole), "random turn": lambda *_: turn} | chosen


@torch.no_grad()
def _loss(
    shape: SparseConfig,
    hf: PreTrainedModel,
    frame: Float[Tensor, "width d_dense"],
    topk: float,
    kept: float,
    held_out: Int[Tensor, "block pos"],
) -> float:
    sparse = SparseTransformer(shape)
    copy_weights(sparse, hf, frame)
    sparse.keep_activations(topk)
    project_(sparse.sparse_parameters(kept, None, 1.0), SparsityConfig(nonzero_fraction=kept, anneal_stop=0.0))
    return float(next_token_loss(sparse(held_out), held_out))


if __name__ == "__main__":
    with report_errors():
        main(tyro.cli(Options, description=__doc__))

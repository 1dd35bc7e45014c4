"""torch.compile of the sublayers, run by test_compile.py as a process of its own: shape checks cannot be compiled."""

import dataclasses

import torch
from torch._dynamo.testing import CompileCounter

from sparse_model.config import SparseConfig
from sparse_model.model.transformer import SparseTransformer

SMALL = SparseConfig(d_model=32, d_mlp=64, n_heads=2, n_ctx=12, d_vocab=40)


def same_numbers(cfg: SparseConfig) -> None:
    """Logits and gradients of the compiled model are those of the model."""
    torch._dynamo.reset()
    model, tokens = SparseTransformer(cfg), torch.randint(cfg.d_vocab, (2, 12))
    expected = model(tokens)
    wanted = torch.autograd.grad(expected.square().sum(), list(model.blocks.parameters()))
    model.compile_sublayers(backend="aot_eager", fullgraph=True)
    logits = model(tokens)
    torch.testing.assert_close(logits, expected)
    found = torch.autograd.grad(logits.square().sum(), list(model.blocks.parameters()))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def two_graphs(n_layers: int) -> None:
    """One graph for all attentions and one for all MLPs, whatever the depth."""
    torch._dynamo.reset()
    model = SparseTransformer(dataclasses.replace(SMALL, n_layers=n_layers))
    counter = CompileCounter()
    model.compile_sublayers(backend=counter, fullgraph=True)
    for _ in range(2):
        model(torch.randint(40, (2, 12)))
    assert counter.frame_count == 2, counter.frame_count


if __name__ == "__main__":
    torch.manual_seed(0)
    same_numbers(SMALL)
    same_numbers(dataclasses.replace(SMALL, sink=True))
    same_numbers(dataclasses.replace(SMALL, positions="concat_learned", d_pos=4))
    two_graphs(1)
    two_graphs(4)

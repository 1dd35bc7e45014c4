"""Attention as if tokens stood in a prompt more often, against prompts in which they do."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from interventions.circuits.attention import as_if_repeated, looks
from interventions.circuits.node_model import NodeModel, as_nodes
from interventions.tasks.base import TaskBatch
from sparse_model.config import SparseConfig
from sparse_model.model.transformer import SparseTransformer

ONCE, OFTEN, TIMES = [5, 9, 7, 3], [5, 9, 9, 9, 7, 7, 3], torch.tensor([[1.0, 3.0, 2.0, 1.0]])


def sparse_nodes(n_layers: int = 1) -> NodeModel:
    torch.manual_seed(0)
    shape = SparseConfig(n_layers=n_layers, d_model=16, d_mlp=16, n_heads=2, d_head=8, n_ctx=16, d_vocab=12, sink=True)
    return as_nodes(SparseTransformer(shape))


def gpt2_nodes() -> NodeModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=12, n_positions=16, n_embd=16, n_layer=1, n_head=2, initializer_range=0.5)
    model = GPT2LMHeadModel(config).eval()
    torch.nn.init.zeros_(model.transformer.wpe.weight)
    return as_nodes(model)


@torch.no_grad()
@pytest.mark.parametrize("make", [sparse_nodes, gpt2_nodes])
def test_tokens_that_count_more_often_are_copies_of_them(make) -> None:  # type: ignore[no-untyped-def]
    model = make()
    plain = model.logits(torch.tensor([ONCE]))[:, -1]
    with as_if_repeated(model, TIMES):
        found = model.logits(torch.tensor([ONCE]))[:, -1]
    torch.testing.assert_close(found, model.logits(torch.tensor([OFTEN]))[:, -1], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found, plain, atol=1e-2)
    torch.testing.assert_close(model.logits(torch.tensor([ONCE]))[:, -1], plain)  # and nothing is left behind


@torch.no_grad()
@pytest.mark.parametrize("make", [sparse_nodes, gpt2_nodes])
def test_only_the_heads_that_are_named_count(make) -> None:  # type: ignore[no-untyped-def]
    model, tokens = make(), torch.tensor([ONCE])
    found = {}
    for heads in (None, [(0, 0)], [(0, 1)], [(0, 0), (0, 1)], []):
        with as_if_repeated(model, TIMES, heads):
            found[str(heads)] = model.logits(tokens)[:, -1]
    torch.testing.assert_close(found["None"], found["[(0, 0), (0, 1)]"])
    torch.testing.assert_close(found["[]"], model.logits(tokens)[:, -1])
    different = [found[str(heads)] for heads in (None, [(0, 0)], [(0, 1)], [])]
    assert all(not torch.allclose(a, b, atol=1e-3) for i, a in enumerate(different) for b in different[:i])


def test_other_models_are_refused() -> None:
    model = sparse_nodes()
    model.module = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="a Linear cannot be repeated"), as_if_repeated(model, TIMES):
        pass


@torch.no_grad()
def test_how_uneven_a_head_looks_is_half_the_distance_from_an_even_average() -> None:
    model = sparse_nodes(2)
    tokens = torch.tensor([[[1, 2, 3, 4], [1, 5, 3, 4]], [[6, 7, 8, 0], [6, 9, 8, 0]]])
    batch = TaskBatch(tokens, torch.tensor([[1, 2], [1, 2]]), torch.tensor([3, 2]), [("", "")] * 2)
    seen: list[torch.Tensor] = []

    def keep(pattern: torch.Tensor, hook: object) -> None:
        seen.append(pattern)

    module = model.module
    assert isinstance(module, SparseTransformer)
    module.run_with_hooks(tokens.flatten(0, 1), fwd_hooks=[("blocks.1.attn.hook_pattern", keep)])
    wanted = []
    for row, last in enumerate((3, 3, 2, 2)):
        weights = seen[0][row, 1, last, : last + 1]
        wanted.append(sum(abs(float(weight) - 1 / (last + 1)) for weight in weights) / 2)
    assert looks(model, [(1, 1)], batch)[1, 1].uneven == pytest.approx(sum(wanted) / 4, abs=1e-5)
    onto = looks(model, [(1, 1)], batch, onto=torch.tensor([0, 2]))[1, 1].first
    assert onto == pytest.approx(float(seen[0][[0, 1, 2, 3], 1, [3, 3, 2, 2], [0, 0, 2, 2]].mean()), abs=1e-5)
    module.blocks[1].attn.qkv.weight.zero_()  # type: ignore[union-attr,operator]
    module.blocks[1].attn.qkv.bias.zero_()  # type: ignore[union-attr,operator]
    module.blocks[1].attn.sink_logit.fill_(-100.0)  # type: ignore[union-attr,operator]
    assert looks(model, [(1, 1)], batch)[1, 1].uneven == pytest.approx(0, abs=1e-6)

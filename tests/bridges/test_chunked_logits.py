"""Losses on logits in chunks: the whole loss and its gradient, whatever the chunk; what is kept, what made again."""

import pytest
import torch
from torch import nn

from bridges.chunked_logits import Target, head_backward, rows_at_once
from bridges.losses import kl
from sparse_model.training.losses import token_loss

WIDTH, VOCAB, TOKENS = 6, 9, 7


class Head(nn.Module):
    """A model of which only the unembedding is used; the tokens pick a bigram row. Counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(VOCAB, WIDTH, dtype=torch.float64))
        self.bigram = nn.Parameter(torch.randn(VOCAB, VOCAB, dtype=torch.float64))
        self.calls: list[int] = []

    n_layers, d_model = 1, WIDTH

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        raise AssertionError

    sublayer = embed

    def unembed(self, resid: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        assert resid.shape[:2] == tokens.shape
        self.calls.append(tokens.shape[1])
        return resid @ self.weight.T + self.bigram[tokens]


@pytest.fixture
def head() -> Head:
    return Head()


@pytest.fixture
def resid() -> torch.Tensor:
    return torch.randn(TOKENS, WIDTH, dtype=torch.float64)


@pytest.fixture
def seen() -> torch.Tensor:
    return torch.randint(VOCAB, (TOKENS,))


@pytest.mark.parametrize(("rows", "chunks"), [(1, [1] * 7), (3, [3, 3, 1]), (7, [7]), (50, [7])])
def test_every_chunk_size_gives_the_loss_and_gradient_of_the_whole(
    head: Head, resid: torch.Tensor, seen: torch.Tensor, rows: int, chunks: list[int]
) -> None:
    following = torch.randint(VOCAB, (TOKENS,))
    graph = resid.clone().requires_grad_()
    loss = token_loss(head.unembed(graph[None], seen[None])[0], following)
    wanted = torch.autograd.grad(3 * loss, [graph, head.weight, head.bigram])
    head.calls.clear()
    source = resid.clone().requires_grad_()
    found = head_backward(
        head, source * 1, seen, lambda logits, part: token_loss(logits, following[part]), scale=3.0, rows=rows
    )
    assert head.calls == chunks
    assert found.loss.item() == pytest.approx(loss.item())
    assert not found.loss.requires_grad
    assert source.grad is None
    for got, want in zip((found.grad, head.weight.grad, head.bigram.grad), wanted, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(("rows", "calls"), [(7, [7]), (8, [7]), (6, [4, 3])])
def test_a_target_is_kept_only_where_it_fits_into_one_chunk(
    head: Head, resid: torch.Tensor, seen: torch.Tensor, rows: int, calls: list[int]
) -> None:
    whole = head.unembed(resid[None], seen[None])[0]
    head.calls.clear()
    target = Target(head, resid, seen, rows)
    parts = [target(slice(0, 4)), target(slice(4, 7))]
    assert head.calls == calls
    torch.testing.assert_close(torch.cat(parts), whole)
    assert not parts[0].requires_grad


@pytest.mark.parametrize(
    ("vocab", "logits", "rows"), [(10, 100, 10), (10, 109, 10), (10, 5, 1), (10, 10, 1), (1, 3, 3)]
)
def test_rows_at_once(vocab: int, logits: int, rows: int) -> None:
    assert rows_at_once(vocab, logits) == rows


def test_the_kl_in_chunks_is_that_of_the_whole(head: Head, resid: torch.Tensor, seen: torch.Tensor) -> None:
    other = Head()
    target = Target(other, resid, seen, rows=2)
    found = head_backward(head, resid, seen, lambda logits, part: kl(target(part), logits), rows=2)
    whole = kl(other.unembed(resid[None], seen[None])[0], head.unembed(resid[None], seen[None])[0])
    assert found.loss.item() == pytest.approx(whole.item())
    assert other.weight.grad is None

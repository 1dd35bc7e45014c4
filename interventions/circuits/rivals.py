"""What the controls of a circuit are taken on: nonsense tasks, redrawn weights, frozen norms, other nodes."""

import copy
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from interventions.circuits.node_model import Kept, Matrix, NodeEdit, NodeModel, Values, as_nodes, device_of
from interventions.tasks.base import TaskBatch
from sparse_model.model.transformer import RMSNorm


def scrambled(batch: TaskBatch, *, seed: int) -> TaskBatch:
    """The pairs with their two answers exchanged by a coin: the same prompts and answers, and nothing to learn.

    A circuit that reaches the target here was fitted to the prompts themselves.
    """
    coin = torch.rand(len(batch.last), 1, generator=torch.Generator().manual_seed(seed)) < 0.5
    return _exchanged(batch, coin)


def by_word(train: TaskBatch, selection: TaskBatch, *, seed: int) -> tuple[TaskBatch, TaskBatch]:
    """Both splits with the answers of a pair exchanged where one of its words is of an arbitrary class.

    The word stands where the two members of every pair agree and no one token makes up half of the training pairs,
    nearest to the end of the prompt. Its tokens are dealt to two classes at random, evenly over the training pairs; the
    rule holds in both splits. So the mapping means nothing but can be learned, from the task's feature and a word
    together: a circuit that reaches the target here shows that pruning finds what the model was never trained to do.

    Raises ValueError for prompts without such a word.
    """
    splits = (train, selection)
    for back in range(min(int(batch.last.min()) for batch in splits)):
        words = [batch.tokens[torch.arange(len(batch.last)), :, batch.last - back] for batch in splits]
        _, counts = words[0][:, 0].unique(return_counts=True)
        if all((word[:, 0] == word[:, 1]).all() for word in words) and 2 * int(counts.max()) < len(words[0]):
            half = _half_of(words[0][:, 0], seed)
            first, second = (
                _exchanged(batch, torch.isin(word[:, :1].cpu(), half))
                for batch, word in zip(splits, words, strict=True)
            )
            return first, second
    raise ValueError("no word of the prompts varies and is shared by the members of every pair: take longer prompts")


def _half_of(word: Int[Tensor, " pair"], seed: int) -> Int[Tensor, " token"]:
    """Tokens that about half of the pairs have, drawn at random."""
    counts = Counter(word.tolist())
    tokens, half, total = sorted(counts), [], 0
    random.Random(seed).shuffle(tokens)
    for token in tokens:
        if 2 * total + counts[token] <= len(word):
            half.append(token)
            total += counts[token]
    return torch.tensor(half)


def _exchanged(batch: TaskBatch, which: Bool[Tensor, "pair 1"]) -> TaskBatch:
    return batch._replace(answers=torch.where(which.to(batch.answers.device), batch.answers.flip(1), batch.answers))


@torch.no_grad()
def redrawn(model: NodeModel, *, seed: int) -> NodeModel:
    """A copy with every weight redrawn: normal, at the same nonzero positions, at each tensor's own RMS over them.

    Embeddings, biases and the bigram table too; not the norms' gains and the attention sinks.
    """
    module = copy.deepcopy(model.module)
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        parts = name.split(".")
        mask = p != 0
        if not mask.any() or "sink_logit" in parts or any(part.startswith("ln") for part in parts):
            continue
        rms = p[mask].double().square().mean().sqrt().to(p.dtype)
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float32).to(p)
        p.copy_(torch.where(mask, rms * noise, 0))
    return as_nodes(module)


class FrozenNorms:
    """A model whose norms divide by what they divide by in the whole model on the same tokens.

    With live norms a deleted node also rescales every other one that is read later, so pruning can shift a circuit's
    values by deleting nodes that carry nothing (the published criticism). Frozen, a node acts by its weights alone.
    """

    def __init__(self, model: NodeModel) -> None:
        self.kind, self.module, self.shape = model.kind, model.module, model.shape
        self._model = model
        self._norms = [m for m in self.module.modules() if isinstance(m, RMSNorm | nn.LayerNorm)]

    def logits(
        self, tokens: Int[Tensor, "batch pos"], edit: NodeEdit | None = None, last: Int[Tensor, " batch"] | None = None
    ) -> Float[Tensor, "batch answer_pos d_vocab"]:
        """As `NodeModel.logits`, after a pass without `edit` that the scales are taken from."""
        if edit is None:
            return self._model.logits(tokens, None, last)
        scales: dict[nn.Module, Tensor] = {}
        with torch.no_grad(), self._hooked(partial(_note_scale, scales)):
            self._model.logits(tokens, None, last)
        with self._hooked(partial(_rescale, scales)):
            return self._model.logits(tokens, edit, last)

    @contextmanager
    def _hooked(self, hook: partial) -> Iterator[None]:
        with ExitStack() as stack:
            for norm in self._norms:
                stack.callback(norm.register_forward_hook(hook).remove)
            yield

    def visit(self, tokens: Int[Tensor, "batch pos"], note: NodeEdit) -> None:
        """As `NodeModel.visit`: nothing is edited, so norms are those of the whole model anyway."""
        self._model.visit(tokens, note)

    def matrices(self) -> Iterator[Matrix]:
        """Those of the model."""
        return self._model.matrices()


def _centred(norm: nn.Module, x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True) if isinstance(norm, nn.LayerNorm) else x


def _note_scale(scales: dict[nn.Module, Tensor], norm: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    eps = norm.eps if isinstance(norm, nn.LayerNorm) else torch.finfo(inputs[0].dtype).eps
    scales[norm] = (_centred(norm, inputs[0]).square().mean(-1, keepdim=True) + eps).sqrt()


def _rescale(scales: dict[nn.Module, Tensor], norm: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    weight, bias = norm.get_parameter("weight"), getattr(norm, "bias", None)
    value = _centred(norm, inputs[0]) / scales[norm] * weight
    return value if bias is None else value + bias


def random_nodes(model: NodeModel, kept: Kept, batch: TaskBatch, draws: int, *, seed: int) -> Iterator[Kept]:
    """Sets of nodes outside the circuit, as many at each location as it has there.

    Nodes whose value varies over the prompts' tokens come first; the others fill up where those are too few.
    """
    alive = _varying(model, batch)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(draws):
        drawn = {}
        for name, mask in kept.items():
            order = torch.rand(len(mask), generator=generator) + alive[name].cpu().float() - 2.0 * mask.cpu().float()
            drawn[name] = torch.zeros_like(mask)
            # Where the circuit has more than half of a location, there are not as many others.
            count = min(int(mask.sum()), int((~mask).sum()))
            drawn[name][order.argsort(descending=True)[:count]] = True
        yield drawn


@torch.no_grad()
def _varying(model: NodeModel, batch: TaskBatch) -> dict[str, Bool[Tensor, " width"]]:
    varying = {}

    def note(name: str, values: Values) -> Values:
        flat = values.flatten(0, 1)
        varying[name] = (flat != flat[0]).any(0)
        return values

    tokens = batch.tokens[..., : int(batch.last.max()) + 1].flatten(0, 1).to(device_of(model))
    model.visit(tokens, note)
    return varying

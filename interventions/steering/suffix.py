"""The dense model from an edited site on, for prompts of which an edit reaches only the last tokens.

What lies before the site, and what lies before the first edited token, is the same under every edit:

1. One unedited pass keeps the residual stream at the site from that token on, and the keys and values that later
   attentions read of the tokens before it.
2. An edited pass starts there. In the last layer only the last token asks, and behind the last attention it alone goes
   on; at the last MLP one token of each prompt is all there is to compute.

So it is never more than a pass over the edited tokens with a KV cache, and the later the site, the less. The sublayers
are GPT-2's own modules; attention is written out, for edits in one pass share the keys before the first edited token.
Prompts with as many edited tokens go in one pass, however many come before: shorter pasts are padded and not seen.
Models of other families go whole from the site on, with the sublayers of `bridges.families`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import gelu, pad
from transformers import PreTrainedModel
from transformers.activations import NewGELUActivation

from bridges.dense import DenseModel
from bridges.families import Anatomy, ReadNorm
from bridges.hybrid import advance
from bridges.sites import Site
from interventions.editing.where import Where

Stream = Float[Tensor, "..."]
"""Of [row, pos, d_dense], with dimensions of edits before them or without."""


class _Past(NamedTuple):
    """What a layer's attention reads of the tokens before the first edited one."""

    keys: Float[Tensor, "row head prefix d_head"]
    values: Float[Tensor, "row head prefix d_head"]


class _Rows(NamedTuple):
    """Prompts whose edits begin at the same token, as one unedited pass leaves them."""

    stream: Float[Tensor, "row pos d_dense"]
    past: dict[int, _Past]
    start: int


@runtime_checkable  # for the shape checks of tests
class Suffix(Protocol):
    """Logits behind the last token of prompts of one length, under edits of the tokens from `start` on."""

    @property
    def tokens_at_once(self) -> int:
        """How many tokens of each prompt, the last ones, an edit is given for."""

    def logits(
        self, edits: Float[Tensor, "edit row pos d_dense"] | None, strengths: Float[Tensor, " strength"]
    ) -> Float[Tensor, "strength edit row vocab"]:
        """Logits under every edit at every strength; of one unedited pass where there are no edits."""


def suffix_of(hf: PreTrainedModel, parts: Sequence[tuple[Tensor, int]], site: int, where: Where) -> Suffix:
    """The quickest way from a site on: tokens and their first edited one, with as many from there on in every part.

    Tokens are [row, pos], as many columns as the part's prompts are long; the rows of the parts follow each other.
    Raises ValueError for parts of another family than GPT-2, which go alone.
    """
    if hf.config.model_type == "gpt2":
        return GPT2Suffix(hf, parts, site, where)
    if len(parts) > 1:
        raise ValueError(f"{len(parts)} parts: a {hf.config.model_type} takes prompts of one length")
    return FamilySuffix(hf, *parts[0], site, where)


class FamilySuffix:
    """A `Suffix` of any family: all tokens, from the site on."""

    @torch.no_grad()
    def __init__(
        self, hf: PreTrainedModel, tokens: Int[Tensor, "row pos"], start: int, site: int, where: Where
    ) -> None:
        self._dense, self._start, self.site, self.where = DenseModel(hf), start, site, where
        self._stream = self._dense.embed(tokens)
        for i in range(site):
            self._stream = self._dense.sublayer(i, self._stream)
        self.tokens_at_once = tokens.shape[1] - start

    @torch.no_grad()
    def logits(
        self, edits: Float[Tensor, "edit row pos d_dense"] | None, strengths: Float[Tensor, " strength"]
    ) -> Float[Tensor, "strength edit row vocab"]:
        """As `Suffix.logits`."""
        given = torch.zeros_like(self._stream[None, :, self._start :]) if edits is None else edits
        return torch.stack([self.edited(strength * given) for strength in strengths.to(given)])

    def edited(self, edits: Float[Tensor, "edit row pos d_dense"]) -> Float[Tensor, "edit row vocab"]:
        """Logits under every edit; gradients flow to the edits where they are asked for."""
        dense, stream = self._dense, self._stream.repeat(len(edits), 1, 1)
        change = pad(edits.flatten(0, 1), (0, 0, self._start, 0))
        if self.where == "stream":
            logits = dense.unembed(advance(dense, self.site, stream + change)[:, -1:])
        else:
            norm = dense.anatomy.read_norm(self.site)
            read = dense.anatomy.norm(self.site)(stream.to(dense.dtype))
            read = (read + norm.response(change, norm.scale(stream))).to(dense.dtype)
            if self.site == 2 * dense.n_layers:
                logits = dense.anatomy.head(read[:, -1:])
            else:
                part = dense.anatomy.mlp if self.site % 2 else dense.anatomy.attend
                stream = advance(dense, self.site + 1, stream + part(self.site // 2, read))
                logits = dense.unembed(stream[:, -1:])
        return logits[:, 0].unflatten(0, edits.shape[:2])


class GPT2Suffix:
    """A `Suffix` of GPT-2."""

    @torch.no_grad()
    def __init__(self, hf: PreTrainedModel, parts: Sequence[tuple[Tensor, int]], site: int, where: Where) -> None:
        anatomy = Anatomy(hf)
        sites = range(2 * hf.config.n_layer + 1)
        self._norms = [(anatomy.norm(i), anatomy.read_norm(i)) for i in sites]
        self._body, self._unembed, self.where = anatomy.body, anatomy.head, where
        self.site = Site(site, hf.config.n_layer)
        self.length = parts[0][0].shape[1] - parts[0][1]
        rows = [self._unedited(tokens, start) for tokens, start in parts]
        self._stream = torch.cat([one.stream for one in rows])
        longest = max(one.start for one in rows)
        self._past = {
            i: _Past(*(torch.cat([_padded(one.past[i][k], longest) for one in rows]) for k in (0, 1)))
            for i in rows[0].past
        }
        starts = torch.cat([torch.full((len(one.stream),), one.start) for one in rows]).to(self._stream.device)
        places = torch.arange(longest, device=starts.device)
        self._absent = places < longest - starts[:, None] if len(rows) > 1 else None
        """The places of the padded pasts that are none, for every row."""

    def _unedited(self, tokens: Int[Tensor, "row pos"], start: int) -> _Rows:
        """The stream at the site and the pasts of later attentions."""
        body, site = self._body, self.site.index
        stream = body.wte(tokens) + body.wpe.weight[: tokens.shape[1]]
        kept, past = stream[:, start:], {}
        for i in range(2 * self.site.n_layers):
            if i == site:
                kept = stream[:, start:]
            if i % 2 == 0:
                read = body.h[i // 2].ln_1(stream)
                if i >= site:
                    past[i] = _Past(*self._keys_and_values(i, read[:, :start]))
                stream = stream + self._attention(i, read, None, last_only=False)
            else:
                stream = stream + body.h[i // 2].mlp(body.h[i // 2].ln_2(stream))
        return _Rows(stream[:, start:] if self.site.is_final else kept, past, start)

    @property
    def tokens_at_once(self) -> int:
        """How many tokens of each prompt, the last ones, an edit is given for."""
        return 1 if self.site.index >= 2 * self.site.n_layers - 1 else self.length

    @torch.no_grad()
    def logits(
        self, edits: Float[Tensor, "edit row pos d_dense"] | None, strengths: Float[Tensor, " strength"]
    ) -> Float[Tensor, "strength edit row vocab"]:
        """Logits under every edit at every strength; of one unedited pass where there are no edits."""
        stream, change = self._stream[None, None], None
        if self.tokens_at_once == 1:  # no later sublayer reads the other tokens
            stream = stream[..., -1:, :]
        if edits is not None:
            change = strengths.to(edits)[:, None, None, None, None] * edits
            if self.where == "stream":
                stream, change = (stream + change).to(stream.dtype), None
        for i in range(self.site.index, 2 * self.site.n_layers):
            stream = self._sublayer(i, stream, change)
            change = None
        last = 2 * self.site.n_layers
        return self._unembed(self._read(last, stream, change)[..., -1, :])

    def _sublayer(self, i: int, stream: Stream, change: Stream | None) -> Stream:
        """Site i to site i + 1, the read changed on the way."""
        block, last_layer = self._body.h[i // 2], i // 2 == self.site.n_layers - 1
        read = self._read(i, stream, change)
        if i % 2:
            return stream + _mlp(block.mlp, read)
        written = self._attention(i, read, self._past[i], last_only=last_layer)
        return (stream[..., -1:, :] if last_layer else stream) + written

    def _read(self, i: int, stream: Stream, change: Stream | None) -> Stream:
        return _read(*self._norms[i], stream, change)

    def _keys_and_values(self, i: int, read: Stream) -> tuple[Tensor, Tensor]:
        attention: Any = self._body.h[i // 2].attn
        d = attention.embed_dim
        both = torch.addmm(attention.c_attn.bias[d:], read.flatten(0, -2), attention.c_attn.weight[:, d:])
        keys, values = (
            both.view(*read.shape[:-1], 2 * attention.num_heads, attention.head_dim).transpose(-3, -2).chunk(2, dim=-3)
        )
        return keys, values

    def _attention(self, i: int, read: Stream, past: _Past | None, *, last_only: bool) -> Stream:
        """Causal attention over the tokens given and those before them; `last_only` asks for the last token alone."""
        attention: Any = self._body.h[i // 2].attn
        d = attention.embed_dim
        keys, values = self._keys_and_values(i, read)
        asking = read[..., -1:, :] if last_only else read
        queries = torch.addmm(attention.c_attn.bias[:d], asking.flatten(0, -2), attention.c_attn.weight[:, :d])
        queries = queries.view(*asking.shape[:-1], attention.num_heads, attention.head_dim).transpose(-3, -2)
        scores = queries @ keys.mT
        if not last_only:
            length = read.shape[-2]
            later = torch.ones(length, length, dtype=torch.bool, device=read.device).triu(1)
            scores = scores.masked_fill(later, -torch.inf)
        if past is not None:
            before = _shared(queries, past.keys.mT)
            if self._absent is not None:
                before = before.masked_fill(self._absent[:, None, None, :], -torch.inf)
            scores = torch.cat([before, scores], -1)
        weights = (scores * attention.scaling).softmax(-1)
        if past is None:
            mixed = weights @ values
        else:
            n = past.keys.shape[-2]
            mixed = _shared(weights[..., :n], past.values) + weights[..., n:] @ values
        return attention.c_proj(mixed.transpose(-3, -2).flatten(-2))


def _padded(past: Float[Tensor, "row head prefix d_head"], length: int) -> Float[Tensor, "row head longer d_head"]:
    """A past with zeros before it, as long as the longest."""
    return pad(past, (0, 0, length - past.shape[-2], 0))


def _read(module: nn.Module, norm: ReadNorm, stream: Stream, change: Stream | None) -> Stream:
    """What a norm makes of the stream, and of a small change of it."""
    read: Tensor = module(stream)
    return read if change is None else (read + norm.response(change, norm.scale(stream))).to(stream.dtype)


def _mlp(mlp: Any, read: Stream) -> Stream:
    """GPT-2's MLP; its tanh-GELU, which Hugging Face writes as eight operations, in one."""
    if not isinstance(mlp.act, NewGELUActivation):
        return mlp(read)
    return mlp.c_proj(gelu(mlp.c_fc(read), approximate="tanh"))


def _shared(
    left: Float[Tensor, "*edit row head asking inner"], right: Float[Tensor, "row head inner outer"]
) -> Float[Tensor, "*edit row head asking outer"]:
    """left @ right, without a copy of `right` for every edit: the edits' tokens lie side by side."""
    edits = left.shape[:-4]
    rows = left.flatten(0, -5).movedim(0, 2).flatten(2, 3)  # row head edit*asking inner
    return (rows @ right).unflatten(2, (-1, left.shape[-2])).movedim(2, 0).reshape(*edits, *left.shape[-4:-1], -1)

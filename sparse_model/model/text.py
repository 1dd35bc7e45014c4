"""What lets a model take text: its tokenizer, under TransformerLens' names."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerFast

Prompts = str | Sequence[str] | Int[Tensor, "batch pos"]
"""Texts, each of which begins with end-of-text when it is tokenized, or tokens as they are."""


class ReadsText:
    """Text in and out, for a model whose `tokenizer` is set; opening a run sets it."""

    tokenizer: PreTrainedTokenizerFast | None = None

    def _tokenizer(self) -> PreTrainedTokenizerFast:
        if self.tokenizer is None:
            raise ValueError("this sparse model has no tokenizer: set its .tokenizer (load_tokenizer), or give tokens")
        return self.tokenizer

    def to_tokens(self, prompts: Prompts) -> Int[Tensor, "batch pos"]:
        """Tokens of one text or several, end-of-text first, shorter ones padded with it on the right.

        What follows a token changes nothing at it. Special tokens in a text are text. Tokens come back as they are.
        Raises ValueError without a tokenizer.
        """
        if isinstance(prompts, Tensor):
            return prompts
        tokenizer = self._tokenizer()
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        end_of_text = tokenizer.eos_token_id
        assert isinstance(end_of_text, int)
        rows = [
            [end_of_text, *tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)]
            for text in texts
        ]
        width = max(map(len, rows))
        return torch.tensor([row + [end_of_text] * (width - len(row)) for row in rows])

    def to_string(self, tokens: Int[Tensor, " pos"] | Sequence[int]) -> str:
        """The text of some tokens. Raises ValueError without a tokenizer."""
        return str(self._tokenizer().decode(tokens if isinstance(tokens, Tensor) else list(tokens)))

    def to_str_tokens(self, prompt: str | Int[Tensor, " pos"]) -> list[str]:
        """Each token of a text, or of tokens, as text. Raises ValueError without a tokenizer."""
        tokens = self.to_tokens(prompt)[0] if isinstance(prompt, str) else prompt
        return [self.to_string([token]) for token in tokens.tolist()]

    def to_single_token(self, text: str) -> int:
        """The id of a text that is one token; ValueError for one that is not."""
        ids = self._tokenizer().encode(text, add_special_tokens=False, split_special_tokens=True)
        if len(ids) != 1:
            raise ValueError(f"{text!r} is {len(ids)} tokens, {[self.to_string([i]) for i in ids]}, not one")
        return ids[0]

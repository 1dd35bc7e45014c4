"""Text sampled from the dense model itself, for a model whose training text is not at hand: the source `self`.

1. Documents begin with the tokenizer's beginning-of-text token (end-of-text where it has none), and with prompts in
   turn where there are any, and end at end-of-text or at a length.
2. Every batch has a seed of its own and is written as soon as it is drawn: a kill loses one batch.
3. The finished file lies in the cache under a name derived from the model's weights and from all options, and in the
   run's folder. Documents are kept as text, so that they are one source among others.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from bridges.config import RunConfig, SampleConfig
from sparse_model.config import require
from sparse_model.data.cache import cache_folder, one_builder
from sparse_model.data.encoding import encode_text
from sparse_model.data.sources import SELF, parse_spec
from sparse_model.data.tokenizer import tokenizer_fingerprint
from sparse_model.io.atomic import failed_writes_named, replace_file, replace_folder
from sparse_model.io.progress import progress_bar
from sparse_model.io.reading import typed_line
from sparse_model.training.identity import digest_of

logger = logging.getLogger(__name__)

SAMPLES = "self.jsonl"
"""The file of samples, in the cache and in a run's folder."""

_VERSION = 1
_LONGEST = 1024
_MARGIN = 1.15  # a twentieth is held out, and the source should not end before its share is full


class Document(NamedTuple):
    """One sampled document, as a row of the file."""

    text: str
    tokens: int
    ended: bool
    """Whether it ended with end-of-text, before the length at which it would have been cut."""
    same: bool
    """Whether its text is tokenized as it was sampled."""


def share_of_self(spec: str) -> float:
    """The share of a corpus that is to be sampled."""
    return sum((entry.share for entry in parse_spec(spec) if entry.name == SELF), 0.0)


def sample_documents(
    config: RunConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    device: torch.device | None = None,
    *,
    progress: bool = True,
) -> Path:
    """The file of documents that a run's corpus takes from its dense model, sampled now where it is not there yet.

    device: where it is sampled; None: where the model is, and where it is again afterwards.

    Raises ValueError for a tokenizer without end-of-text token and for prompts that are empty or too long.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer of {config.dense} has no end-of-text token, with which sampled documents end: set "
            "eos_token in its tokenizer_config.json"
        )
    options, longest = config.samples, _longest(config, model)
    prompts = _prompts(options, tokenizer, longest)
    wanted = int(_MARGIN * share_of_self(config.corpus) * config.corpus_tokens)
    parts = [_VERSION, digest_of(model.parameters()), tokenizer_fingerprint(tokenizer), longest, prompts, wanted]
    key = json.dumps([*parts, {name: value for name, value in asdict(options).items() if name != "prompts"}])
    folder = cache_folder() / f"self-{hashlib.sha256(key.encode()).hexdigest()[:24]}"
    if not folder.exists():
        with one_builder(folder):
            if not folder.exists():
                own = model.device
                try:
                    model.to(device or own)  # type: ignore[arg-type]
                    _sample(options, model, tokenizer, prompts, longest, wanted, folder, progress)
                finally:
                    model.to(own)  # type: ignore[arg-type]
    _warn(folder / SAMPLES, longest)
    return folder / SAMPLES


def keep_samples(samples: Path, folder: Path) -> None:
    """Copy a file of samples into a run's folder; nothing where it lies there."""
    if not (folder / SAMPLES).exists():
        with replace_file(folder / SAMPLES) as temporary:
            shutil.copy2(samples, temporary)


def _longest(config: RunConfig, model: PreTrainedModel) -> int:
    context = model.config.max_position_embeddings
    longest = config.samples.longest or min(context, _LONGEST)
    require(longest <= context, "samples.longest", longest, f"the dense model's context holds {context} tokens")
    return longest


def _prompts(options: SampleConfig, tokenizer: PreTrainedTokenizerFast, longest: int) -> list[list[int]]:
    """What documents begin with, in turn: the token that begins a text, then a prompt where there are any."""
    begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    assert isinstance(begin, int)
    if options.prompts is None:
        return [[begin]]
    path = Path(options.prompts).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"samples.prompts={options.prompts!r} is no file: give a text file, a prompt a line")
    lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    require(bool(lines), "samples.prompts", options.prompts, "the file holds no prompt: write one a line")
    prompts = [[begin, *encode_text(tokenizer, line)] for line in lines]
    for line, ids in zip(lines, prompts, strict=True):
        if len(ids) >= longest:
            raise ValueError(
                f"{path}: the prompt {line[:40]!r} has {len(ids)} tokens, and documents at most {longest}: shorten it, "
                "or raise samples.longest"
            )
    return prompts


def _sample(
    options: SampleConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[list[int]],
    longest: int,
    wanted: int,
    folder: Path,
    progress: bool,
) -> None:
    """Draw batches until there are as many tokens as wanted, from where an earlier process stopped."""
    part = folder.with_name(f"{folder.name}.part.jsonl")
    drawn = _whole_batches(part, options.batch_size)
    tokens, batch = sum(document.tokens for document in drawn), len(drawn) // options.batch_size
    if drawn:
        logger.info("going on with the sampling from the dense model at %d of %d tokens", tokens, wanted)
    bar = progress_bar(
        total=wanted, initial=tokens, unit=" tokens", unit_scale=True, desc="sampling", disable=not progress
    )
    with bar, failed_writes_named(part), part.open("a", encoding="utf-8") as file:
        while tokens < wanted:
            numbers = range(batch * options.batch_size, (batch + 1) * options.batch_size)
            begun = [prompts[number % len(prompts)] for number in numbers]
            documents = list(_draw(options, model, tokenizer, begun, longest, batch))
            file.write("".join(json.dumps(document._asdict()) + "\n" for document in documents))
            file.flush()
            os.fsync(file.fileno())
            new = sum(document.tokens for document in documents)
            tokens, batch = tokens + new, batch + 1
            bar.update(new)
    with replace_folder(folder) as temporary:
        shutil.copy2(part, temporary / SAMPLES)
    part.unlink()


def _whole_batches(part: Path, batch_size: int) -> list[Document]:
    """The documents of the batches that were written whole; what follows them in the file is cut off."""
    if not part.exists():
        part.parent.mkdir(parents=True, exist_ok=True)
        return []
    documents, ends = [], [0]
    with part.open("rb") as lines:
        for line in lines:
            try:
                documents.append(typed_line(Document, line.decode("utf-8"), str(part), ""))
            except ValueError:
                break
            if not line.endswith(b"\n"):
                documents.pop()
                break
            ends.append(ends[-1] + len(line))
    whole = len(documents) // batch_size * batch_size
    os.truncate(part, ends[whole])
    return documents[:whole]


@torch.no_grad()
def _draw(
    options: SampleConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    begun: list[list[int]],
    longest: int,
    batch: int,
) -> Iterator[Document]:
    """One batch of documents; the same whenever it is drawn on the same kind of device."""
    end, width = tokenizer.eos_token_id, max(map(len, begun))
    device = next(model.parameters()).device
    ids: Int[Tensor, "doc pos"] = torch.tensor([[end] * (width - len(row)) + row for row in begun], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in begun], device=device)
    how = GenerationConfig(
        do_sample=True,
        temperature=options.temperature,
        top_k=0,
        top_p=1.0,
        max_length=longest,
        eos_token_id=end,
        pad_token_id=end,
        use_cache=True,
    )
    own, model.generation_config = model.generation_config, how  # its own settings would fill in what is left open
    seed = hashlib.blake2b(f"{options.seed}:{batch}".encode(), digest_size=7).digest()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(int.from_bytes(seed, "big"))
            drawn = model.generate(input_ids=ids, attention_mask=mask, generation_config=how)  # type: ignore[operator]
    finally:
        model.generation_config = own
    for row, prompt in zip(drawn[:, width:].tolist(), begun, strict=True):
        ended = end in row
        document = prompt[1:] + (row[: row.index(end)] if ended else row)
        text = tokenizer.decode(document, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        yield Document(text, len(document), ended, encode_text(tokenizer, text) == document)


def _warn(samples: Path, longest: int) -> None:
    with samples.open(encoding="utf-8") as rows:
        again = "remove it, and it is sampled again"
        if not any(typed_line(Document, row, str(samples), again).ended for row in rows):
            logger.warning(
                "no document that the dense model sampled ended by itself, as with a model that was trained without "
                "end-of-text: each is cut at %d tokens, the held-out ones too",
                longest,
            )

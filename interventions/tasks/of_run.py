"""A run's tasks: for its tokenizer and context, with natural prompts from what its corpus holds out."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerFast

from bridges.run_folder import Run, samples_in
from interventions.tasks.base import Task
from interventions.tasks.catalogue import TaskName, get_task
from interventions.tasks.files import is_task_file
from interventions.tasks.names import NATURAL, PromptKind
from interventions.tasks.record import task_option
from sparse_model.config import TrainConfig
from sparse_model.data.corpus import CorpusConfig, check_read_here, open_sources
from sparse_model.data.pieces import head_of
from sparse_model.data.prepare import corpus_config
from sparse_model.data.sources import GeneratedSource, Source, parse_spec
from sparse_model.io.reading import read_typed

_MOST_CHARACTERS = 3_000_000
_SHARE_OF_STDLIB = 0.25


class HeldOutTexts(NamedTuple):
    """Files that a run was not trained on."""

    words: str
    """What they are."""
    texts: tuple[str, ...]


@lru_cache(maxsize=2)
def held_out_texts(corpus: CorpusConfig) -> HeldOutTexts:
    """The held-out files of a corpus, its generated documents aside; some of `stdlib` where it has no others.

    Raises: as `load_blocks` for sources that cannot be read.
    """
    real = _real_sources(corpus) or _real_sources(
        CorpusConfig(spec="stdlib", val_fraction=_SHARE_OF_STDLIB, seed=corpus.seed)
    )
    texts: list[str] = []
    for source in real.values():
        room = _MOST_CHARACTERS // len(real)
        for document in source.documents("val"):
            texts.append(head_of(document, _MOST_CHARACTERS))
            room -= len(texts[-1])
            if room <= 0:
                break
    return HeldOutTexts(f"held-out files of {', '.join(real)}", tuple(texts))


def _real_sources(corpus: CorpusConfig) -> dict[str, Source]:
    """The sources of files, by the name that the corpus gives them."""
    names = [entry.name for entry in parse_spec(corpus.spec)]
    sources = zip(names, open_sources(corpus), strict=True)
    return {name: source for name, source in sources if not isinstance(source, GeneratedSource)}


class TrainingText(NamedTuple):
    """What a training read."""

    corpus: CorpusConfig
    n_ctx: int
    """Length of its blocks."""


@dataclass(frozen=True, kw_only=True)
class _Trained(TrainConfig):
    """What all trainings' config.json have in common; a run's has more."""

    __pydantic_config__ = {"extra": "ignore"}  # noqa: RUF012


def training_text(folder: Path) -> TrainingText | None:
    """What the training in a folder read, whatever it trained; None where no config.json says."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    config = read_typed(_Trained, path, "correct it, or copy it again from where the folder came")
    return TrainingText(corpus_config(config, samples_in(folder)), config.sparse.n_ctx)


def task_for(
    name: TaskName,
    tokenizer: PreTrainedTokenizerFast,
    corpus: CorpusConfig | None,
    *,
    max_tokens: int,
    prompts: PromptKind = "generated",
) -> Task:
    """A task for models of a corpus. Raises what `get_task` and `held_out_texts` raise."""
    if isinstance(name, str) and not is_task_file(name) and (prompts == "natural" or name.endswith(NATURAL)):
        return _natural_task(name, tokenizer, corpus or CorpusConfig(), max_tokens)
    return get_task(name, tokenizer, max_tokens=max_tokens, prompts=prompts)


@lru_cache(maxsize=16)
def _natural_task(name: str, tokenizer: PreTrainedTokenizerFast, corpus: CorpusConfig, max_tokens: int) -> Task:
    """Kept, for finding the pairs takes seconds and a command asks more than once."""
    held_out = held_out_texts(corpus)
    return get_task(
        name, tokenizer, max_tokens=max_tokens, prompts="natural", texts=held_out.texts, text=held_out.words
    )


def run_task(run: Run, name: TaskName, prompts: PromptKind = "generated") -> Task:
    """A task for a run's tokenizer, context and corpus. Raises what `task_for` raises."""
    return task_for(
        name, run.tokenizer, corpus_config(run.config, run.samples), max_tokens=run.config.sparse.n_ctx, prompts=prompts
    )


def recorded_task(run: Run, name: str, record: Mapping[str, Any]) -> Task:
    """The task of a result: its name, and where its prompts came from (`Task.record`).

    Raises what `run_task` raises, and ValueError for a file that is another one now, and for natural prompts from
    files that this machine did not tokenize for the run.
    """
    changed = change_of(record)
    if changed:
        raise ValueError(changed)
    if name.endswith(NATURAL):
        check_read_here(corpus_config(run.config, run.samples), run.tokenizer, run.config.sparse.n_ctx)
    return run_task(run, task_option(name, record))


def change_of(record: Mapping[str, Any]) -> str:
    """A sentence that says how the file of a result's prompts is not what it was; empty where it is."""
    if record.get("prompts") != "file":
        return ""
    if not isinstance(record.get("file"), str) or "sha256" not in record:
        return "the record of its task file is incomplete: find and steer again"
    path = Path(record["file"])
    if not path.is_file():
        return f"the task file {path} is gone: put it back, or find and steer with another"
    if hashlib.sha256(path.read_bytes()).hexdigest() != record["sha256"]:
        return f"the task file {path} has changed since; what was found with it belongs to an earlier version"
    return ""

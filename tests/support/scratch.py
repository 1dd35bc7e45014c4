"""A folder as the pages' commands find it: a clone's scripts, a user's model and text, and finished runs, all small."""

import dataclasses
import itertools
import json
import random
import re
import shutil
from functools import cache
from pathlib import Path

from support.hub import Hub
from support.task_files import GOOD, write

from bridges.packaged import FOLDER
from sparse_model.config import TrainConfig
from sparse_model.data.generated_python import generate_document

ROOT = Path(__file__).parents[2]
BUNDLE = FOLDER / "demo"


def furnish(place: Path) -> None:
    """Write what pages name besides runs."""
    (place / "scripts").symlink_to(ROOT / "scripts")
    (place / "tests").symlink_to(ROOT / "tests")
    (place / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "accelerate-two-nodes.yaml", place / "docs")
    for name in ("my-model", "general_model", "smollm2"):
        shutil.copytree(BUNDLE / "dense", place / name)
    shutil.copytree(BUNDLE / "tokenizer", place / "genera")
    texts = documents()
    (place / "my-code").mkdir()
    for number, text in enumerate(texts):
        (place / "my-code" / f"{number}.py").write_text(text)
    (place / "samples.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for name in ("my_task.jsonl", "raw_string.jsonl"):
        write(place, [GOOD[0] | {"channel": Path(name).stem}, *GOOD[1:]], name)


@cache
def documents() -> list[str]:
    rng = random.Random(0)
    return [generate_document(rng) for _ in range(150)]


def furnish_hub(hub: Hub) -> None:
    """Models under the names that pages give to theirs, as `local/NAME`."""
    for name in ("gpt2", "gpt2-medium"):
        hub.add_folder(f"local/{name}", BUNDLE / "dense")


def has_run(folder: Path) -> bool:
    """Whether a training has left something there."""
    return any((folder / part).is_dir() for part in ("bridges", "dense", "sparse"))


def provide(place: Path, words: list[str], trained: str | None) -> None:
    """Make a finished run of each folder below runs/ that a command reads and that is not there yet.

    `runs/dense/tokenizer` is in the run `runs/dense`. A command that names no run reads runs/demo.
    """
    read = [run_of(word) for word in words[1:] if word.startswith("runs/")] or ["runs/demo"]
    for run in read:
        if run != trained and not (place / run).exists():
            make_run(place / run)


def run_of(word: str) -> str:
    return re.sub(r"(?<=.)/(?:dense|tokenizer|stream|circuits/.*)$", "", word)


def make_run(folder: Path) -> None:
    """A copy of the packaged bundle, as if trained on little text."""
    shutil.copytree(BUNDLE, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"corpus_tokens": 20_000, "eval_tokens": 512}))
    (folder / "digests.json").unlink()  # changed on purpose


def make_sparse_run(folder: Path, fraction: float) -> None:
    """The bundle's sparse model as one that train-sparse has trained with a share of its weights."""
    for part in ("sparse", "tokenizer"):
        shutil.copytree(BUNDLE / part, folder / part)
    config = json.loads((BUNDLE / "config.json").read_text()) | {"corpus_tokens": 20_000, "eval_tokens": 512}
    kept = {field.name: config[field.name] for field in dataclasses.fields(TrainConfig) if field.name in config}
    kept["sparsity"]["nonzero_fraction"] = fraction
    (folder / "config.json").write_text(json.dumps(kept))
    (folder / "metrics.json").write_text('{"val_ce": 1.0}')


def alone(words: list[str]) -> list[tuple[str, float]]:
    """The runs of train-sparse that a command reads, with the share of their weights."""
    found = []
    for option, fraction in (("--sparse-runs", 0.25), ("--dense-runs", 1)):
        after = words[words.index(option) + 1 :] if option in words else []
        found += [(run, fraction) for run in itertools.takewhile(lambda word: not word.startswith("-"), after)]
    return found

"""A task of one's own: a file of prompt pairs, `.jsonl` or `.csv`.

1. A line has two prompts that differ in the feature alone, their two answers, and a split. In `.jsonl`:
   `{"prompts": ["A", "B"], "answers": ["x", "y"], "split": "train"}`; in `.csv` the columns `COLUMNS`.
2. A line of a `.jsonl` file may be a template: `{noun}` and `{noun:2}` in it are two different words of the list `noun`
   among its `slots`, the same in prompts and answers. Braces that name no list are text.
3. A line without prompts holds what the lines after it share: `slots`, and of the task `channel` (the name for one that
   carries the feature) and `description`.
4. Reading checks the file by itself. `FileTask` checks it against a tokenizer and a context, line by line.
"""

import csv
import hashlib
import io
import itertools
import math
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from interventions.tasks.base import PROMPT_SPLITS, PromptSplit, Strings, TaskSpec
from interventions.tasks.names import TASK_FILES, TASK_NAMES
from interventions.tasks.stock import StockPair, StockTask
from sparse_model.io.reading import parse_json

EXAMPLES = tuple(sorted((Path(__file__).parent / "examples").glob("*.jsonl")))
"""Two tasks of Drori's criticism of weight-sparse circuits, in our words, for models of English."""

COLUMNS = ("prompt_0", "prompt_1", "answer_0", "answer_1", "split")
MOST_FILLINGS = 1000
"""Of a template; one that has more is filled so often, at random but always the same."""

_PAIR_KEYS, _SHARED_KEYS = {"prompts", "answers", "split", "slots"}, {"slots", "channel", "description"}
_SLOT = re.compile(r"\{(\w+)(?::(\d+))?\}")
_LEAST_SHARE, _FEW = 0.25, 8

Slots = Mapping[str, Sequence[str]]


class WrittenPair(NamedTuple):
    """A pair as a file gives it, its slots filled."""

    prompts: Strings
    answers: Strings
    split: PromptSplit
    line: int


@dataclass(frozen=True, kw_only=True)
class TaskFile:
    """A file of pairs that is in order."""

    path: Path
    sha256: str
    pairs: tuple[WrittenPair, ...]
    channel: str
    description: str

    @property
    def spec(self) -> TaskSpec:
        """The task's name and words; it has no templates."""
        return TaskSpec(name=self.path.stem, channel=self.channel, description=self.description, templates={})


@dataclass
class _Shared:
    """What a line without prompts has set for those after it."""

    slots: dict[str, list[str]] = field(default_factory=dict)
    channel: str | None = None
    description: str | None = None


def is_task_file(name: str) -> bool:
    """Whether a task's name is that of a file."""
    return Path(name).suffix in TASK_FILES


def read_task_file(path: str | Path) -> TaskFile:
    """The pairs of a file, checked.

    Raises FileNotFoundError without the file; ValueError, naming file and line, for a line that is no pair, a prompt in
    two splits or with two answers, answers that change sides, and a split without pairs.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no task file at {path}: give one of the twenty tasks' names, or an existing file")
    if not re.fullmatch(r"\w+", path.stem) or path.stem in TASK_NAMES:
        raise ValueError(
            f"{path}: the file's name is the task's; use letters, digits and underscores, and none of the twenty's"
        )
    data, shared = path.read_bytes(), _Shared()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}): save it as UTF-8") from error
    lines = _csv_lines(text, path) if path.suffix == ".csv" else _json_lines(text, path)
    pairs = dict.fromkeys(pair for number, row in lines for pair in _pairs_of(row, number, shared, path))
    _check(list(pairs), path)
    return TaskFile(
        path=path,
        sha256=hashlib.sha256(data).hexdigest(),
        pairs=tuple(pairs),
        channel=shared.channel or path.stem,
        description=shared.description or f"The pairs of {path.name}.",
    )


def _json_lines(text: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON may hold other line ends
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not valid JSON ({error}); fix or remove it") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: must be an object with prompts, answers and split")
        yield number, row


def _csv_lines(text: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    if tuple(reader.fieldnames or ()) != COLUMNS:
        raise ValueError(f"{path}, line 1: the columns must be {','.join(COLUMNS)}")
    try:
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(f"{path}, line {reader.line_num}: must have {len(COLUMNS)} fields")
            prompts, answers = [row["prompt_0"], row["prompt_1"]], [row["answer_0"], row["answer_1"]]
            yield reader.line_num, {"prompts": prompts, "answers": answers, "split": row["split"]}
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: not valid CSV ({error}); fix or remove it") from error


def _pairs_of(row: dict[str, Any], number: int, shared: _Shared, path: Path) -> Iterator[WrittenPair]:
    """The pairs of a line; none of one that only sets what the others share."""
    place = f"{path}, line {number}"
    allowed = _PAIR_KEYS if "prompts" in row else _SHARED_KEYS
    wrong = sorted(set(row) - allowed)
    if wrong or ("prompts" in row and not {"answers", "split"} <= set(row)):
        raise ValueError(
            f"{place}: has {', '.join(row) or 'nothing'}; a pair has prompts, answers, split and may have slots, a line"
            " without prompts may set slots, channel and description"
        )
    slots = {**shared.slots, **_slots(row.get("slots", {}), place)}
    if "prompts" not in row:
        shared.slots = slots
        shared.channel = _text(row, "channel", place) or shared.channel
        shared.description = _text(row, "description", place) or shared.description
        return
    if row["split"] not in PROMPT_SPLITS:
        raise ValueError(f"{place}: split {row['split']!r} must be one of {', '.join(PROMPT_SPLITS)}")
    prompts, answers = _two(row, "prompts", place), _two(row, "answers", place)
    for filled in _fillings((*prompts, *answers), slots, place):
        yield WrittenPair((filled[0], filled[1]), (filled[2], filled[3]), row["split"], number)


def _slots(slots: Any, place: str) -> dict[str, list[str]]:
    fine = isinstance(slots, dict) and all(
        isinstance(words, list) and words and all(isinstance(word, str) for word in words) for words in slots.values()
    )
    if not fine:
        raise ValueError(f'{place}: slots must give lists of words, such as {{"noun": ["cat", "dog"]}}')
    return {name: list(dict.fromkeys(words)) for name, words in slots.items()}


def _text(row: dict[str, Any], key: str, place: str) -> str | None:
    value = row.get(key)
    if value is not None and (not isinstance(value, str) or not value):
        raise ValueError(f"{place}: {key} must be a text that is not empty")
    return value


def _two(row: dict[str, Any], key: str, place: str) -> Strings:
    """Two different texts."""
    texts = row[key]
    if not isinstance(texts, list) or len(texts) != 2 or not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"{place}: {key} must be two texts that are not empty")
    if texts[0] == texts[1]:
        raise ValueError(f"{place}: the two {key} are the same; a pair differs in the feature, and its answers differ")
    return texts[0], texts[1]


def _fillings(texts: Sequence[str], slots: Slots, place: str) -> Iterator[list[str]]:
    """The texts with their slots filled in every way, or in `MOST_FILLINGS` of them."""
    used = sorted({match.groups() for text in texts for match in _SLOT.finditer(text) if match[1] in slots}, key=str)
    by_list = {name: [slot for slot in used if slot[0] == name] for name, _ in used}
    for name, wanted in by_list.items():
        if len(wanted) > len(slots[name]):
            raise ValueError(
                f"{place}: needs {len(wanted)} different words of {name!r}, which has {len(slots[name])}; add some"
            )
    ways = math.prod(math.perm(len(slots[name]), len(wanted)) for name, wanted in by_list.items())
    choices: Iterator[tuple[Sequence[str], ...]]
    if ways <= MOST_FILLINGS:
        each = [itertools.permutations(slots[name], len(wanted)) for name, wanted in by_list.items()]
        choices = itertools.product(*each)
    else:
        rng = random.Random("\0".join(texts))
        choices = (
            tuple(rng.sample(slots[name], len(wanted)) for name, wanted in by_list.items())
            for _ in range(MOST_FILLINGS)
        )
    for choice in choices:
        words = dict(zip(itertools.chain(*by_list.values()), itertools.chain(*choice), strict=True))
        yield [_fill(text, words) for text in texts]


def _fill(text: str, words: Mapping[tuple[str | Any, ...], str]) -> str:
    """The text with the slots that have a word filled."""
    return _SLOT.sub(lambda match: words.get((match[1], match[2]), match[0]), text)


def _check(pairs: Sequence[WrittenPair], path: Path) -> None:
    """Raise ValueError unless every split has pairs, shares none of its prompts, and no prompt has two answers."""
    for split in PROMPT_SPLITS:
        if not any(pair.split == split for pair in pairs):
            raise ValueError(
                f"{path}: no pair belongs to split {split!r}; each of {', '.join(PROMPT_SPLITS)} needs some"
            )
    seen: dict[str, tuple[WrittenPair, str]] = {}
    for pair in pairs:
        for prompt, answer in zip(pair.prompts, pair.answers, strict=True):
            other, before = seen.setdefault(prompt, (pair, answer))
            if other.split != pair.split:
                raise ValueError(
                    f"{path}, line {pair.line}: the prompt {prompt!r} of split {pair.split!r} stands in split"
                    f" {other.split!r} too, line {other.line}; splits must share no prompt"
                )
            if before != answer:
                raise ValueError(
                    f"{path}, line {pair.line}: the prompt {prompt!r} has the answer {answer!r} here and {before!r} in"
                    f" line {other.line}; a prompt has one right answer"
                )
    _check_sides(pairs, path)


def _check_sides(pairs: Sequence[WrittenPair], path: Path) -> None:
    """Raise ValueError for an answer that mostly, but not always, belongs to one member."""
    sides = [Counter(pair.answers[member] for pair in pairs) for member in (0, 1)]
    for answer in sides[0].keys() & sides[1].keys():
        counts = [side[answer] for side in sides]
        member, fewest, total = counts.index(min(counts)), min(counts), sum(counts)
        if total >= _FEW and fewest < _LEAST_SHARE * total:
            line = next(pair.line for pair in pairs if pair.answers[member] == answer)
            raise ValueError(
                f"{path}, line {line}: the answers do not balance: {answer!r} is right in member {member} of {fewest}"
                f" pairs and in member {1 - member} of {total - fewest}; one class belongs to each member, so exchange"
                " this line's prompts and answers, or give each side as many"
            )


@dataclass(frozen=True, kw_only=True)
class FileTask(StockTask):
    """A task whose pairs stand in a file. An answer of several tokens counts by its first one.

    Making one checks every pair. Raises ValueError, naming file and line, for prompts of different lengths in tokens or
    over `max_tokens`, and for answers that begin with the same token or do not begin with a token of their own.
    """

    file: TaskFile

    def __post_init__(self) -> None:
        _ = self.stock

    @property
    def record(self) -> dict[str, Any]:
        return {"prompts": "file", "file": str(self.file.path.resolve()), "sha256": self.file.sha256}

    @property
    def source(self) -> str:
        return f"{self.file.path} has in split {{split}}"

    @property
    def remedy(self) -> str:
        return "add lines"

    @cached_property
    def stock(self) -> dict[PromptSplit, list[StockPair]]:
        pairs: dict[PromptSplit, list[StockPair]] = {split: [] for split in PROMPT_SPLITS}
        for pair in self.file.pairs:
            pairs[pair.split].append(self._read(pair))
        return pairs

    @cached_property
    def by_first_token(self) -> int:
        """How many answers are several tokens long, and so count by their first one."""
        return sum(
            len(self._encode(prompt + answer)) > len(self._encode(prompt)) + 1
            for pair in self.file.pairs
            for prompt, answer in zip(pair.prompts, pair.answers, strict=True)
        )

    def _read(self, pair: WrittenPair) -> StockPair:
        place = f"{self.file.path}, line {pair.line}"
        first, second = (self._encode(prompt) for prompt in pair.prompts)
        if len(first) != len(second):
            raise ValueError(
                f"{place}: the prompts {pair.prompts} have {len(first)} and {len(second)} tokens with tokenizer"
                f" {self._tokenizer_name()} and cannot be aligned; choose words of as many tokens"
            )
        if 1 + len(first) > self.max_tokens:
            raise ValueError(
                f"{place}: the prompts have {1 + len(first)} tokens, end-of-text included, over the context of"
                f" {self.max_tokens}; shorten them"
            )
        answers = []
        for tokens, prompt, answer in zip((first, second), pair.prompts, pair.answers, strict=True):
            whole = self._encode(prompt + answer)
            if whole[: len(tokens)] != tokens or len(whole) == len(tokens):
                raise ValueError(
                    f"{place}: the answer {answer!r} does not begin with a token of its own after {prompt!r} with"
                    f" tokenizer {self._tokenizer_name()}; move the space or sign between them to the other side"
                )
            answers.append(whole[len(tokens)])
        if answers[0] == answers[1]:
            raise ValueError(
                f"{place}: the answers {pair.answers} begin with the same token,"
                f" {self.tokenizer.decode(answers[:1])!r}, which is what counts; move what they share into the prompts"
            )
        return StockPair((first, second), (answers[0], answers[1]), pair.prompts)

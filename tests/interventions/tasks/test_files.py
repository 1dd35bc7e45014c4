"""Tasks of one's own: what a file may hold, what is refused and how it says so, and where a task's name goes."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from support.helpers import make_tiny_run, tiny_tokenizer
from support.task_files import GOOD, line, write
from transformers import PreTrainedTokenizerFast

from bridges.run_folder import Run
from interventions import Channel, Experiment, find_channel, get_task
from interventions.bundle.bundle import get_bundle, load_dense
from interventions.bundle.channels import save_channel
from interventions.circuits.circuit_search import find_circuit
from interventions.circuits.prune_config import PruneConfig
from interventions.steering.experiment import resolved
from interventions.tasks.base import PROMPT_SPLITS, Task, TaskSpec, Template
from interventions.tasks.files import COLUMNS, EXAMPLES, MOST_FILLINGS, FileTask, read_task_file
from interventions.tasks.of_run import change_of, recorded_task
from sparse_model.data.tokenizer import train_tokenizer


def test_slots_are_filled_in_every_way_the_same_in_prompts_and_answers(tmp_path: Path) -> None:
    rows = [
        {"slots": {"n": ["a", "b", "c"]}},
        *(
            {"split": split, "prompts": [f"{split} {{n}} {{n:2}} {{x}}", f"{split} {{n:2}} {{n}} {{x}}"]}
            | {"answers": ["{n}", "{n:2}"]}
            for split in PROMPT_SPLITS
        ),
    ]
    file = read_task_file(write(tmp_path, rows))
    train = [pair for pair in file.pairs if pair.split == "train"]
    assert len(train) == len(set(train)) == 6
    for pair in train:
        _, first, second, kept = pair.prompts[0].split(" ")
        assert first != second
        assert kept == "{x}"  # no list of that name: text
        assert pair.prompts[1] == f"train {second} {first} {{x}}"
        assert pair.answers == (first, second)
        assert pair.line == 2
    assert file.channel == "mine"


def test_many_fillings_are_drawn_always_the_same(tmp_path: Path) -> None:
    many = {"noun": [f"n{i}" for i in range(100)], "verb": [f"v{i}" for i in range(100)]}
    file = read_task_file(write(tmp_path, [{"slots": many}, *GOOD[1:]]))
    counts = [sum(pair.split == split for pair in file.pairs) for split in PROMPT_SPLITS]
    assert all(0.9 * MOST_FILLINGS < count <= MOST_FILLINGS for count in counts)
    assert file == read_task_file(file.path)


def test_csv_is_the_same(tmp_path: Path) -> None:
    plain = read_task_file(write(tmp_path, GOOD))
    rows = [
        ",".join('"' + field.replace('"', '""') + '"' for field in (*pair.prompts, *pair.answers, pair.split))
        for pair in plain.pairs
    ]
    file = read_task_file(write(tmp_path, [",".join(COLUMNS), *rows], "mine.csv"))
    assert [pair[:3] for pair in file.pairs] == [pair[:3] for pair in plain.pairs]
    assert file.pairs[0].line == 2


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["{"], r"mine.jsonl, line 1: not valid JSON"),
        (["[]"], r"line 1: must be an object with prompts, answers and split"),
        ([GOOD[0], line("test")], r"line 2: split 'test' must be one of train, selection, evaluation"),
        (
            [{"split": "train", "prompts": ["a", "b"]}],
            r"line 1: has split, prompts; a pair has prompts",
        ),
        ([{"slot": {}}], r"line 1: has slot; a pair has"),
        ([{"slots": {"noun": []}}], r"line 1: slots must give lists of words"),
        ([{"channel": ""}], r"line 1: channel must be a text that is not empty"),
        ([line("train", prompts=["a"])], r"line 1: prompts must be two texts"),
        ([line("train", prompts=["a", "a"])], r"line 1: the two prompts are the same"),
        ([line("train", answers=["x", "x"])], r"line 1: the two answers are the same"),
        (
            [line("train", slots={"noun": ["a"]}, prompts=["{noun}{noun:2}", "b"])],
            r"line 1: needs 2 different words",
        ),
        (GOOD[:3], r"mine.jsonl: no pair belongs to split 'evaluation'"),
        (
            [*GOOD, line("train", "{noun:2}\n")],
            r"line 5: the prompt .* of split 'train' stands in split 'selection' too",
        ),
        (
            [*GOOD, line("train", answers=["a", "b"])],
            r"line 5: the prompt .* has the answer 'a' here and '\"\)' in line 2",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_one_sentence_with_its_line(tmp_path: Path, rows: list[Any], message: str) -> None:
    path = write(tmp_path, rows)
    with pytest.raises(ValueError, match=message) as refused:
        read_task_file(path)
    assert "\n" not in str(refused.value).replace("\\n", "")


def test_answers_keep_their_side(tmp_path: Path) -> None:
    def rows(exchanged: int) -> list[Any]:
        """Twelve pairs, in the last of which the answers stand the other way round."""
        return [
            {"split": PROMPT_SPLITS[n % 3], "prompts": [f"{n} a", f"{n} b"]}
            | {"answers": ["y", "x"] if n >= 12 - exchanged else ["x", "y"]}
            for n in range(12)
        ]

    for exchanged in (0, 3, 6):  # a class for each member, or as many of one as of the other
        assert len(read_task_file(write(tmp_path, rows(exchanged))).pairs) == 12
    for exchanged in (1, 2):
        words = f"is right in member [01] of {exchanged} pairs and in member [01] of {12 - exchanged}; one class"
        with pytest.raises(ValueError, match=rf"line {13 - exchanged}: the answers do not balance: '[xy]' {words}"):
            read_task_file(write(tmp_path, rows(exchanged)))


@pytest.mark.parametrize("name", ["my-task.jsonl", "for_while.jsonl"])
def test_a_name_that_records_cannot_carry_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="the file's name is the task's; use letters, digits and underscores"):
        read_task_file(write(tmp_path, GOOD, name))
    with pytest.raises(FileNotFoundError, match=r"no task file at .*none\.csv"):
        read_task_file(tmp_path / "none.csv")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n", "line 1: the columns must be prompt_0,prompt_1,answer_0,answer_1,split"),
        (",".join(COLUMNS) + "\na,b,c,d\n", "line 2: must have 5 fields"),
        (",".join(COLUMNS) + "\na,b,c,d,train,x\n", "line 2: must have 5 fields"),
    ],
)
def test_a_csv_that_is_no_table_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_task_file(write(tmp_path, [text], "mine.csv"))


def extra(prompts: list[str], answers: list[str]) -> list[Any]:
    return [*GOOD, {"split": "train", "prompts": prompts, "answers": answers}]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (extra(["cat", "cat cat"], ["x", "y"]), r"line 5: the prompts .* have 1 and 2 tokens .* cannot be aligned"),
        (
            extra(["x\n" * 20 + "(", "x\n" * 20 + "["], ["x", "y"]),
            r"line 5: the prompts have 42 tokens.* context of 40",
        ),
        (extra(["x(", "y("], ['"', "'"]), r"line 5: the answer '\"' does not begin with a token of its own after"),
        (extra(["x", "y"], [" = x", " = y"]), r"line 5: the answers .* begin with the same token, ' ='"),
    ],
)
def test_a_tokenizer_that_cannot_present_a_line_says_which(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_task(write(tmp_path, rows), tiny_tokenizer(), max_tokens=40)


def file_task(path: Path, tokenizer: PreTrainedTokenizerFast, max_tokens: int = 40) -> FileTask:
    task = get_task(str(path), tokenizer, max_tokens=max_tokens)
    assert isinstance(task, FileTask)
    return task


def test_a_batch_is_that_of_the_file(tmp_path: Path) -> None:
    rows = extra(["x\nz", "y\nz"], [" = x", ", y"])  # answers of two tokens
    task, tokenizer = file_task(write(tmp_path, rows), tiny_tokenizer()), tiny_tokenizer()
    assert task.by_first_token == 2
    assert (task.name, task.spec.channel) == ("mine", "quote")
    assert [task.available(split) for split in PROMPT_SPLITS] == [9, 24, 24]
    batch = task.sample_up_to(100, split="train", seed=0)
    assert len(set(batch.prompts)) == len(batch.prompts) == 9
    for row, pair in enumerate(batch.prompts):
        ids = batch.tokens[row, :, : int(batch.last[row]) + 1]
        assert ids[:, 0].tolist() == [tokenizer.eos_token_id] * 2
        assert [tokenizer.decode(member[1:]) for member in ids] == list(pair)
        wanted = [" =", ","] if "\n" in pair[0] else ['")', "')"]
        assert [tokenizer.decode(answer) for answer in batch.answers[row]] == wanted
    again = file_task(task.file.path, tokenizer).sample_up_to(100, split="train", seed=0)
    assert torch.equal(batch.tokens, again.tokens)
    with pytest.raises(ValueError, match=r"n_pairs=10: .*mine.jsonl has in split 'train' 9 pairs of task 'mine'"):
        task.sample(10, split="train", seed=0)
    with pytest.raises(ValueError, match="has its own prompts"):
        get_task(task.file.path, tokenizer, prompts="natural", texts=["x"])


def test_a_spec_in_python_will_do() -> None:
    template = Template(('$v0("$n0', "$v0('$n0"), ('")\n', "')\n"), (('")', "')"),))
    spec = TaskSpec(name="mine", channel="quote", description="x", templates=dict.fromkeys(PROMPT_SPLITS, (template,)))
    batch = get_task(spec, tiny_tokenizer()).sample(3, split="selection", seed=0)
    assert [tiny_tokenizer().decode(answer) for answer in batch.answers[0]] == ['")', "')"]


@pytest.fixture(scope="module")
def example_tokenizer() -> PreTrainedTokenizerFast:
    """One that has every word of the examples, as a tokenizer of English has."""
    pairs = [pair for path in EXAMPLES for pair in read_task_file(path).pairs]
    texts = [p + a + "\n" for pair in pairs for p, a in zip(*pair[:2], strict=True)]
    rare = ["zebras quickly jumped over fences\n"] * 3  # merges are learned by frequency: these words' come last
    return train_tokenizer([*texts, *rare], 415)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_are_aligned_and_balanced(path: Path, example_tokenizer: PreTrainedTokenizerFast) -> None:
    task = file_task(path, example_tokenizer)
    assert task.by_first_token == 0
    for split in PROMPT_SPLITS:
        batch = task.sample_up_to(1000, split=split, seed=0)
        assert len(batch.last) >= 50
        counts = [sorted(batch.answers[:, member].unique(return_counts=True)[1].tolist()) for member in (0, 1)]
        assert counts[0] == counts[1]  # no answer is right more often on one side
        assert len(set(counts[0])) == 1  # nor more often than another
    differing = (batch.tokens[:, 0] != batch.tokens[:, 1]).sum(1)
    assert set(differing.tolist()) == {1}  # one word decides


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_tiny_run(tmp_path / "run")


def test_a_channel_its_steering_and_a_circuit_name_the_file(tmp_path: Path, run: Run, monkeypatch, caplog) -> None:
    monkeypatch.setenv("SPARSE_BRIDGES_CACHE", str(tmp_path))
    path = write(tmp_path, GOOD)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    record = {"prompts": "file", "file": str(path.resolve()), "sha256": digest}
    channel = find_channel(run, str(path), by="patching", pairs=100, site=2)
    assert channel.selection["prompts"] == record
    assert (channel.name, channel.selection["task"], channel.selection["pairs"]) == ("quote", "mine", 24)
    save_channel(run.folder, channel)
    bundle = get_bundle(load_dense(run.folder))
    plan = resolved(Experiment(channel="quote", pairs=100), bundle)
    assert (plan.task, plan.pairs) == (record["file"], 24)
    settings = PruneConfig(steps=1, selection_pairs=50, target_loss=9.0, reference_tokens=128, eliminate=False)
    circuit = find_circuit(run, path, settings)
    assert (circuit.task, circuit.prompts, circuit.config["pool"]) == ("mine", record, 8)
    assert recorded_task(run, "mine", record).name == "mine"
    assert change_of(record) == ""
    path.write_text(path.read_text() + "\n")
    with pytest.raises(ValueError, match=r"the task file .*mine\.jsonl has changed since"):
        recorded_task(run, "mine", record)
    resolved(Experiment(channel="quote"), bundle)
    assert "has changed since" in caplog.text


def test_natural_prompts_carry_their_name_and_go_wherever_a_task_does(run: Run) -> None:
    save_channel(
        run.folder,
        Channel(name="loop", site=1, indices=(1,), weights=(1.0,), selection={"task": "single_double_quote-natural"}),
    )
    bundle = get_bundle(load_dense(run.folder))
    for experiment, task in (
        (Experiment(channel="loop"), "single_double_quote-natural"),
        (Experiment(channel="loop", prompts="generated"), "single_double_quote"),
        (Experiment(channel="loop", task="single_double_quote", prompts="natural"), "single_double_quote-natural"),
    ):
        assert resolved(experiment, bundle).task == task
    found: Task = recorded_task(run, "single_double_quote-natural", {"prompts": "natural"})
    assert found.record == {"prompts": "natural", "text": "held-out files of stdlib"}
    assert found.available("evaluation")

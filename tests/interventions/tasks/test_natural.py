"""Natural prompts: what is found in real files, how it becomes batches, and how it is scored."""

import ast
import textwrap
from pathlib import Path

import pytest
import torch
from support.helpers import tiny_tokenizer

from interventions.tasks.base import TaskBatch
from interventions.tasks.catalogue import get_task
from interventions.tasks.floors import ngram_floor
from interventions.tasks.mining import mine
from interventions.tasks.natural import NaturalTask, split_of
from interventions.tasks.scores import distances, score

SNIPPETS: dict[str, tuple[str, tuple[str, str], str, tuple[str, str]]] = {
    "single_double_quote": ("f(b'ab')\n", ('"', "'"), "ab", ('")\n', "')\n")),
    "bracket_counting": ("x = f([1, 2])\n", ("(", "(["), "1, 2", (")\n", "])\n")),
    "bracket_brace": ("x = {'a': 1}\n", ("{", "["), "'a", ("': 1}\n", "', 1}\n")),
    "for_while": ("while x:\n    pass\n", ("for", "while"), " x", (" in items:\n", ":\n    pass\n")),
    "while_return_true": ("def f():\n    return True\n", ("return", "while"), " True", ("\n", ":\n")),
    "with_as": (
        "def f():\n    if x:\n        with g(x) as y:\n            pass\n",
        ("with", "return"),
        " g(x)",
        (" as y:\n            pass\n", "\n    x"),
    ),
    "else_elif": ("if x:\n    pass\nelif y:\n    pass\n", ("else", "elif"), "", (":\n", " y:\n    pass\n")),
    "class_init": (
        "class A:\n    def __init__(self, a, b):\n        self.a = a\n        self.b = b\n",
        ("a", "b"),
        " =",
        (" a\n", " b\n"),
    ),
    "var_swap": ("a, b = b, a\n", ("a, b = b,", "b, a = a,"), "", (" a\n", " b\n")),
}


@pytest.mark.parametrize("task", SNIPPETS)
def test_each_task_is_found_in_its_snippet(task: str) -> None:
    text, deciding, between, completion = SNIPPETS[task]
    (twins,) = mine(task, text)
    assert twins[1:] == (deciding, between, completion)
    assert any(text.startswith(twins.head + member + between) for member in deciding)


@pytest.mark.parametrize(
    ("task", "text"),
    [
        ("single_double_quote", "x = f'a'\ny = \"it's\"\nz = '''a'''\nu = ''\nv = 'a\\n'\n"),
        ("bracket_counting", "f((a), b)\nf( (a))\nf({1})\n"),
        ("bracket_brace", "x = {1, 2}\ny = {**a}\nz = {a.b: 1}\n"),
        ("for_while", "x = [a for a in b]\nfor a, b in c:\n    pass\n"),
        ("while_return_true", "def f():\n    return True and x\n"),
        ("with_as", "with f() as g:\n    pass\n"),
        ("else_elif", "x = a if b else c\n"),
        ("class_init", "class A:\n    def __init__(self, a):\n        self.a = a\n"),
        ("var_swap", "a, a = a, a\na, b = c, a\n"),
        ("for_while", "for x in (:\n"),
        ("for_while", "x = [\n    a\n    for a in b\n]\n"),
    ],
)
def test_what_only_resembles_it_is_not_found(task: str, text: str) -> None:
    assert mine(task, text) == []


@pytest.mark.parametrize("task", ["single_double_quote", "bracket_counting"])
def test_both_readings_of_a_real_file_are_python(task: str) -> None:
    text = Path(ast.__file__).read_text()
    found = mine(task, text)
    assert len(found) >= 2
    for twins in found[::9] if len(found) > 9 else found:
        bodies = [twins.head + piece + twins.between for piece in twins.deciding]
        own = 0 if text.startswith(bodies[0] + twins.completion[0]) else 1
        rest = text[len(bodies[own]) + len(twins.completion[own]) :]
        for body, completion in zip(bodies, twins.completion, strict=True):
            ast.parse(body + completion + rest)


def files(count: int) -> list[str]:
    """Files with four calls each."""
    return [
        f"n{number} = 1\n" + "".join(f'self.log("item {number}{line}")\nx = y\n' for line in range(4))
        for number in range(count)
    ]


def natural(texts: list[str], max_tokens: int = 40) -> NaturalTask:
    task = get_task("single_double_quote", tiny_tokenizer(), max_tokens=max_tokens, prompts="natural", texts=texts)
    assert isinstance(task, NaturalTask)
    return task


def test_a_batch_holds_the_files_own_context() -> None:
    texts, tokenizer = files(20), tiny_tokenizer()
    task = natural(texts)
    batch = task.sample(10, split="evaluation", seed=3)
    assert batch.tokens.shape[:2] == (10, 2)
    assert batch.tokens.shape[2] <= 40
    assert len(set(batch.prompts)) == 10
    for row, (double, single) in enumerate(batch.prompts):
        end = int(batch.last[row]) + 1
        ids = batch.tokens[row, :, :end]
        assert ids[0, 0] == ids[1, 0] == tokenizer.eos_token_id
        assert [tokenizer.decode(member[1:]) for member in ids] == [double, single]
        assert (ids[0] != ids[1]).sum() == 1
        assert [tokenizer.decode(answer) for answer in batch.answers[row]] == ['")', "')"]
        (text,) = [text for text in texts if double in text]
        assert split_of(text) == "evaluation"
        assert ("\n" + text).count("\n" + double) >= 1  # it begins where a line begins
    again = natural(texts).sample(10, split="evaluation", seed=3)
    assert torch.equal(batch.tokens, again.tokens)
    other = task.sample(10, split="evaluation", seed=4)
    assert other.prompts != batch.prompts


def test_every_pair_belongs_to_one_split_and_a_file_to_one_side() -> None:
    texts = files(30)
    task = natural(texts)
    counts = {split: task.available(split) for split in ("train", "selection", "evaluation")}
    assert sum(counts.values()) == 4 * 30
    assert {split: 4 * sum(split_of(text) == split for text in texts) for split in counts} == counts
    assert min(counts.values()) > 0
    assert natural(texts + texts).available("train") == counts["train"]


def test_no_more_pairs_than_there_are_and_other_refusals() -> None:
    with pytest.raises(ValueError, match=r"n_pairs=500: the held-out files of split 'train' give \d+ pairs"):
        natural(files(9)).sample(500, split="train", seed=0)
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match=r"task 'lambda_func' has no natural prompts; use generated ones"):
        get_task("lambda_func", tokenizer, prompts="natural", texts=["x"])
    with pytest.raises(ValueError, match=r"texts is empty"):
        get_task("var_swap", tokenizer, prompts="natural")


def test_answers_that_are_no_single_tokens_are_left_out() -> None:
    word = textwrap.dedent("""\
        if x:
            pass
        elif incomprehensibilities:
            pass
        """)
    task = get_task("else_elif", tiny_tokenizer(), prompts="natural", texts=[word])
    assert isinstance(task, NaturalTask)
    assert sum(task.available(split) for split in ("train", "selection", "evaluation")) == 0


BATCH = TaskBatch(
    tokens=torch.tensor([[[0, 1, 5, 5], [0, 2, 5, 5]], [[0, 5, 1, 0], [0, 5, 2, 0]]]),
    answers=torch.tensor([[3, 4], [3, 4]]),
    last=torch.tensor([3, 2]),
    prompts=[("", ""), ("", "")],
)
"""Member 0 has a 1 and wants a 3, member 1 a 2 and a 4: three tokens before the answer, and just before it."""


def test_scores_by_distance() -> None:
    assert distances(BATCH).tolist() == [3, 1]

    def knows_the_last_token(tokens: torch.Tensor) -> torch.Tensor:
        logits = torch.full((*tokens.shape, 6), -1e9)
        logits[..., 3] = torch.where(tokens == 2, -1e9, 0.0)
        logits[..., 4] = torch.where(tokens == 1, -1e9, 0.0)
        return logits

    table = score(knows_the_last_token, BATCH, pairs_at_once=1)
    assert table == {"all": (2, 0.5, 0.75), "1": (1, 1.0, 1.0), "3 to 4": (1, 0.0, 0.5)}


def test_an_ngram_sees_n_less_one_tokens() -> None:
    def of(*ids: int) -> torch.Tensor:
        return torch.tensor(ids)

    # After 1 comes 3, after 2 comes 4; after 5 either, 3 more often, but never after 1 5 5 or 2 5 5.
    pairs = of(1, 3, 0, 2, 4, 0, 5, 3, 0, 5, 3, 0, 5, 4, 0)
    assert ngram_floor(pairs, BATCH, 2) == 0.5
    assert ngram_floor(pairs, BATCH, 4) == 0.5
    assert ngram_floor(of(*pairs.tolist(), 1, 5, 5, 3, 0, 2, 5, 5, 4), BATCH, 4) == 1.0
    assert ngram_floor(of(*pairs.tolist(), 1, 5, 5, 3, 0, 2, 5, 5, 4), BATCH, 3) == 0.5
    assert ngram_floor(pairs, BATCH, 1) == 0.0
    assert ngram_floor(of(1, 4, 0, 2, 4), BATCH, 2) == 0.0
    assert ngram_floor(of(1, 3, 0, 1, 4, 0, 2, 4), BATCH, 2) == 0.0  # a tie is wrong
    with pytest.raises(ValueError, match=r"n=0: must be at least 1"):
        ngram_floor(pairs, BATCH, 0)


def test_the_head_ends_before_the_deciding_attribute() -> None:
    (twins,) = mine("class_init", SNIPPETS["class_init"][0])
    assert twins.head == "class A:\n    def __init__(self, a, b):\n        self."

"""The twenty tasks: aligned pairs with opposite answers that Python itself confirms."""

import ast
import random
import re
from collections import defaultdict
from collections.abc import Iterator

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from interventions.tasks.base import (
    PROMPT_SPLITS,
    PromptPair,
)
from interventions.tasks.catalogue import TASKS, get_task, list_tasks
from sparse_model.data.generated_python import ADJECTIVES, NOUNS, VERBS, generate_document
from sparse_model.data.tokenizer import train_tokenizer

# Tasks in which neither prompt goes on with the completion of the other.
SYNTAX = (
    "single_double_quote",
    "bracket_counting",
    "with_as",
    "bracket_brace",
    "else_elif",
    "if_ternary",
    "indent_for",
    "lambda_func",
    "if_equals",
    "var_if",
    "while_return_true",
)
MOST_DIFFERING_TOKENS = 5


@pytest.fixture(scope="session")
def documents() -> list[str]:
    rng = random.Random(1)
    return [generate_document(rng) for _ in range(2000)]


@pytest.fixture(scope="session")
def tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    return train_tokenizer(documents, 512)


@pytest.fixture(scope="session")
def gpt2_like(documents: list[str]) -> PreTrainedTokenizerFast:
    """GPT-2's pieces, with each newline a token of its own as in GPT-2's vocabulary."""
    learner = Tokenizer(models.BPE())
    newline = pre_tokenizers.Split(Regex(r"\n"), behavior="isolated")
    learner.pre_tokenizer = pre_tokenizers.Sequence([newline, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    learner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learner.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=learner, eos_token="<|endoftext|>")


def pairs_of(name: str, per_template: int = 5) -> Iterator[PromptPair]:
    rng = random.Random(name)
    for templates in TASKS[name].templates.values():
        for template in templates:
            for _ in range(per_template):
                yield TASKS[name].make(rng, template)


def masked(text: str) -> str:
    """`text` without its fillings: words, digits, strings and quotes each become one letter."""
    text = re.sub(r"""\((["'])[^"'\n]*\1\)""", "(S)", text)
    text = re.sub(r"""\((["'])[^"'\n]*$""", "(S", text)
    for letter, words in (("N", NOUNS), ("V", VERBS), ("A", ADJECTIVES), ("D", "0123456789")):
        text = re.sub(rf"\b(?:{'|'.join(words)})\b", letter, text)
    text = re.sub(r"\bprint\b", "V", text)
    return text.replace("'", '"')


def is_valid(program: str) -> bool:
    try:
        ast.parse(program)
    except SyntaxError:
        return False
    return True


def test_the_twenty_tasks_are_there() -> None:
    assert len(list_tasks()) == len(TASKS) == 20
    for name, spec in TASKS.items():
        assert spec.name == name
        assert spec.description.endswith(".")
        assert tuple(spec.templates) == PROMPT_SPLITS
    channels = [spec.channel for spec in TASKS.values()]
    assert len(set(channels)) == 20
    assert all(name.isidentifier() for name in channels)


@pytest.mark.parametrize("split", PROMPT_SPLITS)
@pytest.mark.parametrize("name", list_tasks())
def test_a_batch_is_aligned_and_its_answers_are_opposite(
    name: str, split: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    batch = get_task(name, tokenizer).sample(24, split=split, seed=3)
    end_of_text = tokenizer.eos_token_id
    assert batch.tokens.shape[:2] == (24, 2)
    assert batch.tokens.shape[2] == batch.last.max() + 1 <= 64
    assert (batch.tokens[:, :, 0] == end_of_text).all()
    assert (batch.answers[:, 0] != batch.answers[:, 1]).all()
    differing = (batch.tokens[:, 0] != batch.tokens[:, 1]).sum(1)
    assert differing.min() >= 1
    assert differing.max() <= MOST_DIFFERING_TOKENS
    for row, answers, last, prompts in zip(*batch, strict=True):
        for member in (0, 1):
            tokens = row[member].tolist()
            assert tokenizer.decode(tokens[1 : last + 1]) == prompts[member]
            assert end_of_text not in tokens[1 : last + 1]
            assert set(tokens[last + 1 :]) <= {end_of_text}
            answered = prompts[member] + tokenizer.decode([answers[member]])
            assert tokenizer.encode(answered) == [*tokens[1 : last + 1], answers[member]]


@pytest.mark.parametrize("name", list_tasks())
def test_a_seed_decides_the_batch(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    task = get_task(name, tokenizer)
    first, again, other = (task.sample(8, split="train", seed=seed) for seed in (0, 0, 1))
    assert first.prompts == again.prompts
    assert torch.equal(first.tokens, again.tokens)
    assert torch.equal(first.answers, again.answers)
    assert first.prompts != other.prompts


@pytest.mark.parametrize("name", list_tasks())
def test_answers_are_those_of_the_task(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    for pair in pairs_of(name):
        for answer in (pair.answer, *pair.alternatives):
            assert answer[0] != answer[1]
            assert all(text.startswith(start) for text, start in zip(pair.completion, answer, strict=True))


def test_the_direction_of_the_two_published_tasks(tokenizer: PreTrainedTokenizerFast) -> None:
    quote = get_task("single_double_quote", tokenizer).sample(4, split="train", seed=0)
    assert [tokenizer.decode(ids) for ids in quote.answers.T[:, 0]] == ['")', "')"]
    assert all('("' in double.rsplit("\n")[-1] for double, _ in quote.prompts)
    returns = get_task("while_return_true", tokenizer).sample(4, split="train", seed=0)
    assert [tokenizer.decode(ids) for ids in returns.answers.T[:, 0]] == ["\n    ", ":"]
    assert all(a.endswith("return True") and b.endswith("while True") for a, b in returns.prompts)


@pytest.mark.parametrize("name", list_tasks())
def test_splits_share_no_template(name: str) -> None:
    skeletons = [
        {masked(pair.prompt[member]) for pair in _pairs_of_split(name, split) for member in (0, 1)}
        for split in PROMPT_SPLITS
    ]
    assert all(skeletons)
    for first in range(3):
        for second in range(first):
            assert not skeletons[first] & skeletons[second]


def _pairs_of_split(name: str, split: str) -> list[PromptPair]:
    rng = random.Random(f"{name}{split}")
    return [TASKS[name].make(rng, template) for template in TASKS[name].templates[split] for _ in range(5)]


def test_no_document_contains_an_evaluation_prompt(documents: list[str]) -> None:
    text = "\n".join(documents)
    skeleton = masked(text)
    for name in list_tasks():
        for pair in _pairs_of_split(name, "evaluation"):
            for prompt in pair.prompt:
                assert prompt not in text
                assert masked(prompt) not in skeleton, prompt
    for pair in _pairs_of_split("single_double_quote", "evaluation"):
        last_line = pair.prompt[0].rpartition("\n")[2]
        callee = last_line.partition("(")[0].split()[-1]
        assert f"{callee}(" not in text


def test_last_lines_look_like_the_corpus(documents: list[str]) -> None:
    skeleton = masked("\n".join(documents))
    for name in list_tasks():
        for pair in pairs_of(name, per_template=1):
            for prompt, completion in zip(pair.prompt, pair.completion, strict=True):
                start = prompt.rfind("\n") + 1
                last_line = masked((prompt + completion)[start:]).partition("\n")[0]
                assert f"\n{last_line}\n" in skeleton, last_line


@pytest.mark.parametrize("name", list_tasks())
def test_completed_prompts_are_python(name: str) -> None:
    for pair in pairs_of(name):
        for prompt, completion in zip(pair.prompt, pair.completion, strict=True):
            assert is_valid(prompt + completion), prompt + completion


@pytest.mark.parametrize("name", SYNTAX)
def test_the_wrong_completion_is_a_syntax_error(name: str) -> None:
    for pair in pairs_of(name):
        for prompt, completion in zip(pair.prompt, reversed(pair.completion), strict=True):
            assert not is_valid(prompt + completion), prompt + completion


@pytest.mark.parametrize("name", ["final_kwarg", "for_while"])
def test_the_first_member_forbids_the_wrong_completion(name: str) -> None:
    for pair in pairs_of(name):
        assert not is_valid(pair.prompt[0] + pair.completion[1])


class _Anything:
    """A value that can be called, added, looped over once, and asked for any attribute."""

    def __call__(self, *_: object) -> "_Anything":
        return self

    def __getattr__(self, _: str) -> "_Anything":
        return self

    def __add__(self, _: object) -> "_Anything":
        return self

    def __iter__(self) -> Iterator[str]:
        yield "x"


def _run(program: str) -> dict[str, object]:
    names: dict[str, object] = defaultdict(_Anything)
    # Left out of the defaults above, as a mapping of locals hides the builtins.
    names |= {"set": set, "str": str, "enumerate": enumerate, "range": range}
    exec(program, {}, names)
    return names


@pytest.mark.parametrize("name", ["set_or_string", "set_or_string_fixedvarname"])
def test_a_set_adds_and_a_string_grows(name: str) -> None:
    for pair in pairs_of(name, per_template=2):
        for member, error in ((0, TypeError), (1, AttributeError)):
            _run(pair.prompt[member] + pair.completion[member])
            with pytest.raises(error):
                _run(pair.prompt[member] + pair.completion[1 - member])


def test_range_gives_one_variable() -> None:
    for pair in pairs_of("enumerate_range", per_template=2):
        if "def " not in pair.prompt[0]:
            with pytest.raises(TypeError, match="unpack"):
                _run(pair.prompt[0] + re.sub(r"\d", "3", pair.completion[1]))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("class_init", r"self\.(\w+) =$"),
        ("var_swap", r"(\w+), \w+ = \w+,$"),
        ("else_elif", r"if (\w+) == \d:\n.*\n *elif$"),
        ("fstring_brace", r"""(\w+) = .*\n *\w+ = r["']\w+$"""),
    ],
)
def test_the_answer_is_the_name_in_the_prompt(name: str, expected: str) -> None:
    members = (0, 1) if name in ("class_init", "var_swap") else (1,)
    for pair in pairs_of(name):
        for member in members:
            found = re.search(expected, pair.prompt[member])
            assert found is not None
            assert pair.answer[member] == f" {found[1]}"


def test_the_mode_fits_the_file() -> None:
    for pair in pairs_of("with_open"):
        assert "open(src" in pair.prompt[0]
        assert "open(dst" in pair.prompt[1]
        assert pair.answer == ("r", "w")


def test_an_unknown_task_lists_close_names(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(KeyError, match=r"'single_quote'.*single_double_quote"):
        get_task("single_quote", tokenizer)


def test_wrong_arguments_are_named(tokenizer: PreTrainedTokenizerFast) -> None:
    task = get_task("for_while", tokenizer)
    with pytest.raises(ValueError, match="n_pairs=0"):
        task.sample(0, split="train", seed=0)
    with pytest.raises(ValueError, match="max_tokens=5; raise max_tokens"):
        get_task("for_while", tokenizer, max_tokens=5).sample(1, split="train", seed=0)


def test_a_tokenizer_without_the_answers_is_refused(documents: list[str]) -> None:
    letters = train_tokenizer(documents, 270)
    with pytest.raises(ValueError, match=r"task 'with_as'.*\(270 tokens\).*use a tokenizer"):
        get_task("with_as", letters, max_tokens=400).sample(1, split="train", seed=0)


@pytest.mark.parametrize("name", [name for name in list_tasks() if name != "indent_for"])
def test_a_tokenizer_with_gpt2_pieces_is_supported(name: str, gpt2_like: PreTrainedTokenizerFast) -> None:
    for split in PROMPT_SPLITS:
        batch = get_task(name, gpt2_like, max_tokens=256).sample(8, split=split, seed=0)
        assert (batch.answers[:, 0] != batch.answers[:, 1]).all()


def test_indent_for_needs_a_token_for_newline_and_indentation(gpt2_like: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match=r"'indent_for'.*not two different single tokens"):
        get_task("indent_for", gpt2_like, max_tokens=256).sample(1, split="train", seed=0)

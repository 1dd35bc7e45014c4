"""The generated corpus: valid, repetitive Python, most of whose statements close a random quote."""

import ast
import itertools
import random
import re

import pytest

from sparse_model.data.generated_python import (
    EVALUATION_GROUP,
    NOUNS,
    VERBS,
    Pattern,
    callee_group,
    generate_document,
    method_callees,
)

N_DOCUMENTS = 500

_NOUN = f"(?:{'|'.join(NOUNS)})"
# At least one expression per side of each task.
IDIOMS = {
    "single_double_quote": (r'\("[^"\n]+"\)\n', r"\('[^'\n]+'\)\n"),
    "bracket_counting": (r"= \[\w+, \w+, \w+\]\n", r"= \[\[\w+, \w+, \w+\]\]\n"),
    "set_or_string": (rf"({_NOUN}) = set\(\)\n.*\n +\1\.add\(", rf"({_NOUN}) = str\(\)\n.*\n +\1 \+= "),
    "set_or_string_fixedvarname": (
        r"current = set\(\)\n.*\n +current\.add\(",
        r"current = str\(\)\n.*\n +current \+= ",
    ),
    "final_kwarg": (r"\(\w+=None, \w+=None", r"def \w+\(\w+, \w+, \w+\):"),
    "class_init": (r"self\.(\w+) = \1\n +self\.(\w+) = \2\n",),
    "with_as": (r"with open\(\w+\) as f:", r"return open\(\w+\)\n    \S"),
    "bracket_brace": (r"= \{\w+: ", r"= \[\w+, "),
    "with_open": (r"""open\(src, ["']r""", r"""open\(dst, ["']w"""),
    "for_while": (rf"for {_NOUN} in ", rf"while {_NOUN}:"),
    "else_elif": (r"else:\n", r"if (\w+) == \d:\n.*\n +elif \1 == "),
    "fstring_brace": (r"""(\w+) = .*\n.* = f["']\w+ \{\1\}""", r"""(\w+) = .*\n.* = r["']\w+ \1["']"""),
    "if_ternary": (r"if \w+ and \w+:", r"\w+ if \w+ else \w+\n"),
    "var_swap": (r"(\w+), (\w+) = \2, \1\n",),
    "indent_for": (r"( *)for .*:\n\1    \S", r"( *)\w+ = \w+ \+ \w+\n\1\S"),
    "lambda_func": (r"return lambda \w+: ", r"async def \w+\("),
    "if_equals": (r"if not \w+ == ", r"\w+, \w+ = "),
    "enumerate_range": (r"for i, \w+ in enumerate\(", r"for i in range\("),
    "var_if": (r"if not \w+ == True:", r"\w+ = \w+ = True\n"),
    "while_return_true": (r"while True:\n", r"return True\n    return False"),
}


@pytest.fixture(scope="module")
def documents() -> list[str]:
    rng = random.Random(0)
    return [generate_document(rng) for _ in range(N_DOCUMENTS)]


def _string_of(statement: ast.stmt) -> str | None:
    """The string of a statement whose value is a call with one string as its only argument."""
    match getattr(statement, "value", None):
        case ast.Call(args=[ast.Constant(value=str(text))], keywords=[]):
            return text
    return None


def test_documents_are_valid_python_of_a_small_size(documents: list[str]) -> None:
    for document in documents:
        compile(document, "document", "exec")
        assert document.endswith("\n")
    lengths = [len(document) for document in documents]
    assert min(lengths) >= 300
    assert max(lengths) < 1700


def test_a_seed_gives_one_document() -> None:
    assert generate_document(random.Random("7")) == generate_document(random.Random("7"))
    assert generate_document(random.Random("7")) != generate_document(random.Random("8"))


def test_more_than_half_of_the_simple_statements_are_string_calls(documents: list[str]) -> None:
    kinds = (ast.Assign, ast.AugAssign, ast.Expr, ast.Return, ast.Pass)
    statements = [node for text in documents for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]
    strings = [text for statement in statements if (text := _string_of(statement)) is not None]
    assert len(strings) > 0.5 * len(statements)
    assert {len(text.split()) for text in strings} == {1, 2, 3, 4}
    assert all(text.split()[-1] in NOUNS for text in strings)


def test_each_quote_is_an_independent_fair_coin(documents: list[str]) -> None:
    quotes = [quote for text in documents for quote in re.findall(r"""\((["'])""", text)]
    assert len(quotes) > 5000
    double = sum(quote == '"' for quote in quotes) / len(quotes)
    repeated = sum(a == b for a, b in itertools.pairwise(quotes)) / (len(quotes) - 1)
    assert double == pytest.approx(0.5, abs=0.03)
    assert repeated == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("task", IDIOMS)
def test_the_idiom_of_every_task_is_frequent(task: str, documents: list[str]) -> None:
    text = "\n".join(documents)
    for side in IDIOMS[task]:
        assert len(re.findall(side, text)) >= 40, side


def test_the_vocabulary_is_small(documents: list[str]) -> None:
    words = set(re.findall(r"[A-Za-z]+", "\n".join(documents)))
    assert len(words) < 90


def test_held_out_combinations_do_not_occur(documents: list[str]) -> None:
    text = "\n".join(documents)
    groups = {callee_group(*callee) for callee in re.findall(rf"\b({_NOUN})\.({'|'.join(VERBS)})\(", text)}
    assert groups == {1, 2, 3}
    held_out = [callee.split(".") for callee in method_callees([EVALUATION_GROUP])]
    assert {callee_group(noun, verb) for noun, verb in held_out} == {EVALUATION_GROUP}
    call, total = r"\n *\w+\(\w+\)", r"\n *\w+ = \w+ \+ \w+"
    assert re.search(call + r"\n", text)
    assert re.search(total + r"\n", text)
    assert not re.search(call + total + r"\n", text)
    assert not re.search(total + call + r"\n", text)


def test_a_pattern_repeats_a_slot_and_keeps_names_distinct() -> None:
    pattern = Pattern("$n0 % $n1 {$n0} $d0$d1 $s0")
    for seed in range(50):
        first, percent, second, repeated, digits, _ = pattern.fill(random.Random(seed)).split(" ", maxsplit=5)
        assert (percent, repeated) == ("%", f"{{{first}}}")
        assert first != second
        assert digits[0] != digits[1]


def test_an_unknown_slot_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown slot letters .*'z'"):
        Pattern("$z0")

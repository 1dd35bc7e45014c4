"""Where a task's feature is in Python: by hand, in code with every trap, and in the task's own templates."""

import random

import pytest

from interventions.tasks.catalogue import TASKS
from interventions.tasks.predicates import INSIDE, PREDICATES, TWIN, places, template_contexts
from interventions.tasks.python_tokens import python_pieces

# Under each character what holds behind it: I inside, t in the twin.
MARKED: dict[str, tuple[str, ...]] = {
    "single_double_quote": (
        r"""x = "a\"b" + 'c"d'  # it's "c" """,
        r"""    IIIII    tttt              """,
        r"""f(b"1", rb'2', f"{x!r:>3}", '')""",
        r"""   II     tt    IIIIIIIII   t  """,
        r'''y = """a "b" 'c'""" "d" ''',
        r"""      IIIIIIIIIIII  II  """,
    ),
    "bracket_counting": (
        "x = f(a, [b, {c}], '((') + (d)",
        "     ttttIIIIIIIttttttt    tt ",
    ),
    "bracket_brace": (
        "x = {a: [b[c], (d), {e}], f: (g)}",
        "    IIIItt  ttt  tttIItIIIIII  I ",
    ),
    "for_while": (
        "for i in x[1:2]: pass",
        "  IIIIIIIIIIIII      ",
        "while (lambda: 1)(): y = [k for k in z]",
        "    ttttttttttttttt                    ",
    ),
    "while_return_true": (
        "if x: return {a: b}  # no",
        "           tttttttt      ",
        "while not x: return",
        "    IIIIIII       t",
    ),
    "with_as": (
        "with a(b) as c, d as e: pass",
        "   IIIIIIII                 ",
        "with a: return b; c",
        "   III       ttt   ",
    ),
    "else_elif": (
        "if x: pass\nelif y == z: pass\nelse: a = b if c else d",
        "          \n   tttttttt      \n   I                   ",
    ),
    "fstring_brace": (
        "x = F'{a}b', 'c', rf'd'",
        "     IIIII   tt     II ",
    ),
    "if_ternary": (
        "if a: x = b if c else d",
        " III         ttttttt   ",
        "y = [e for e in f if e], (g if h else i)",
        "                             ttttttt    ",
    ),
    "final_kwarg": (
        "def f(a, b=(1, c), *, d): x(e=1)",
        "     tttttIIIIIIIIIIIII         ",
    ),
    "lambda_func": (
        "def f(x): return lambda a, b={1: 2}: a",
        "  ttt                 IIIIIIIIIIIII   ",
    ),
    "indent_for": (
        "for i in x: a = b",
        "  IIIIIIIII ttttt",
    ),
    "if_equals": (
        "if a == b: x.y = z = f(k=1)",
        " IIIIIIII  tttt            ",
    ),
    "var_if": (
        "if a == b: x = f(k=1)",
        " IIIIIIII    tttttttt",
    ),
    "enumerate_range": (
        "for i, j in x: y = [k for k in z]",
        "     IIIIII                  t   ",
    ),
}


@pytest.mark.parametrize("task", PREDICATES)
def test_places_of_written_code(task: str) -> None:
    """The marks stand under the character behind which a place lies."""
    lines = MARKED[task]
    for code, marks in zip(lines[::2], lines[1::2], strict=True):
        found = places(PREDICATES[task], code + "\n", python_pieces(code + "\n")).label
        shown = "".join(" It"[label] for label in found[1 : len(code) + 1])
        wanted = "".join(mark if mark in "It" else " " for mark in marks)
        assert shown == wanted[: len(code)].ljust(len(code)), f"\n{code}\n{shown}\n{wanted}"


@pytest.mark.parametrize("task", PREDICATES)
def test_a_tasks_own_prompts_end_inside_and_in_the_twin(task: str) -> None:
    """And their contexts there are among those that templates are said to have."""
    rng, predicate, known = random.Random(3), PREDICATES[task], template_contexts(task)
    for templates in TASKS[task].templates.values():
        for template in templates:
            pair = TASKS[task].make(rng, template)
            for member, (prompt, completion) in enumerate(zip(pair.prompt, pair.completion, strict=True)):
                text = prompt + completion
                marked = places(predicate, text, python_pieces(text))
                assert marked.label[len(prompt)] == (INSIDE if member == predicate.member else TWIN), prompt
                assert marked.context(len(prompt)) in known


def test_contexts_that_templates_do_not_have() -> None:
    def of(code: str, at: str, task: str = "single_double_quote") -> bool:
        marked = places(PREDICATES[task], code, python_pieces(code))
        return marked.context(code.index(at) + 1) in template_contexts(task)

    assert of('f("red cup")\n', "d c")
    assert not of('x = "red cup"\n', "d c")
    assert not of('f(b"red cup")\n', "d c")
    assert not of('f("""red cup""")\n', "d c")
    assert of("f(1)\nwhile x:\n    pass\n", "x", "for_while")
    assert not of("f(1)\nwhile x < 1:\n    pass\n", "1:", "for_while")

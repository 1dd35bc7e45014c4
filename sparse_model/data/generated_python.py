"""A seeded generator of simple, repetitive Python: the corpus of the embedded default.

The distribution of `generate_document`:

1. A document is blocks separated by a blank line, until a length drawn uniformly from 300 to 1100 characters
   is passed. A block is a run of top-level statements (probability .35), a function (.45) or a class (.2).
2. Bodies are items in random order. More than half of all simple statements are *string calls*: a callee
   (`name` or `name.name`) with one string as its only argument, standing alone, assigned, or returned. The
   string is zero to three adjectives and a noun, so a noun ends it; its quote is `"` or `'` with probability
   1/2, independent of everything else, so only the opening `("` or `('` tells the closing `")` or `')`.
3. The other items are the idioms in `STATEMENTS`, `ENDINGS`, `FUNCTIONS` and `CLASS_BODIES`: both sides of
   each of the twenty tasks of `interventions.tasks`. Their names and digits are uniform (in swaps and
   `__init__` over `COPIED_NOUNS`), and the context decides the answer: a flat list closes with `]` and a
   nested one with `]]`, parameters have all defaults or none, `elif` tests the name that its `if` tests, and
   so on.

Held out, for prompts that no document contains: method callees `noun.verb` of group 0 (`callee_group`), and a
plain call `verb(noun)` on a line next to a sum `noun = noun + noun`.
"""

import random
import re
from collections.abc import Callable, Sequence
from typing import Final

# fmt: off
NOUNS: Final = (
    "cat", "dog", "sun", "sky", "box", "cup", "hat", "bag", "map", "key", "car", "bus",
    "tree", "rock", "fish", "bird", "moon", "leaf", "road", "door", "lamp", "ship", "wolf", "star",
)
# fmt: on
# Parameters of __init__ and swapped names: few, because a small model is slow to learn to copy each name.
COPIED_NOUNS: Final = NOUNS[::4]
VERBS: Final = ("load", "save", "find", "send", "read", "make", "show", "pull")
ADJECTIVES: Final = ("red", "big", "old", "new", "hot", "raw")
DIGITS: Final = tuple("0123456789")
QUOTES: Final = ('"', "'")

N_CALLEE_GROUPS: Final = 4
EVALUATION_GROUP: Final = 0
SELECTION_GROUP: Final = 1


def callee_group(noun: str, verb: str) -> int:
    """Group 0 .. 3 of the method callee `noun.verb`; documents never contain `EVALUATION_GROUP`."""
    return (NOUNS.index(noun) + VERBS.index(verb)) % N_CALLEE_GROUPS


def method_callees(groups: Sequence[int]) -> tuple[str, ...]:
    """All `noun.verb` whose group is one of `groups`."""
    return tuple(f"{noun}.{verb}" for noun in NOUNS for verb in VERBS if callee_group(noun, verb) in groups)


_TRAIN_CALLEES: Final = method_callees(range(2, N_CALLEE_GROUPS))
_SELECTION_CALLEES: Final = method_callees([SELECTION_GROUP])
_EVALUATION_CALLEES: Final = method_callees([EVALUATION_GROUP])
_PLAIN_CALLEES: Final = (*VERBS, "print")
_METHOD_CALLEES: Final = _TRAIN_CALLEES + _SELECTION_CALLEES

# Words of a phrase.
_PHRASE_LENGTHS: Final = (1, 2, 2, 3, 3, 4)


def _one_of(options: Sequence[str]) -> Callable[[random.Random], str]:
    """A draw from `options`; `int(random() * n)` because `Random.choice` is five times slower."""
    n_options = len(options)
    return lambda rng: options[int(rng.random() * n_options)]


_noun, _adjective, _quote = _one_of(NOUNS), _one_of(ADJECTIVES), _one_of(QUOTES)
_plain_callee, _method_callee = _one_of(_PLAIN_CALLEES), _one_of(_METHOD_CALLEES)


def _phrase(rng: random.Random) -> str:
    n_words = _PHRASE_LENGTHS[int(rng.random() * len(_PHRASE_LENGTHS))]
    return " ".join([*(_adjective(rng) for _ in range(n_words - 1)), _noun(rng)])


def _string_call(rng: random.Random) -> str:
    callee = _plain_callee(rng) if rng.random() < 0.5 else _method_callee(rng)
    quote = _quote(rng)
    return f"{callee}({quote}{_phrase(rng)}{quote})"


# The slots of a Pattern by their letter; those of _DISTINCT are drawn without replacement.
_DRAWS: Final[dict[str, Callable[[random.Random], str]]] = {
    "a": _adjective,
    "e": _one_of(_EVALUATION_CALLEES),
    "m": _one_of(_TRAIN_CALLEES),
    "p": _phrase,
    "q": _quote,
    "s": _string_call,
    "v": _one_of(VERBS),
    "x": _one_of(_SELECTION_CALLEES),
}
_DISTINCT: Final = {"n": NOUNS, "w": COPIED_NOUNS, "d": DIGITS}
_SLOT: Final = re.compile(r"\$([a-z])([0-9])")


class Pattern:
    """A text with slots `$<letter><digit>`; a slot that occurs twice gets the same filling.

    Letters: `n` noun, `w` noun of `COPIED_NOUNS` and `d` digit, each letter's distinct within one pattern;
    and, drawn independently, `a` adjective, `v` verb, `q` quote character, `p` phrase (up to three
    adjectives and a noun), `s` string call, and `m`, `x`, `e` method callee of the train, selection and
    evaluation groups.

    Raises:
        ValueError: an unknown letter.
    """

    def __init__(self, text: str) -> None:
        slots = sorted(set(_SLOT.findall(text)))
        unknown = sorted({letter for letter, _ in slots} - _DRAWS.keys() - _DISTINCT.keys())
        if unknown:
            known = ", ".join(sorted({*_DRAWS, *_DISTINCT}))
            raise ValueError(f"unknown slot letters {unknown} in {text!r}; use {known}")
        self._format = _SLOT.sub(r"%(\1\2)s", text.replace("%", "%%"))
        self._free = tuple((letter + digit, _DRAWS[letter]) for letter, digit in slots if letter in _DRAWS)
        self._distinct = tuple(
            (tuple(letter + digit for letter, digit in slots if letter == kind), words)
            for kind, words in _DISTINCT.items()
            if any(letter == kind for letter, _ in slots)
        )

    def fill(self, rng: random.Random) -> str:
        """The text with every slot filled from `rng`."""
        values = {name: draw(rng) for name, draw in self._free}
        for names, words in self._distinct:
            values.update(zip(names, rng.sample(words, len(names)), strict=True))
        return self._format % values


# Items whose names must be copied from the lines before, which takes a model longest to learn.
_COPYING: Final = (
    # var_swap, if_equals
    "$w0, $w1 = $w1, $w0",
    "$w0, $w1 = $w1, $w0",
    # fstring_brace
    "$n0 = $s0\n$n1 = f$q0$a0 {$n0}$q0\n$s1",
    "$n0 = $s0\n$n1 = r$q0$a0 $n0$q0\n$s1",
    # else_elif
    "if $n0 == $d0:\n    $s0\nelif $n0 == $d1:\n    $s1",
    "if $n0 == $d0:\n    $s0\nelif $n0 == $d1:\n    $s1\nelse:\n    $s2",
    # for_while
    "for $n0 in $n1:\n    $v0($n0)\n    $s0",
    "while $n0:\n    $v0($n0)\n    $s0",
)
# Items of a body, wherever it stands. `return` is in ENDINGS, for functions only.
STATEMENTS: Final = (
    *_COPYING,
    *_COPYING,
    # bracket_counting, bracket_brace
    "$n0 = [$n1, $n2, $n3]",
    "$n0 = [$d1, $d2, $d3]",
    "$n0 = [[$n1, $n2, $n3]]",
    "$n0 = [[$d1, $d2, $d3]]",
    "$n0 = {$n1: $d1, $n2: $d2}",
    "$n0 = {$n1: $n2, $n3: $n4}",
    # set_or_string, set_or_string_fixedvarname
    "$n0 = set()\nfor $n1 in $n2:\n    $n0.add($n1)\n    $s0",
    '$n0 = ""\nfor $n1 in $n2:\n    $n0 += $n1\n    $s0',
    "$n0 = str()\nfor $n1 in $n2:\n    $n0 += $n1\n    $s0",
    "current = set()\nfor $n1 in $n2:\n    current.add($n1)\n    $s0",
    'current = ""\nfor $n1 in $n2:\n    current += $n1\n    $s0',
    "current = str()\nfor $n1 in $n2:\n    current += $n1\n    $s0",
    # with_as, with_open
    "with open($n0) as f:\n    $s0\n    $s1",
    "$n0 = open($n1)\n$s0\n$s1",
    *2 * ("with open(src, $q0r$q0) as f:\n    $s0\n    $s1", "with open(dst, $q0w$q0) as f:\n    $s0"),
    # for_while, enumerate_range
    "for $n0 in $n1:\n    $s0",
    "for $n0 in $n1:\n    $s0\n    $n2 = $s1",
    "while $n0:\n    $s0",
    "while $n0:\n    $n1 = $s0\n    $s1",
    "for i in range($d0):\n    $s0",
    "for i, $n0 in enumerate($n1):\n    $s0",
    "$n0 = [$n1 + i for i in range($d0)]\n$s0",
    "$n0 = [$n1 for i, $n1 in enumerate($n2)]\n$s0",
    # else_elif, if_equals, var_if
    "if $n0 == $d0:\n    $s0\nelse:\n    $s1",
    "if not $n0 == $n1:\n    $s0",
    "if not $n0 == True:\n    $s0",
    "$n0 = $n1 = True\n$s0",
    # if_ternary
    "if $n0 and $n1:\n    $s0",
    "$n0 = $n1 if $n2 else $n3\n$s0",
    "if $n0 and not $n1:\n    $s0",
    # indent_for; the string calls keep the sum and the plain call apart
    "$n0 = $n1 + $n2\n$s0",
    "$v0($n0)\n$s0",
)
# Last lines of a function.
ENDINGS: Final = (
    "return $s0",
    "return $s0",
    "$n0 = $s0\nreturn $s1",
    # while_return_true
    "if $n0 == $d0:\n    return True\nreturn False",
    "if $n0 == $d0:\n    while True:\n        $s0\nreturn False",
    # with_as
    "if $n0 == $d0:\n    return open($n1)\nreturn $s0",
    "if $n0 == $d0:\n    with open($n1) as f:\n        $s0\nreturn $s1",
    # if_ternary
    "return $n0 if $n1 else $n2",
    # lambda_func
    "return lambda $n0: $n0 + $n1",
    "async def $n0($n1):\n    $s0\n    return $s1\nreturn $n0",
)
# final_kwarg
_PARAMETERS: Final = (
    "$n1",
    "$n1, $n2",
    "$n1, $n2, $n3",
    "$n1, $n2, $n3",
    "$n1=None, $n2=None",
    "$n1=None, $n2=None, $n3=None",
)
FUNCTIONS: Final = tuple(f"def $v0({parameters}):" for parameters in _PARAMETERS)
# class_init
CLASS_BODIES: Final = tuple(
    "class Item:\n    def __init__(self, $w0, $w1, $w2):\n        "
    + "\n        ".join(f"self.$w{i} = $w{i}" for i in order)
    + "\n    def $v0(self):\n        $s0\n        $n3 = $s1\n        $s2\n        return $s3"
    for order in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
)

_INDENT: Final = "    "
_STRING_STATEMENTS: Final = ("$s0", "$n0 = $s0")


def indented(text: str, indent: str) -> str:
    """`text` with `indent` put after every newline (not before the first line)."""
    return text.replace("\n", "\n" + indent)


def _compiled(texts: Sequence[str], indent: str = "") -> tuple[Pattern, ...]:
    return tuple(Pattern(indented(text, indent)) for text in texts)


_LEVELS: Final = {
    indent: (_compiled(_STRING_STATEMENTS, indent), _compiled(STATEMENTS, indent)) for indent in ("", _INDENT)
}
_FUNCTION_PATTERNS, _CLASS_PATTERNS = _compiled(FUNCTIONS), _compiled(CLASS_BODIES)
_ENDING_PATTERNS = _compiled(ENDINGS, _INDENT)


def _pick(rng: random.Random, patterns: tuple[Pattern, ...]) -> str:
    return patterns[int(rng.random() * len(patterns))].fill(rng)


def _body(rng: random.Random, indent: str) -> list[str]:
    """2 to 5 items of a body, the first line of each without `indent`."""
    strings, idioms = _LEVELS[indent]
    return [_pick(rng, strings if rng.random() < 0.4 else idioms) for _ in range(2 + int(rng.random() * 4))]


def _function(rng: random.Random) -> str:
    lines = [_pick(rng, _FUNCTION_PATTERNS), *_body(rng, _INDENT), _pick(rng, _ENDING_PATTERNS)]
    return ("\n" + _INDENT).join(lines)


def _block(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.35:
        return "\n".join(_body(rng, ""))
    return _function(rng) if kind < 0.8 else _pick(rng, _CLASS_PATTERNS)


def generate_document(rng: random.Random) -> str:
    """One document: valid Python of about 300 to 1500 characters, ending in a newline."""
    target = 300 + rng.random() * 800
    blocks: list[str] = []
    length = 0
    while length < target:
        blocks.append(_block(rng))
        length += len(blocks[-1]) + 2
    return "\n\n".join(blocks) + "\n"

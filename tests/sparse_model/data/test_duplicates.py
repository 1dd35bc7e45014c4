"""MinHash signatures estimate the similarity of texts, and similar texts are found."""

import random
import re

import numpy as np

from sparse_model.data.duplicates import BANDS, ROWS, SHINGLE, SeenTexts, signature


def listing(seed: int, lines: int = 120) -> list[str]:
    """Lines of assignments that no other seed has."""
    rng = random.Random(seed)
    return [f"name_{rng.randrange(10**6)} = call({rng.randrange(10**6)}, 'text')\n" for _ in range(lines)]


def similarity(a: str, b: str) -> float:
    """Jaccard similarity of the token shingles, counted."""
    sides = []
    for text in (a, b):
        tokens = re.findall(r"\w+|[^\w\s]", text)
        sides.append(set(zip(*(tokens[start:] for start in range(SHINGLE)), strict=False)))
    return len(sides[0] & sides[1]) / len(sides[0] | sides[1])


def estimate(a: str, b: str) -> float:
    return float((signature(a) == signature(b)).mean())


def test_a_signature_estimates_the_share_of_common_shingles() -> None:
    errors = []
    for seed in range(40):
        lines, other = listing(seed), listing(seed + 1000)
        changed = "".join(lines[seed:] + other[:seed])
        errors.append(estimate("".join(lines), changed) - similarity("".join(lines), changed))
    assert abs(np.mean(errors)) < 0.02
    assert np.std(errors) < 0.06  # 128 places: at most sqrt(.25 / 128) = .044


def test_only_tokens_count() -> None:
    text = "def f(a, b):\n    return a+b\n" * 3
    assert estimate(text, text.replace("\n", "\n\n").replace("+", " +\t")) == 1
    assert estimate(text, text.replace("return", "yield")) < 0.7
    assert estimate("ab cd ef gh ij", "abcdefghij") == 0


def test_short_and_empty_texts_have_signatures() -> None:
    for text in ("", "   \n", "a", "x = 1", "é"):
        assert signature(text).shape == (BANDS * ROWS,)
    assert estimate("x = 1", "x = 2") == 0
    assert estimate("x = 1", "x  =  1\n") == 1


def test_near_duplicates_are_found_and_others_are_not() -> None:
    seen = SeenTexts()
    texts = [listing(seed) for seed in range(30)]
    for lines in texts:
        assert not seen.resembles(signature("".join(lines)))
        seen.add(signature("".join(lines)))
    nearly = ["".join(lines[:-3]) for lines in texts]  # similarity .97
    apart = ["".join(lines[:40] + listing(seed + 100)[:80]) for seed, lines in enumerate(texts)]  # about .2
    assert all(seen.resembles(signature(text)) for text in nearly)
    assert not any(seen.resembles(signature(text)) for text in apart)

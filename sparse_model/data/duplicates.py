"""Near-duplicate texts, by MinHash.

1. A text is cut into words and single signs; every `SHINGLE` neighbours in a row are hashed to one number.
2. Its signature holds, for each of `BANDS * ROWS` permutations of the numbers, the smallest of its shingles. Two
   texts agree in a place with the probability that a shingle of either is in both (their Jaccard similarity).
3. Texts that agree in a whole band of `ROWS` places are candidates: of those as similar as `SIMILARITY`, 95 % are.
"""

import random

import numpy as np
from jaxtyping import UInt32, UInt64

SHINGLE = 5
BANDS, ROWS = 16, 8
SIMILARITY = 0.8
"""Estimated similarity from which a text is a near-duplicate; the estimate's standard deviation there is .035."""

# Python's generator, whose numbers stay the same in every release.
_DRAW = random.Random(0)
_BYTE_WEIGHTS = np.array([_DRAW.getrandbits(64) | 1 for _ in range(64)], np.uint64)
_TOKEN_WEIGHTS = np.array([_DRAW.getrandbits(64) | 1 for _ in range(SHINGLE)], np.uint64)
_FACTORS = np.array([_DRAW.getrandbits(32) | 1 for _ in range(BANDS * ROWS)], np.uint32)[:, None]
_CHUNK = 2048  # shingles at a time, so that their products stay in the processor's cache

_BLANK, _WORD, _SIGN = range(3)
_KINDS = np.full(256, _SIGN, np.uint8)
_KINDS[list(b" \t\r\n\f\v")] = _BLANK
_KINDS[[*b"_", *range(128, 256), *(code for code in range(128) if chr(code).isalnum())]] = _WORD


def signature(text: str) -> UInt32[np.ndarray, " place"]:
    """The MinHash signature of `text`."""
    shingles = _shingles(text)
    smallest = np.full(BANDS * ROWS, np.iinfo(np.uint32).max, np.uint32)
    for start in range(0, len(shingles), _CHUNK):
        # Multiplying by an odd number permutes the 32-bit numbers.
        products = _FACTORS * shingles[start : start + _CHUNK]
        np.minimum(smallest, products.min(axis=1), out=smallest)
    return smallest


def _shingles(text: str) -> UInt32[np.ndarray, " shingle"]:
    tokens = _token_hashes(text)
    if len(tokens) < SHINGLE:  # one shingle, filled up with zeros
        tokens = np.concatenate([tokens, np.zeros(SHINGLE - len(tokens), np.uint64)])
    count = len(tokens) - SHINGLE + 1
    total = np.zeros(count, np.uint64)
    for place, weight in enumerate(_TOKEN_WEIGHTS):
        total += tokens[place : place + count] * weight
    return (total >> np.uint64(32)).astype(np.uint32)


def _token_hashes(text: str) -> UInt64[np.ndarray, " token"]:
    """A number for each word and sign: the sum of its bytes, each weighted by its place."""
    data = np.frombuffer(text.encode(errors="surrogateescape"), np.uint8)
    kinds = _KINDS[data]
    before = np.concatenate([np.array([_BLANK], np.uint8), kinds[:-1]])
    starts = np.flatnonzero((kinds == _SIGN) | ((kinds == _WORD) & (before != _WORD)))
    if not len(starts):
        return np.zeros(0, np.uint64)
    lengths = np.diff(starts, append=len(data))
    places = np.arange(len(data) - starts[0]) - np.repeat(starts - starts[0], lengths)
    weighted = data[starts[0] :] * _BYTE_WEIGHTS[np.minimum(places, len(_BYTE_WEIGHTS) - 1)]
    weighted[kinds[starts[0] :] == _BLANK] = 0
    return np.add.reduceat(weighted, starts - starts[0])


class SeenTexts:
    """The signatures of the texts so far, for asking whether another one resembles any of them."""

    def __init__(self) -> None:
        self._signatures: list[UInt32[np.ndarray, " place"]] = []
        self._with_band: dict[tuple[int, bytes], list[int]] = {}

    def add(self, signature: UInt32[np.ndarray, " place"]) -> None:
        """Remember a text."""
        for band in _bands(signature):
            self._with_band.setdefault(band, []).append(len(self._signatures))
        self._signatures.append(signature)

    def resembles(self, signature: UInt32[np.ndarray, " place"]) -> bool:
        """Whether a text so far is a near-duplicate of this one."""
        candidates = {number for band in _bands(signature) for number in self._with_band.get(band, ())}
        return any((self._signatures[number] == signature).mean() >= SIMILARITY for number in candidates)


def _bands(signature: UInt32[np.ndarray, " place"]) -> list[tuple[int, bytes]]:
    return [(number, band.tobytes()) for number, band in enumerate(signature.reshape(BANDS, ROWS))]

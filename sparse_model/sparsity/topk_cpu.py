"""The CPU kernels behind `sparse_model.sparsity.topk`, compiled by numba on first use and cached on disk.

They work on bit patterns, integers in the order of the floats' magnitudes, and release the GIL. `sign` clears the sign
bit; its type, at least 32 bits wide, is that of the working copies: the threshold search on 16-bit values would widen
them in every comparison. `no_type_check` keeps the run-time shape checks of the tests out of what numba compiles.
"""

from typing import no_type_check

import numba
import numpy as np


@numba.njit(cache=True, nogil=True)
@no_type_check
def _count_at_least(values, threshold):
    count = 0
    for i in range(values.shape[0]):
        count += values[i] >= threshold
    return count


@numba.njit(cache=True, nogil=True)
@no_type_check
def _threshold(values, k, low, high):
    """(t, exact): the k-th largest value, or an earlier t with exactly k values >= t, when `exact`."""
    a, b = np.int64(low), np.int64(high) + 1
    while b - a > 1:
        middle = a + (b - a) // 2
        count = _count_at_least(values, values.dtype.type(middle))
        if count == k:
            return middle, True
        if count > k:
            a = middle
        else:
            b = middle
    return a, False


@numba.njit(cache=True, nogil=True)
@no_type_check
def _last_equal(values, t, k):
    """Index of the last value equal to t that still belongs to the k largest, the earlier ones first."""
    room = k
    for i in range(values.shape[0]):
        room -= values[i] > t
    for i in range(values.shape[0]):
        if values[i] == t:
            room -= 1
            if room == 0:
                return i
    return -1


@numba.njit(cache=True, nogil=True)
@no_type_check
def keep_masked(bits, mask, out):
    for i in range(bits.shape[0]):
        out[i] = bits[i] if mask[i] else 0


@numba.njit(cache=True, nogil=True)
@no_type_check
def select_rows(bits, k, out, mask, sign, infinity):
    """Fill out and mask; true when a NaN was met."""
    n_rows, width = bits.shape
    values = np.full(width, sign)
    for r in range(n_rows):
        low = high = bits[r, 0] & sign
        for i in range(width):
            value = bits[r, i] & sign
            values[i] = value
            low, high = min(low, value), max(high, value)
        if high > infinity:
            return True
        found, exact = _threshold(values, k, low, high)
        t = values.dtype.type(found)
        # Of the values equal to t those up to `last` are kept.
        last = width if exact else _last_equal(values, t, k)
        for i in range(width):
            keep = (values[i] > t) | ((values[i] == t) & (i <= last))
            mask[r, i] = keep
            out[r, i] = bits[r, i] if keep else 0
    return False


@numba.njit(cache=True, nogil=True)
@no_type_check
def _at_least(bits, floor, sign):
    """The patterns >= floor, compacted. Blocks without any are skipped after one vectorised maximum."""
    block = 64
    n = bits.shape[0]
    values = np.full(n, sign)
    m = 0
    for start in range(0, n, block):
        stop = min(start + block, n)
        highest = bits[start] & sign
        for i in range(start, stop):
            highest = max(highest, bits[i] & sign)
        if highest >= floor:
            for i in range(start, stop):
                value = bits[i] & sign
                values[m] = value
                m += value >= floor
    return values[:m]


@numba.njit(cache=True, nogil=True)
@no_type_check
def top_mask(bits, k, mask, sign, infinity):
    """Add the k largest to the mask; false when a NaN was met.

    A strided sample guesses a floor a little below the threshold; the exact search then runs on the few patterns
    above that floor. A guess that leaves fewer than k is replaced by no floor at all, so the result never depends
    on it. With sign = -1 the bits are taken as they are and negative ones are out of the running.
    """
    n = bits.shape[0]
    stride = max(1, n // 8192)
    sample = np.full((n + stride - 1) // stride, sign)
    for i in range(sample.shape[0]):
        sample[i] = bits[i * stride] & sign
    wanted = int(sample.shape[0] * (k / n) * 1.25) + 32
    zero = sign & 0
    floor = zero
    if wanted < sample.shape[0]:
        guess, _ = _threshold(sample, wanted, zero, infinity)
        floor = sample.dtype.type(guess)
    values = _at_least(bits, floor, sign)
    if values.shape[0] < k:
        values = _at_least(bits, zero, sign)
    high = np.max(values)
    if high > infinity:
        return False
    found, exact = _threshold(values, k, np.min(values), high)
    t = values.dtype.type(found)
    least = t if exact else t + 1
    for i in range(n):
        mask[i] |= (bits[i] & sign) >= least
    if not exact:
        room = k
        for i in range(values.shape[0]):
            room -= values[i] > t
        for i in range(n):
            if (bits[i] & sign) == t:
                mask[i] = True
                room -= 1
                if room == 0:
                    break
    return True


@numba.njit(cache=True, nogil=True)
@no_type_check
def force_rows(bits, j, mask, rest, sign, infinity):
    """Mark the j largest of every row in the mask; false when a NaN was met.

    `rest` becomes the magnitudes of all others, and -1 for the marked.
    """
    n_rows, width = bits.shape
    largest = np.full(j, sign)
    where = np.empty(j, np.int64)
    for r in range(n_rows):
        largest[:] = -1
        least = largest[j - 1]
        if _magnitudes(bits[r], rest[r], sign) > infinity:
            return False
        for i in range(width):
            if rest[r, i] > least:
                _insert(largest, where, rest[r, i], i)
                least = largest[j - 1]
        for place in range(j):
            mask[r, where[place]] = True
            rest[r, where[place]] = -1
    return True


@numba.njit(cache=True, nogil=True)
@no_type_check
def force_columns(bits, j, mask, rest, sign, infinity):
    """The same for the j largest of every column."""
    n_rows, width = bits.shape
    largest = np.full((width, j), sign)
    largest[:] = -1
    where = np.empty((width, j), np.int64)
    least = largest[:, j - 1].copy()
    for r in range(n_rows):
        if _magnitudes(bits[r], rest[r], sign) > infinity:
            return False
        for i in range(width):
            if rest[r, i] > least[i]:
                _insert(largest[i], where[i], rest[r, i], r)
                least[i] = largest[i, j - 1]
    for i in range(width):
        for place in range(j):
            mask[where[i, place], i] = True
            rest[where[i, place], i] = -1
    return True


@numba.njit(cache=True, nogil=True)
@no_type_check
def _magnitudes(bits, out, sign):
    """Fill out with the magnitudes; returns the largest."""
    high = bits[0] & sign
    for i in range(bits.shape[0]):
        value = bits[i] & sign
        out[i] = value
        high = max(high, value)
    return high


@numba.njit(cache=True, nogil=True)
@no_type_check
def _insert(largest, where, value, index):
    """Put a value behind all that are at least as large; the last one drops out."""
    place = largest.shape[0] - 1
    while place > 0 and largest[place - 1] < value:
        largest[place], where[place] = largest[place - 1], where[place - 1]
        place -= 1
    largest[place], where[place] = value, index

"""The CPU kernels behind `sparse_model.selection`, compiled by numba on first use and cached on disk.

They work on bit patterns, integers in the order of the floats' magnitudes, and release the GIL. `no_type_check` keeps
the run-time shape checks of the tests out of what numba compiles.
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
def keep_masked(bits, mask, out):
    for i in range(bits.shape[0]):
        out[i] = bits[i] if mask[i] else 0


@numba.njit(cache=True, nogil=True)
@no_type_check
def select_rows(bits, k, out, mask, sign, infinity):
    """Fill out and mask; true when a NaN was met."""
    n_rows, width = bits.shape
    values = np.empty(width, bits.dtype)
    for r in range(n_rows):
        low = high = bits[r, 0] & sign
        for i in range(width):
            value = bits[r, i] & sign
            values[i] = value
            low, high = min(low, value), max(high, value)
        if high > infinity:
            return True
        found, exact = _threshold(values, k, low, high)
        t = bits.dtype.type(found)
        if exact:
            for i in range(width):
                keep = values[i] >= t
                mask[r, i] = keep
                out[r, i] = bits[r, i] if keep else 0
            continue
        room = k
        for i in range(width):
            room -= values[i] > t
        for i in range(width):
            keep = values[i] > t
            if values[i] == t and room > 0:
                keep = True
                room -= 1
            mask[r, i] = keep
            out[r, i] = bits[r, i] if keep else 0
    return False


@numba.njit(cache=True, nogil=True)
@no_type_check
def _at_least(bits, floor, sign):
    """The patterns >= floor, compacted. Blocks without any are skipped after one vectorised maximum."""
    block = 64
    n = bits.shape[0]
    found = np.empty(n, bits.dtype)
    m = 0
    for start in range(0, n, block):
        stop = min(start + block, n)
        highest = bits.dtype.type(0)
        for i in range(start, stop):
            highest = max(highest, bits[i] & sign)
        if highest >= floor:
            for i in range(start, stop):
                value = bits[i] & sign
                found[m] = value
                m += value >= floor
    return found[:m]


@numba.njit(cache=True, nogil=True)
@no_type_check
def top_mask(bits, k, mask, sign, infinity):
    """Fill mask; false when a NaN was met.

    A strided sample guesses a floor a little below the threshold; the exact search then runs on the few patterns
    above that floor. A guess that leaves fewer than k is replaced by no floor at all, so the result never depends
    on it.
    """
    n = bits.shape[0]
    stride = max(1, n // 8192)
    sample = np.empty((n + stride - 1) // stride, bits.dtype)
    for i in range(sample.shape[0]):
        sample[i] = bits[i * stride] & sign
    wanted = int(sample.shape[0] * (k / n) * 1.25) + 32
    floor = bits.dtype.type(0)
    if wanted < sample.shape[0]:
        guess, _ = _threshold(sample, wanted, bits.dtype.type(0), sign)
        floor = bits.dtype.type(guess)
    values = _at_least(bits, floor, sign)
    if values.shape[0] < k:
        values = _at_least(bits, bits.dtype.type(0), sign)
    high = np.max(values)
    if high > infinity:
        return False
    found, exact = _threshold(values, k, np.min(values), high)
    t = bits.dtype.type(found)
    room = n if exact else k
    if not exact:
        for i in range(values.shape[0]):
            room -= values[i] > t
    for i in range(n):
        mask[i] = (bits[i] & sign) >= t
    if not exact:
        for i in range(n):
            if (bits[i] & sign) == t:
                mask[i] = room > 0
                room -= 1
    return True

"""The noise of random erasing: standard normals of the NOISE stream, many at a time.

The numbers are those of `philox` and `normal_pair` (see `philox.py`), float32. Logarithm, sine and cosine are
polynomials in float64, accurate to 1e-11: calls into libm would keep LLVM from vectorising. Rounded to float32, a
result differs from libm's by at most one ulp.
"""

import math
from typing import NamedTuple

import numpy as np

from fastdeit.pipelines.jit import compiled, inlined
from fastdeit.pipelines.plan.philox import NOISE, philox

NOISE_ROWS = 16  # rows of an erased box drawn at once

_LN2, _HALF_PI = math.log(2.0), math.pi / 2.0
_MANTISSA = np.int64((1 << 52) - 1)
_EXPONENT_OF_ONE = np.int64(1023 << 52)
_ROOT_HALF_BITS = np.int64(np.array(math.sqrt(0.5)).view(np.int64))

_S3, _S5, _S7, _S9, _S11, _S13 = (math.cos(math.pi * (n // 2)) / math.factorial(n) for n in (3, 5, 7, 9, 11, 13))
_C2, _C4, _C6, _C8, _C10, _C12 = (math.cos(math.pi * (n // 2)) / math.factorial(n) for n in (2, 4, 6, 8, 10, 12))


@inlined
def _log_of_mantissa(m):
    """Natural logarithm of m in [sqrt(1/2), sqrt(2)): the series of 2 artanh((m - 1) / (m + 1))."""
    s = (m - 1.0) / (m + 1.0)
    t = s * s
    series = 1.0 + t * (1 / 3 + t * (1 / 5 + t * (1 / 7 + t * (1 / 9 + t * (1 / 11 + t * (1 / 13))))))
    return 2.0 * s * series


@inlined
def _sine(x):
    """Sine of x in [-pi/4, pi/4]: Taylor's series."""
    t = x * x
    return x * (1.0 + t * (_S3 + t * (_S5 + t * (_S7 + t * (_S9 + t * (_S11 + t * _S13))))))


@inlined
def _cosine(x):
    """Cosine of x in [-pi/4, pi/4]: Taylor's series."""
    t = x * x
    return 1.0 + t * (_C2 + t * (_C4 + t * (_C6 + t * (_C8 + t * (_C10 + t * _C12)))))


@compiled
def _normals(radius_words, angle_words, number, count, cos_part, sin_part):
    """Box-Muller of `count` pairs of words. number: (count,) float64 work memory."""
    bits = number.view(np.int64)
    for k in range(count):
        number[k] = np.float64(radius_words[k]) + 0.5
    for k in range(count):
        # Splitting off a power of two leaves a mantissa near 1, where the logarithm loses no digits.
        above = bits[k] - _ROOT_HALF_BITS
        exponent = above >> 52
        bits[k] = (above & _MANTISSA) + _ROOT_HALF_BITS
        sin_part[k] = np.float32(exponent)
    for k in range(count):
        log = _log_of_mantissa(number[k]) - (32.0 - np.float64(sin_part[k])) * _LN2
        number[k] = math.sqrt(-2.0 * log)
    for k in range(count):
        quarters = (np.float64(angle_words[k]) + 0.5) * (4.0 / 4294967296.0)
        nearest = np.floor(quarters + 0.5)
        angle = (quarters - nearest) * _HALF_PI
        quadrant = np.int64(nearest)
        sine, cosine = _sine(angle), _cosine(angle)
        odd = quadrant & 1
        x = sine if odd else cosine
        y = cosine if odd else sine
        cos_part[k] = np.float32(number[k] * (-x if (quadrant + 1) & 2 else x))
        sin_part[k] = np.float32(number[k] * (-y if quadrant & 2 else y))


class NoiseScratch(NamedTuple):
    """Work memory of one thread for `noise_rows`; made by `noise_scratch`."""

    words: np.ndarray  # (4, blocks) uint32
    number: np.ndarray  # (blocks,) float64
    parts: np.ndarray  # (4, blocks) float32


def noise_scratch(size: int) -> NoiseScratch:
    """Work memory for rows of up to `size` values."""
    blocks = NOISE_ROWS * (size // 4 + 2)
    return NoiseScratch(
        words=np.empty((4, blocks), np.uint32),
        number=np.empty(blocks, np.float64),
        parts=np.empty((4, blocks), np.float32),
    )


@compiled
def noise_rows(seed, index, epoch, repeat, first, pitch, rows, count, out, scratch):
    """Values first + r * pitch + i of a sample's noise into out[r * count + i]: i below `count`, r below `rows`.

    out is float32, rows at most NOISE_ROWS.
    """
    words0, words1, words2, words3 = scratch.words[0], scratch.words[1], scratch.words[2], scratch.words[3]
    stream = NOISE | np.uint32(repeat)
    filled = 0
    for row in range(rows):
        block = (first + row * pitch) // 4
        blocks = (first + row * pitch + count - 1) // 4 - block + 1
        a, b = words0[filled : filled + blocks], words1[filled : filled + blocks]
        c, d = words2[filled : filled + blocks], words3[filled : filled + blocks]
        for k in range(blocks):
            a[k], b[k], c[k], d[k] = philox(seed, block + k, index, epoch, stream)
        filled += blocks
    _normals(words0, words1, scratch.number, filled, scratch.parts[0], scratch.parts[1])
    _normals(words2, words3, scratch.number, filled, scratch.parts[2], scratch.parts[3])
    filled = 0
    for row in range(rows):
        skip = (first + row * pitch) % 4
        line = out[row * count : (row + 1) * count]
        for i in range(count):
            line[i] = scratch.parts[(skip + i) & 3, filled + ((skip + i) >> 2)]
        filled += (skip + count - 1) // 4 + 1

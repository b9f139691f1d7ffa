"""Philox4x32-10, the counter-based generator behind every random number of a run.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). A draw is a pure function of a 64-bit
key (the run's seed) and four 32-bit counter words. Any stage, on any device, computes the same number without state.

Counter words, by stream (the top 4 bits of the fourth word):

    SAMPLE  (block, image index, epoch, stream | repeat)    crop, flip, operations, erased box
    NOISE   (block, image index, epoch, stream | repeat)    erasing noise: block k holds values 4k to 4k + 3
                                                            of the (3, height, width) output, C order
    MIX     (block | group << 8, step, epoch, stream)       Mixup and CutMix of a mixing group
    ORDER   (image index, 0, epoch, stream)                 the permutation of an epoch
    DROP    (block, position in the global batch, global step, stream)   stochastic depth, each sample on its own
    DROP_GROUP  (block | branch << 20, mixing group, global step, stream)    stochastic depth, a fixed number per group
    DROPOUT (0, position in the global batch, global step, stream)       a sample's key of dropout
"""

import math

import numpy as np

from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.jit import cached

Word = int | np.unsignedinteger  # a counter, a key or a drawn word in compiled code

SAMPLE, NOISE, MIX, ORDER, DROP, DROP_GROUP, DROPOUT = (np.uint32(stream << 28) for stream in range(7))

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint32(0x9E3779B9), np.uint32(0xBB67AE85)
_LOW, _32 = np.uint64(0xFFFFFFFF), np.uint64(32)
_TO_UNIT = 1.0 / 4294967296.0


@cached(nogil=True, inline="always")
def philox(seed: Word, c0: Word, c1: Word, c2: Word, c3: Word) -> tuple[Word, Word, Word, Word]:
    """Four uint32 words for a key (uint64) and a counter of four uint32."""
    key = np.uint64(seed)
    k0, k1 = np.uint32(key & _LOW), np.uint32(key >> _32)
    x0, x1, x2, x3 = np.uint32(c0), np.uint32(c1), np.uint32(c2), np.uint32(c3)
    for _ in range(10):
        p0, p1 = _M0 * np.uint64(x0), _M1 * np.uint64(x2)
        x0, x1, x2, x3 = (
            np.uint32(np.uint32(p1 >> _32) ^ x1 ^ k0),
            np.uint32(p1 & _LOW),
            np.uint32(np.uint32(p0 >> _32) ^ x3 ^ k1),
            np.uint32(p0 & _LOW),
        )
        k0, k1 = np.uint32(k0 + _W0), np.uint32(k1 + _W1)
    return x0, x1, x2, x3


@cached(nogil=True, inline="always")
def unit(word: Word) -> float:
    """Uniform float64 in (0, 1) from a uint32 word: never 0, never 1."""
    return (np.float64(word) + 0.5) * _TO_UNIT


@cached(nogil=True, inline="always")
def normal_pair(a: Word, b: Word) -> tuple[float, float]:
    """Two standard normal float64 from two uint32 words (Box-Muller)."""
    radius = math.sqrt(-2.0 * math.log(unit(a)))
    angle = 2.0 * math.pi * unit(b)
    return radius * math.cos(angle), radius * math.sin(angle)


def check_seed(seed: int) -> int:
    """`seed` itself; raises UserError unless it is an unsigned 64-bit number."""
    if not 0 <= seed < 2**64:
        raise UserError(f"seed {seed} is not an unsigned 64-bit number: choose one from 0 to 2**64 - 1")
    return seed

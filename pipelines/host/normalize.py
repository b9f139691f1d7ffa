"""From levels to the network's input: normalise, erase, mix.

A level becomes (level / 255 - mean) / std in float32, as torchvision's ToTensor and Normalize compute it. A table does
this, combined with the sample's own table of levels (see `photometric.py`). Erasing comes after normalisation and
before mixing, as in timm with a loader that does not prefetch to a GPU. Two samples that mix are finished together, row
by row.
"""

from typing import NamedTuple

import numpy as np

from fastdeit.pipelines.host.noise import NOISE_ROWS, NoiseScratch, noise_rows, noise_scratch
from fastdeit.pipelines.host.vector import copy_run
from fastdeit.pipelines.jit import compiled
from fastdeit.pipelines.plan.plan import CUTMIX, MIXUP


class NormalizeScratch(NamedTuple):
    """Work memory of one thread for `normalize_erase_mix`; made by `normalize_scratch`.

    First axis: the two samples of a pair.
    """

    value: np.ndarray  # (2, 3, 256) float32 by level
    line: np.ndarray  # (2, size) float32
    noise: np.ndarray  # (2, NOISE_ROWS * size) float32
    mixed: np.ndarray  # (size,) float32
    draw: NoiseScratch


def normalize_scratch(size: int) -> NormalizeScratch:
    """Work memory for images of `size` x `size`."""
    return NormalizeScratch(
        value=np.empty((2, 3, 256), np.float32),
        line=np.empty((2, size), np.float32),
        noise=np.empty((2, NOISE_ROWS * size), np.float32),
        mixed=np.empty(size, np.float32),
        draw=noise_scratch(size),
    )


class Output(NamedTuple):
    """Where `normalize_erase_mix` writes: one of the two arrays; the other is empty.

    With one type for both, the code is compiled only once.
    """

    float32: np.ndarray  # (samples, 3 * size * size) float32
    bfloat16: np.ndarray  # (samples, 3 * size * size) uint16, the bits of bfloat16


def output(rows: np.ndarray) -> Output:
    """An `Output` that writes to `rows`, (samples, 3 * size * size) float32, or uint16 for the bits of bfloat16."""
    none = np.empty((0, 0), np.float32), np.empty((0, 0), np.uint16)
    return Output(rows, none[1]) if rows.dtype == np.float32 else Output(none[0], rows)


@compiled
def _write(out, sample, at, line):
    """Write a float32 line to a row of the output, unchanged or as bfloat16 bits rounded to nearest even."""
    if len(out.float32):
        copy_run(out.float32[sample], at, line, 0, len(line))
        return
    to, bits = out.bfloat16[sample, at : at + len(line)], line.view(np.uint32)
    for x in range(len(to)):
        odd = (bits[x] >> np.uint32(16)) & np.uint32(1)
        to[x] = np.uint16((bits[x] + np.uint32(0x7FFF) + odd) >> np.uint32(16))


@compiled
def _normalise_row(planes, at, value, line):
    levels = planes[at : at + len(line)]
    for x in range(len(line)):
        line[x] = value[levels[x]]


@compiled
def _erase_row(seed, epoch, index, repeat, box, row, at, line, noise, draw):
    """Put noise where the erased box crosses a row whose first value is number `at` of the sample."""
    top, left, height, width = box[0], box[1], box[2], box[3]
    into = row - top
    if into % NOISE_ROWS == 0:
        rows = min(NOISE_ROWS, height - into)
        noise_rows(seed, index, epoch, repeat, at + left, len(line), rows, width, noise, draw)
    copy_run(line, left, noise, into % NOISE_ROWS * width, width)


@compiled
def normalize_erase_mix(first, second, seed, epoch, plan, planes, tables, levels, size, out, scratch):
    """Finish one sample (`second` -1), or two that mix, into rows `first` and `second` of `out`.

    plan    arrays of the plan, see `_Work` in `stage.py`
    planes  (2, 3 * size * size) uint8 images; tables (2, 768) uint8 the mapping still to be applied to their levels
    levels  (3, 256) float32 of `normalized_levels`
    out     an `Output`
    """
    group = plan.group[first]
    mix, box = plan.mix[group], plan.box[group]
    top, left, bottom, right = (box[0], box[1], box[2], box[3]) if mix == CUTMIX else (0, 0, 0, 0)
    own, other = np.float32(plan.lam[group]), np.float32(1.0 - plan.lam[group])
    value, noise = scratch.value, scratch.noise
    members = 1 if second < 0 else 2
    for member in range(members):
        for channel in range(3):
            for level in range(256):
                value[member, channel, level] = levels[channel, tables[member, channel * 256 + level]]
    a, b, mixed = scratch.line[0], scratch.line[1], scratch.mixed
    for channel in range(3):
        for row in range(size):
            at = (channel * size + row) * size
            for member in range(members):
                line = scratch.line[member]
                _normalise_row(planes[member], at, value[member, channel], line)
                sample = second if member else first
                erase = plan.erase[sample]
                if erase[3] and erase[0] <= row < erase[0] + erase[2]:
                    index, repeat = plan.index[sample], plan.repeat[sample]
                    _erase_row(seed, epoch, index, repeat, erase, row, at, line, noise[member], scratch.draw)
            if mix == MIXUP and members == 2:
                for x in range(size):
                    mixed[x] = a[x] * own + b[x] * other
                _write(out, first, at, mixed)
                for x in range(size):
                    mixed[x] = b[x] * own + a[x] * other
                _write(out, second, at, mixed)
                continue
            if top <= row < bottom:
                copy_run(mixed, 0, a, left, right - left)
                copy_run(a, left, b, left, right - left)
                copy_run(b, left, mixed, 0, right - left)
            _write(out, first, at, a)
            if members == 2:
                _write(out, second, at, b)

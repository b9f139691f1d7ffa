"""Crop, PIL's antialiased resize and the horizontal flip, from interleaved RGB to three planes.

The arithmetic is PIL's (Pillow, Resample.c): weights in 22-bit fixed point, a horizontal pass rounded to bytes, then
a vertical pass (or the other way round, see `vertical_first`). A pass that does not change the size is left out. The
result is bit-identical to Pillow 13.

Both passes run over 48 neighboring bytes that share one weight. For the horizontal pass these are a column of 16 rows
and 3 channels; a block transpose puts them side by side.
"""

import math
from typing import NamedTuple

import numpy as np

from fastdeit.pipelines.host.vector import LANES, copy_run, transpose, weighted_sum
from fastdeit.pipelines.jit import compiled
from fastdeit.pipelines.plan.plan import BICUBIC

_ROWS = 16  # of a tile of the horizontal pass
_ONE = float(1 << 22)


class ResizeScratch(NamedTuple):
    """Work memory of one thread for `resize`; made by `resize_scratch`."""

    tile: np.ndarray  # (columns, channels, 16 rows) of the crop
    narrow: np.ndarray  # (output columns, channels, 16 rows)
    short: np.ndarray  # (output rows, crop columns, channels)
    rows: np.ndarray  # (crop rows, channels, output columns), each row padded to a multiple of 48
    line: np.ndarray  # one such row
    taps: np.ndarray  # (2 axes, output side x taps) int32
    start: np.ndarray  # (2, output side) first crop row or column of an output row or column
    count: np.ndarray  # (2, output side) how many
    weight: np.ndarray  # (taps,) float64


def resize_scratch(size: int, side: int) -> ResizeScratch:
    """Work memory for crops of up to `side` x `side` pixels and outputs of at least `size` x `size`."""
    most_taps = math.ceil(2.0 * (max(side / size, 1.0) + 1.0)) * 2 + 1
    stride = _padded(3 * size)
    return ResizeScratch(
        tile=np.empty(3 * side * _ROWS, np.uint8),
        narrow=np.empty(size * LANES, np.uint8),
        short=np.empty(size * 3 * side, np.uint8),
        rows=np.empty(side * stride, np.uint8),
        line=np.empty(stride, np.uint8),
        taps=np.empty((2, size * most_taps), np.int32),
        start=np.empty((2, size), np.int32),
        count=np.empty((2, size), np.int32),
        weight=np.empty(most_taps, np.float64),
    )


@compiled
def _padded(length: int) -> int:
    return (length + LANES - 1) // LANES * LANES


@compiled
def _weight(x: float, cubic: bool) -> float:
    x = abs(x)
    if not cubic:
        return 1.0 - x if x < 1.0 else 0.0
    if x < 1.0:
        return (1.5 * x - 2.5) * x * x + 1.0
    if x < 2.0:
        return (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    return 0.0


@compiled
def _reflected(place: int, size: int) -> int:
    """Where a place of an axis lies, if what is beyond the axis is a reflection of it."""
    place = abs(place)
    return 2 * (size - 1) - place if place >= size else place


@compiled
def _find_taps(taps, start, count, weight, size_in, size_out, first, wanted, cubic):
    """Weights of outputs first .. first + wanted - 1 of an axis; returns the number of taps stored per output."""
    scale = size_in / size_out
    stretch = max(scale, 1.0)
    support = (2.0 if cubic else 1.0) * stretch
    room = math.ceil(support) * 2 + 1
    inverse = 1.0 / stretch
    for out in range(wanted):
        center = (_reflected(first + out, size_out) + 0.5) * scale
        low = max(0, int(center - support + 0.5))
        length = min(size_in, int(center + support + 0.5)) - low
        total = 0.0
        for i in range(length):
            weight[i] = _weight((i + low - center + 0.5) * inverse, cubic)
            total += weight[i]
        for i in range(length):
            value = weight[i] / total if total != 0.0 else weight[i]
            taps[out * room + i] = int(value * _ONE + (-0.5 if value < 0.0 else 0.5))
        start[out], count[out] = low, length
    return room


@compiled
def resize(
    pixels, offset, pitch, height, width, out_height, out_width, top, left, size, flip, interpolation, planes, scratch
):
    """Resize a crop as `PIL.Image.resize((out_width, out_height))` does; keep a window of it, mirrored with `flip`.

    pixels         (bytes,) uint8, the crop's first byte at `offset`, its rows `pitch` bytes apart, RGB
    height, width  of the crop
    top, left      of the (size, size) window in the (out_height, out_width) result, which is reflected beyond it
    interpolation  BICUBIC or BILINEAR
    planes         (3 * size * size,) uint8 output, C order of (3, size, size)
    """
    cubic = interpolation == BICUBIC
    stride = _padded(3 * size)
    taps, start, count = scratch.taps[1], scratch.start[1], scratch.count[1]
    room, first_row, row_count = 0, top, size
    # Weights that change nothing also copy an axis.
    done = height == out_height and top >= 0 and top + size <= height
    if not done:
        room = _find_taps(taps, start, count, scratch.weight, height, out_height, top, size, cubic)
        first_row, end = start[0], 0
        for out in range(size):
            first_row, end = min(first_row, start[out]), max(end, start[out] + count[out])
        row_count = end - first_row
    if width == out_width and left >= 0 and left + size <= width:
        from_row = offset + first_row * pitch + 3 * left
        _split_channels(pixels, from_row, pitch, row_count, size, flip, stride, scratch.rows)
    else:
        source, from_row, from_pitch = pixels, offset + first_row * pitch, pitch
        if vertical_first(height, width, out_height, out_width):
            _shorten(pixels, offset, pitch, height, width, size, room, scratch)
            source, from_row, from_pitch, row_count = scratch.short, 0, 3 * width, size
            done = True
        _narrow(source, from_row, from_pitch, row_count, width, out_width, left, size, flip, cubic, stride, scratch)
    if done:
        _write_planes(scratch.rows, stride, size, planes)
        return
    for out in range(size):
        from_row = (start[out] - first_row) * stride
        for part in range(0, stride, LANES):
            weighted_sum(scratch.line, part, scratch.rows, from_row + part, stride, taps, out * room, count[out])
        for channel in range(3):
            copy_run(planes, (channel * size + out) * size, scratch.line, channel * size, size)


@compiled
def vertical_first(height, width, out_height, out_width):
    """Whether PIL runs the vertical pass first: since version 13, if the height shrinks more than twice as much."""
    shrink = height - out_height
    return shrink > 0 and shrink > 2 * (width - out_width)


@compiled
def _shorten(pixels, offset, pitch, height, width, size, room, scratch):
    """The vertical pass over interleaved rows: the crop into `scratch.short`, rows 3 * width bytes apart."""
    taps, start, count = scratch.taps[1], scratch.start[1], scratch.count[1]
    length = 3 * width
    if length < LANES:
        for row in range(height):
            copy_run(scratch.rows, row * LANES, pixels, offset + row * pitch, length)
        for out in range(size):
            weighted_sum(scratch.line, 0, scratch.rows, start[out] * LANES, LANES, taps, out * room, count[out])
            copy_run(scratch.short, out * length, scratch.line, 0, length)
        return
    for out in range(size):
        from_row = offset + start[out] * pitch
        for run in range(0, length, LANES):
            part = min(run, length - LANES)  # the last run overlaps the previous one
            weighted_sum(
                scratch.short, out * length + part, pixels, from_row + part, pitch, taps, out * room, count[out]
            )


@compiled
def _narrow(pixels, offset, pitch, row_count, width, out_width, left, size, flip, cubic, stride, scratch):
    """The horizontal pass: `row_count` interleaved rows into `scratch.rows`."""
    tile, narrow = scratch.tile, scratch.narrow
    taps, start, count = scratch.taps[0], scratch.start[0], scratch.count[0]
    room = _find_taps(taps, start, count, scratch.weight, width, out_width, left, size, cubic)
    height = min(_ROWS, row_count)
    for block in range((row_count + _ROWS - 1) // _ROWS):
        row = max(0, min(block * _ROWS, row_count - _ROWS))  # the last block overlaps the previous one
        transpose(tile, 0, _ROWS, pixels, offset + row * pitch, pitch, height, 3 * width)
        for out in range(size):
            to = size - 1 - out if flip else out
            weighted_sum(narrow, to * LANES, tile, start[out] * LANES, LANES, taps, out * room, count[out])
        for channel in range(3):
            to = row * stride + channel * size
            transpose(scratch.rows, to, stride, narrow, channel * _ROWS, LANES, size, height)


@compiled
def _split_channels(pixels, offset, pitch, row_count, size, flip, stride, rows):
    """Copy `row_count` interleaved rows without resizing, channel after channel."""
    for row in range(row_count):
        source = pixels[offset + row * pitch : offset + row * pitch + 3 * size]
        for channel in range(3):
            to = rows[row * stride + channel * size : row * stride + (channel + 1) * size]
            for out in range(size):
                to[size - 1 - out if flip else out] = source[3 * out + channel]


@compiled
def _write_planes(rows, stride, size, planes):
    for channel in range(3):
        for row in range(size):
            copy_run(planes, (channel * size + row) * size, rows, row * stride + channel * size, size)

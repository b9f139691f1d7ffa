"""Crop, antialiased bicubic resize and horizontal flip for a batch of images of any sizes, bit-identical to Pillow 13.

The arithmetic is that of `Image.resize` (Pillow, Resample.c): weights computed in float64 and stored as 22-bit fixed
point; a pass along one axis rounded to bytes, then a pass along the other.

A batch takes three launches: the weights of every output row and column, the first pass, the second pass. The first
pass leaves as many rows (or columns) as the crop has, so each sample has its own amount of memory in between. Each
sample has a fixed number of programs that share its tiles, so the grid does not depend on the images.
"""

# Pyright checks kernels as Python; Triton's values have other types at run time.
# pyright: reportArgumentType=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastdeit.kernels.launch import Launch, cdiv, check_device
from fastdeit.kernels.variants import Variant

# Columns of `place`, and their number.
HEIGHT, WIDTH, OUT_HEIGHT, OUT_WIDTH, TOP, LEFT, FIRST, COUNT, VERTICAL_FIRST, FLIP, PITCH = range(11)
PLACE = 12
# Columns of `start`, and their number.
PIXELS, BETWEEN, COLUMN_TAPS, ROW_TAPS = range(4)
START = 4

_PLACE, _START = tl.constexpr(PLACE), tl.constexpr(START)
_HEIGHT, _WIDTH, _OUT_HEIGHT, _OUT_WIDTH = (tl.constexpr(i) for i in (HEIGHT, WIDTH, OUT_HEIGHT, OUT_WIDTH))
_TOP, _LEFT, _FIRST, _COUNT = (tl.constexpr(i) for i in (TOP, LEFT, FIRST, COUNT))
_VERTICAL_FIRST, _FLIP, _PITCH = (tl.constexpr(i) for i in (VERTICAL_FIRST, FLIP, PITCH))
_PIXELS, _BETWEEN, _COLUMN_TAPS = (tl.constexpr(i) for i in (PIXELS, BETWEEN, COLUMN_TAPS))
_FRACTION, _HALF = tl.constexpr(22), tl.constexpr(1 << 21)


@triton.jit
def _cubic(x):
    """Keys' kernel with a = -1/2, in Pillow's order of operations."""
    x = tl.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    return tl.where(x < 1.0, near, tl.where(x < 2.0, far, 0.0))


@triton.jit
def _taps(place, start, taps, reach, S: tl.constexpr, BLOCK: tl.constexpr):
    """Weights of one axis, tap by tap, and the range that every output reads: first and count."""
    out = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    axis = tl.program_id(1)  # 0: along the columns, 1: along the rows
    sample = tl.program_id(2).to(tl.int64)
    inside = out < S
    row = place + sample * _PLACE - axis
    size_in, size_out = tl.load(row + _WIDTH), tl.load(row + _OUT_WIDTH)
    first = tl.load(row + _LEFT)
    scale = size_in.to(tl.float64) / size_out.to(tl.float64)
    stretch = tl.maximum(scale, 1.0)
    support = 2.0 * stretch
    inverse = 1.0 / stretch
    # Beyond its border the resized crop is reflected.
    shown = tl.abs(first + out)
    shown = tl.where(shown >= size_out, 2 * (size_out - 1) - shown, shown)
    center = (shown.to(tl.float64) + 0.5) * scale
    low = tl.maximum(0, (center - support + 0.5).to(tl.int32))
    length = tl.minimum(size_in, (center + support + 0.5).to(tl.int32)) - low
    length = tl.where(inside, length, 0)
    most = tl.max(length, axis=0)
    total = tl.zeros((BLOCK,), tl.float64)
    for k in range(0, most):
        total += tl.where(k < length, _cubic(((k + low).to(tl.float64) - center + 0.5) * inverse), 0.0)
    divisor = tl.where(total != 0.0, total, 1.0)
    to = taps + tl.load(start + sample * _START + _COLUMN_TAPS + axis)
    for k in range(0, most):
        value = _cubic(((k + low).to(tl.float64) - center + 0.5) * inverse) / divisor
        fixed = (value * 4194304.0 + tl.where(value < 0.0, -0.5, 0.5)).to(tl.int32)
        tl.store(to + k * S + out, fixed, mask=k < length)
    at = reach + (sample * 2 + axis) * 2 * S + out
    tl.store(at, low, mask=inside)
    tl.store(at + S, length, mask=inside)


@triton.jit
def _to_level(total):
    return tl.minimum(tl.maximum(total >> _FRACTION, 0), 255).to(tl.uint8)


@triton.jit
def _horizontal(
    source,
    pitch,
    rows,
    taps,
    reach,
    shift,
    flip,
    out,
    row_stride,
    channel_stride,
    S: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Resize interleaved rows, whose first column is number `shift`, into rows of three planes."""
    ACROSS: tl.constexpr = (S + COLUMNS - 1) // COLUMNS
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS) * ACROSS, tl.num_programs(0)):
        row = (tile // ACROSS) * ROWS + tl.arange(0, ROWS)
        x = (tile % ACROSS) * COLUMNS + tl.arange(0, COLUMNS)
        first = tl.load(reach + x, mask=x < S, other=0)
        count = tl.load(reach + S + x, mask=x < S, other=0)
        from_pixel = source + row[:, None] * pitch + (3 * (first - shift))[None, :]
        red = tl.full((ROWS, COLUMNS), _HALF, tl.int32)
        green, blue = red, red
        for k in range(0, tl.max(count, axis=0)):
            weight = tl.load(taps + k * S + x, mask=k < count, other=0)[None, :]
            inside = (row < rows)[:, None] & (k < count)[None, :]
            red += weight * tl.load(from_pixel + 3 * k, mask=inside, other=0).to(tl.int32)
            green += weight * tl.load(from_pixel + 3 * k + 1, mask=inside, other=0).to(tl.int32)
            blue += weight * tl.load(from_pixel + 3 * k + 2, mask=inside, other=0).to(tl.int32)
        to = out + row[:, None] * row_stride + tl.where(flip != 0, S - 1 - x, x)[None, :]
        inside = (row < rows)[:, None] & (x < S)[None, :]
        tl.store(to, _to_level(red), mask=inside)
        tl.store(to + channel_stride, _to_level(green), mask=inside)
        tl.store(to + 2 * channel_stride, _to_level(blue), mask=inside)


@triton.jit
def _vertical(
    source,
    pitch,
    length,
    taps,
    reach,
    shift,
    out,
    PLANES: tl.constexpr,
    S: tl.constexpr,
    ROWS: tl.constexpr,
    BYTES: tl.constexpr,
):
    """Resize rows of `length` bytes, the first of them number `shift`, into S rows, interleaved or in three planes."""
    across = tl.cdiv(length, BYTES)
    for tile in range(tl.program_id(0), ((S + ROWS - 1) // ROWS) * across, tl.num_programs(0)):
        y = (tile // across) * ROWS + tl.arange(0, ROWS)
        byte = (tile % across) * BYTES + tl.arange(0, BYTES)
        first = tl.load(reach + y, mask=y < S, other=0)
        count = tl.load(reach + S + y, mask=y < S, other=0)
        from_row = source + ((first - shift) * pitch)[:, None] + byte[None, :]
        total = tl.full((ROWS, BYTES), _HALF, tl.int32)
        for k in range(0, tl.max(count, axis=0)):
            weight = tl.load(taps + k * S + y, mask=k < count, other=0)[:, None]
            inside = (k < count)[:, None] & (byte < length)[None, :]
            total += weight * tl.load(from_row + k * pitch, mask=inside, other=0).to(tl.int32)
        if PLANES:
            to = y[:, None] * S + ((byte // S) * (S * S) + byte % S)[None, :]
        else:
            to = y[:, None] * length + byte[None, :]
        tl.store(out + to, _to_level(total), mask=(y < S)[:, None] & (byte < length)[None, :])


@triton.jit
def _pass(
    pixels,
    place,
    start,
    taps,
    reach,
    between,
    planes,
    planes_stride,
    SECOND: tl.constexpr,
    S: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE_ROWS: tl.constexpr,
    BYTES: tl.constexpr,
):
    sample = tl.program_id(1).to(tl.int64)
    row = place + sample * _PLACE
    first, count = tl.load(row + _FIRST), tl.load(row + _COUNT)
    flip, pitch = tl.load(row + _FLIP), tl.load(row + _PITCH)
    here = start + sample * _START
    column_taps, row_taps = taps + tl.load(here + _COLUMN_TAPS), taps + tl.load(here + _COLUMN_TAPS + 1)
    column_reach = reach + sample * 4 * S
    row_reach = column_reach + 2 * S
    middle = between + tl.multiple_of(tl.load(here + _BETWEEN), 16)
    vertical_first = tl.load(row + _VERTICAL_FIRST) != 0
    if SECOND:
        out = planes + sample * planes_stride
        if vertical_first:
            _horizontal(middle, 3 * count, S, column_taps, column_reach, first, flip, out, S, S * S, S, ROWS, COLUMNS)
        else:
            _vertical(middle, 3 * S, 3 * S, row_taps, row_reach, first, out, True, S, WIDE_ROWS, BYTES)
    else:
        source = pixels + tl.load(here + _PIXELS)
        if vertical_first:
            _vertical(source + 3 * first, pitch, 3 * count, row_taps, row_reach, 0, middle, False, S, WIDE_ROWS, BYTES)
        else:
            source += first.to(tl.int64) * pitch
            _horizontal(source, pitch, count, column_taps, column_reach, 0, flip, middle, 3 * S, S, S, ROWS, COLUMNS)


_ROWS, _COLUMNS = 32, 32  # tile of the horizontal pass
_WIDE_ROWS, _BYTES = 8, 128  # tile of the vertical pass, which reads adjacent bytes


def _taps_launch(size: int) -> Launch:
    return Launch(constants=(("S", size), ("BLOCK", 32)), num_warps=1, num_stages=1, fp_fusion=False)


def _pass_launch(size: int, second: bool) -> Launch:
    constants = (("SECOND", second), ("S", size), ("ROWS", _ROWS), ("COLUMNS", _COLUMNS))
    constants += (("WIDE_ROWS", _WIDE_ROWS), ("BYTES", _BYTES))
    return Launch(constants=constants, num_warps=4, num_stages=1, fp_fusion=False)


def _programs(size: int) -> int:
    """Programs per sample: as many as a photo of ordinary size has tiles."""
    return cdiv(3 * size, _BYTES) * cdiv(size, 2 * _WIDE_ROWS)


def crop_resize(
    pixels: Tensor, place: Tensor, start: Tensor, taps: Tensor, reach: Tensor, between: Tensor, planes: Tensor
) -> None:
    """Crop, resize and flip a batch into `planes`.

    pixels   (bytes,) uint8: images, rows of interleaved RGB
    place    (B, PLACE) int32: height and width of the crop; height and width after resizing; top and left of the
             (S, S) window kept of that, which is reflected where the window reaches beyond it; first and count of the
             crop's rows (columns, if the vertical pass comes first) that the window needs; whether the vertical pass
             comes first; whether to mirror; bytes from one row of the image to the next
    start    (B, START) int64: the crop's first byte in `pixels`; the sample's first byte in `between`, a multiple of
             16; the first weight of its columns and of its rows in `taps`
    taps     int32 work memory: S weights for every tap of an axis; an axis needs at most
             2 * ceil(2 * max(1, size in / size out)) + 1 taps
    reach    (B, 2, 2, S) int32 work memory
    between  uint8 work memory for the first pass: 3 * S * count bytes a sample
    planes   (B, 3, S, S) uint8 output, every sample contiguous

    The caller decides which pass comes first: Pillow 13 starts with the vertical pass if the height shrinks, and by
    more than twice as much as the width. Only the device is checked. The call allocates no memory and does not
    synchronise.
    """
    check_device("crop_resize", planes.device)
    count, _, size, _ = planes.shape
    if not count:
        return
    launch = _taps_launch(size)
    _taps[(cdiv(size, 32), 2, count)](place, start, taps, reach, **launch.options())
    for second in (False, True):
        _pass[(_programs(size), count)](
            pixels, place, start, taps, reach, between, planes, planes.stride(0), **_pass_launch(size, second).options()
        )


def variants() -> list[Variant]:
    """The launches for 224 and 384 pixels."""
    table = {"place": "*i32", "start": "*i64", "taps": "*i32", "reach": "*i32"}
    images = {"pixels": "*u8", "between": "*u8", "planes": "*u8"}
    variants = []
    for size in (224, 384):
        variants.append(_taps_launch(size).variant(f"augment_resize_taps S{size}", _taps, table))
        variants += [
            _pass_launch(size, second).variant(
                f"augment_resize_pass{1 + second} S{size}",
                _pass,
                images | table | {"planes_stride": "i32"},
                ["planes_stride"],
            )
            for second in (False, True)
        ]
    return variants

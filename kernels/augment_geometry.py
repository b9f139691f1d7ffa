"""Device functions to rotate, shear and translate: PIL's affine transform, bilinear or bicubic.

PIL (Pillow, Geometry.c) maps the centre of each output pixel into the image, fills pixels from outside, interpolates
in float64 and truncates. Pixels beyond the edge repeat the edge. A shear or translation moves along one axis, so it
needs a filter along that axis only. Bit-identical to Pillow, with one exception: for a shift within rounding (1e-12)
of a whole number of pixels, a level may differ by one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastdeit.kernels.augment_levels import mapped


@triton.jit
def _linear(a, b, d):
    return a + (b - a) * d


@triton.jit
def _cubic(a, b, c, e, d):
    return b + d * ((-a + c) + d * ((2.0 * (a - b) + c - e) + d * (-a + b - c + e)))


@triton.jit
def _tap(plane, table, pending, y, x, mask, S: tl.constexpr):
    """Level at (y, x), clamped to the image, in float64."""
    y, x = tl.minimum(tl.maximum(y, 0), S - 1), tl.minimum(tl.maximum(x, 0), S - 1)
    return mapped(plane, y * S + x, mask, table, pending).to(tl.float64)


@triton.jit
def _line(plane, table, pending, y, x, step_y, step_x, d, cubic, mask, S: tl.constexpr):
    """Interpolate between (y, x) and (y + step_y, x + step_x) at the fraction d."""
    b = _tap(plane, table, pending, y, x, mask, S)
    c = _tap(plane, table, pending, y + step_y, x + step_x, mask, S)
    if cubic != 0:
        a = _tap(plane, table, pending, y - step_y, x - step_x, mask, S)
        e = _tap(plane, table, pending, y + 2 * step_y, x + 2 * step_x, mask, S)
        value = _cubic(a, b, c, e, d)
    else:
        value = _linear(b, c, d)
    return value


@triton.jit
def _store(out, value, inside, fill, mask):
    level = tl.minimum(tl.maximum(value, 0.0), 255.0).to(tl.int32).to(tl.uint8)
    tl.store(out, tl.where(inside, level, fill), mask=mask)


@triton.jit
def _moved(at, lean, shift):
    """Source coordinate of the centre of pixel `at`."""
    return ((at.to(tl.float64) + 0.5) + lean) + shift


@triton.jit
def shift(image, tables, pending, out, along_x, slope, offset, cubic, fill, pixel, S: tl.constexpr):
    """Shift line i by -(slope * (i + 1/2) + offset) pixels: rows along x, columns along y."""
    mask = pixel < S * S
    y, x = pixel // S, pixel % S
    at, line = tl.where(along_x, x, y), tl.where(along_x, y, x)
    lean = slope * (line.to(tl.float64) + 0.5)
    # Take the whole part of the shift from the line's first pixel inside the image. If the shift is almost a whole
    # number, rounding decides which of three pixels that is.
    first = tl.minimum(tl.maximum(tl.floor(-(lean + offset) - 0.5), -2.0), 1.0 * S).to(tl.int32)
    behind = (_moved(first, lean, offset) < 0.0).to(tl.int32) + (_moved(first + 1, lean, offset) < 0.0).to(tl.int32)
    first = tl.maximum(first + behind, 0)
    whole = at + (tl.floor(_moved(first, lean, offset) - 0.5).to(tl.int32) - first)
    source = _moved(at, lean, offset)
    inside = mask & (source >= 0.0) & (source < 1.0 * S)
    d = (source - 0.5) - whole.to(tl.float64)
    from_y, from_x = tl.where(along_x, y, whole), tl.where(along_x, whole, x)
    step_x = along_x.to(tl.int32)
    for channel in range(3):
        value = _line(
            image + channel * S * S, tables + channel * 256, pending, from_y, from_x, 1 - step_x, step_x, d, cubic,
            inside, S,
        )  # fmt: skip
        _store(out + channel * S * S + pixel, value, inside, tl.load(fill + channel), mask)


@triton.jit
def affine(image, tables, pending, out, matrix, cubic, fill, pixel, S: tl.constexpr):
    """Apply any affine map. matrix: 6 float64, output to input coordinates."""
    mask = pixel < S * S
    y, x = (pixel // S).to(tl.float64) + 0.5, (pixel % S).to(tl.float64) + 0.5
    from_x = tl.load(matrix) * x + tl.load(matrix + 1) * y + tl.load(matrix + 2)
    from_y = tl.load(matrix + 3) * x + tl.load(matrix + 4) * y + tl.load(matrix + 5)
    inside = mask & (from_x >= 0.0) & (from_x < 1.0 * S) & (from_y >= 0.0) & (from_y < 1.0 * S)
    from_x, from_y = from_x - 0.5, from_y - 0.5
    dx, dy = from_x - tl.floor(from_x), from_y - tl.floor(from_y)
    x, y = tl.floor(from_x).to(tl.int32), tl.floor(from_y).to(tl.int32)
    for channel in range(3):
        plane, table = image + channel * S * S, tables + channel * 256
        b = _line(plane, table, pending, y, x, 0, 1, dx, cubic, inside, S)
        c = _line(plane, table, pending, y + 1, x, 0, 1, dx, cubic, inside, S)
        if cubic != 0:
            a = _line(plane, table, pending, y - 1, x, 0, 1, dx, cubic, inside, S)
            e = _line(plane, table, pending, y + 2, x, 0, 1, dx, cubic, inside, S)
            value = _cubic(a, b, c, e, dy)
        else:
            value = _linear(b, c, dy)
        _store(out + channel * S * S + pixel, value, inside, tl.load(fill + channel), mask)

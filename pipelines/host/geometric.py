"""Rotate, shear and translate: PIL's affine transform with bilinear or bicubic interpolation.

PIL (Pillow, Geometry.c) maps the center of an output pixel into the image, fills pixels outside, interpolates in
float64 and truncates. This file does the same operations in the same order. A shear or a translation moves along one
axis only. It needs a 1-D filter, whose fraction is constant along a row (or column).

Every level equals Pillow's, with one exception: if a shift is within rounding (1e-12) of a whole number of pixels but
not equal to it, a level may differ by one.
"""

import math

import numpy as np

from fastdeit.pipelines.host.vector import copy_run, fill_run, load_four, transpose
from fastdeit.pipelines.jit import compiled, inlined

MARGIN = 2  # pixels that a bicubic filter reaches beyond the edge


@inlined
def _linear(a, b, d):
    return a + (b - a) * d


@inlined
def _cubic(a, b, c, e, d):
    return b + d * ((-a + c) + d * ((2 * (a - b) + c - e) + d * (-a + b - c + e)))


@inlined
def _to_level(value):
    return np.uint8(np.int32(min(max(value, 0.0), 255.0)))


@compiled
def shift_rows(planes, size, slope, shift, cubic, fill, line):
    """Move row y left by slope * (y + 1/2) + shift pixels, in place: ShearX and TranslateX.

    fill  (3,) uint8, the color for pixels outside the image
    line  (size + 4,) uint8 work memory
    """
    for y in range(size):
        lean = slope * (y + 0.5)
        first, end = 0, size
        while first < size and (first + 0.5) + lean + shift < 0.0:
            first += 1
        while end > first and (end - 0.5) + lean + shift >= size:
            end -= 1
        inside = end - first
        # Coordinates of neighbors differ by 1, so all pixels of a row share the integer part of the shift.
        lag = math.floor((first + 0.5) + lean + shift - 0.5) - first
        for channel in range(3):
            at = (channel * size + y) * size
            fill_run(line, 0, planes[at], MARGIN)
            copy_run(line, MARGIN, planes, at, size)
            fill_run(line, MARGIN + size, planes[at + size - 1], MARGIN)
            fill_run(planes, at, fill[channel], first)
            fill_run(planes, at + end, fill[channel], size - end)
            if inside == 0:
                continue
            taps, out = line[first + lag + 1 :], planes[at + first : at + end]
            if cubic:
                for i in range(inside):
                    d = ((first + i + 0.5) + lean + shift - 0.5) - (first + i + lag)
                    a, b, c, e = np.int32(taps[i]), np.int32(taps[i + 1]), np.int32(taps[i + 2]), np.int32(taps[i + 3])
                    out[i] = _to_level(_cubic(a, b, c, e, d))
            else:
                for i in range(inside):
                    d = ((first + i + 0.5) + lean + shift - 0.5) - (first + i + lag)
                    out[i] = _to_level(_linear(np.int32(taps[i + 1]), np.int32(taps[i + 2]), d))


@compiled
def shift_columns(planes, size, slope, shift, cubic, fill, line, copy):
    """`shift_rows` along the other axis: ShearY and TranslateY. copy: uint8 work memory of the length of `planes`."""
    area = size * size
    for channel in range(3):
        transpose(copy, channel * area, size, planes, channel * area, size, size, size)
    shift_rows(copy, size, slope, shift, cubic, fill, line)
    for channel in range(3):
        transpose(planes, channel * area, size, copy, channel * area, size, size, size)


@inlined
def _cubic_four(four, d):
    a, b = np.int32(four & 255), np.int32((four >> 8) & 255)
    c, e = np.int32((four >> 16) & 255), np.int32(four >> 24)
    return _cubic(a, b, c, e, d)


@inlined
def _linear_four(four, d):
    return _linear(np.int32((four >> 8) & 255), np.int32((four >> 16) & 255), d)


@compiled
def affine(planes, size, matrix, cubic, fill, padded, fours, corner, dx, dy):
    """Any affine map, in place: Rotate.

    matrix  (6,) float64, output to input coordinates
    padded  (3 * (size + 4) ** 2 + 16,) uint8 work memory
    fours   (4, size) uint32, corner (size,) int64, dx, dy (size,) float64: work memory
    """
    pitch = size + 2 * MARGIN
    area, padded_area = size * size, pitch * pitch
    for channel in range(3):
        for y in range(pitch):
            at = (channel * size + min(max(y - MARGIN, 0), size - 1)) * size
            to = channel * padded_area + y * pitch
            fill_run(padded, to, planes[at], MARGIN)
            copy_run(padded, to + MARGIN, planes, at, size)
            fill_run(padded, to + MARGIN + size, planes[at + size - 1], MARGIN)
    a0, a1, a2, a3, a4, a5 = matrix[0], matrix[1], matrix[2], matrix[3], matrix[4], matrix[5]
    for y in range(size):
        yy = y + 0.5
        for x in range(size):
            from_x, from_y = a0 * (x + 0.5) + a1 * yy + a2, a3 * (x + 0.5) + a4 * yy + a5
            inside = (from_x >= 0.0) & (from_x < size) & (from_y >= 0.0) & (from_y < size)
            from_x, from_y = from_x - 0.5, from_y - 0.5
            whole_x, whole_y = np.floor(from_x), np.floor(from_y)
            dx[x], dy[x] = from_x - whole_x, from_y - whole_y
            at = (np.int64(whole_y) - 1 + MARGIN) * pitch + np.int64(whole_x) - 1 + MARGIN
            corner[x] = at if inside else -1
        for channel in range(3):
            base, outside = channel * padded_area, fill[channel]
            # A separate loop: LLVM does not vectorise a gather next to a store that may alias it.
            for x in range(size):
                at = base + max(corner[x], 0)
                for row in range(4):
                    fours[row, x] = load_four(padded, at + row * pitch)
            out = planes[channel * area + y * size : channel * area + (y + 1) * size]
            row1, row2, row3, row4 = fours[0], fours[1], fours[2], fours[3]
            if cubic:
                for x in range(size):
                    v1, v2 = _cubic_four(row1[x], dx[x]), _cubic_four(row2[x], dx[x])
                    v3, v4 = _cubic_four(row3[x], dx[x]), _cubic_four(row4[x], dx[x])
                    value = _to_level(_cubic(v1, v2, v3, v4, dy[x]))
                    out[x] = value if corner[x] >= 0 else outside
            else:
                for x in range(size):
                    v2, v3 = _linear_four(row2[x], dx[x]), _linear_four(row3[x], dx[x])
                    value = _to_level(_linear(v2, v3, dy[x]))
                    out[x] = value if corner[x] >= 0 else outside

"""Applies the operations of a plan to one sample after another."""

from typing import NamedTuple

import numpy as np

from fastdeit.pipelines.host import geometric, photometric
from fastdeit.pipelines.jit import compiled
from fastdeit.pipelines.plan.plan import BICUBIC, CODE, OPS

_IDENTITY, _AUTO_CONTRAST, _EQUALIZE, _INVERT, _ROTATE, _POSTERIZE = (CODE[name] for name in OPS[:6])
_SOLARIZE, _SOLARIZE_ADD, _COLOR, _CONTRAST, _BRIGHTNESS, _SHARPNESS = (CODE[name] for name in OPS[6:12])
_SHEAR_X, _SHEAR_Y, _TRANSLATE_X, _TRANSLATE_Y, _BLUR = (CODE[name] for name in OPS[12:17])


class OperationScratch(NamedTuple):
    """Work memory of one thread for `apply_operations`; made by `operation_scratch`."""

    copy: np.ndarray  # (3 * size * size,) uint8
    padded: np.ndarray  # three planes with a margin, uint8
    row: np.ndarray  # a row with a margin, uint8
    line: np.ndarray  # (size,) uint32
    fours: np.ndarray  # (4, size) uint32
    corner: np.ndarray  # (size,) int64
    dx: np.ndarray  # (size,) float64
    dy: np.ndarray  # (size,) float64
    histogram: np.ndarray  # (768,) int64


def operation_scratch(size: int) -> OperationScratch:
    """Work memory for images of `size` x `size`."""
    pitch = size + 2 * geometric.MARGIN
    return OperationScratch(
        copy=np.empty(3 * size * size, np.uint8),
        padded=np.zeros(3 * pitch * pitch, np.uint8),
        row=np.empty(pitch, np.uint8),
        line=np.empty(size, np.uint32),
        fours=np.empty((4, size), np.uint32),
        corner=np.empty(size, np.int64),
        dx=np.empty(size, np.float64),
        dy=np.empty(size, np.float64),
        histogram=np.empty(768, np.int64),
    )


@compiled
def _on_levels(code, arg, planes, table, histogram):
    """Do an operation that maps levels and needs pixels only for a histogram; False for any other operation."""
    if code == _AUTO_CONTRAST:
        photometric.auto_contrast(planes, table, histogram)
    elif code == _EQUALIZE:
        photometric.equalize(planes, table, histogram)
    elif code == _INVERT:
        photometric.invert(table)
    elif code == _POSTERIZE:
        photometric.posterize(table, int(arg))
    elif code == _SOLARIZE:
        photometric.solarize(table, arg)
    elif code == _SOLARIZE_ADD:
        photometric.solarize_add(table, int(arg))
    elif code == _BRIGHTNESS:
        photometric.brightness(table, arg)
    else:
        return False
    return True


@compiled
def apply_operations(planes, table, op, arg, matrix, interp, fill, size, scratch):
    """Apply a sample's operations in place.

    planes       (3 * size * size,) uint8
    table        (768,) uint8 output: the mapping still to be applied to the levels of `planes`, by channel
    op, arg, interp, matrix  a sample's row of the plan and of `rotation_matrices`
    fill         (3,) uint8, the color for pixels outside the image
    """
    photometric.reset_table(table)
    pending = False
    for layer in range(len(op)):
        code = op[layer]
        if code == _IDENTITY:
            continue
        if _on_levels(code, arg[layer], planes, table, scratch.histogram):
            pending = True
            continue
        if pending:
            photometric.apply_table(planes, table)
            photometric.reset_table(table)
            pending = False
        cubic = interp[layer] == BICUBIC
        if code == _CONTRAST:
            photometric.contrast(planes, table, arg[layer])
            pending = True
        elif code == _COLOR:
            photometric.color(planes, arg[layer])
        elif code == _SHARPNESS:
            photometric.sharpness(planes, size, arg[layer], scratch.copy)
        elif code == _BLUR:
            photometric.gaussian_blur(planes, size, arg[layer], scratch.copy[: size * size], scratch.line)
        elif code == _SHEAR_X:
            geometric.shift_rows(planes, size, arg[layer], 0.0, cubic, fill, scratch.row)
        elif code == _SHEAR_Y:
            geometric.shift_columns(planes, size, arg[layer], 0.0, cubic, fill, scratch.row, scratch.copy)
        elif code == _TRANSLATE_X:
            geometric.shift_rows(planes, size, 0.0, arg[layer] * size, cubic, fill, scratch.row)
        elif code == _TRANSLATE_Y:
            geometric.shift_columns(planes, size, 0.0, arg[layer] * size, cubic, fill, scratch.row, scratch.copy)
        elif code == _ROTATE:
            geometric.affine(
                planes, size, matrix[layer], cubic, fill,
                scratch.padded, scratch.fours, scratch.corner, scratch.dx, scratch.dy,
            )  # fmt: skip

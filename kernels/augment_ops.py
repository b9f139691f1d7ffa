"""RandAugment's operations on a batch of images, a different one per sample, bit-identical to Pillow.

Operations that map levels to levels do not touch the pixels: they are composed into the sample's tables (see
`augment_levels`). An operation that needs the pixels reads them through these tables and writes them to the other of
two slots. The host knows in advance which slot a sample is in, so no image is ever copied. A layer takes two launches,
one for the tables and one for the pixels, and six more if any sample is blurred.

Integer, float32 and float64 arithmetic is used exactly where Pillow uses it, in the same order.
"""

# Pyright checks kernels as Python; Triton's values have other types at run time.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastdeit.kernels.augment_blur import blur
from fastdeit.kernels.augment_geometry import affine, shift
from fastdeit.kernels.augment_levels import (
    AFFINE,
    ARGUMENT,
    CODE,
    COLOR,
    CUBIC,
    OPERATION,
    PENDING,
    SHARPNESS,
    SHIFT_X,
    SHIFT_Y,
    SIDE,
    blend,
    compose_tables,
    luma,
    mapped,
)
from fastdeit.kernels.launch import Launch, cdiv, check_device
from fastdeit.kernels.variants import Variant

_COLOR, _SHARPNESS, _AFFINE = tl.constexpr(COLOR), tl.constexpr(SHARPNESS), tl.constexpr(AFFINE)
_SHIFT_X, _SHIFT_Y = tl.constexpr(SHIFT_X), tl.constexpr(SHIFT_Y)
_CODE, _CUBIC, _SIDE, _PENDING = (tl.constexpr(i) for i in (CODE, CUBIC, SIDE, PENDING))
_OPERATION, _ARGUMENT = tl.constexpr(OPERATION), tl.constexpr(ARGUMENT)


@triton.jit
def _color(image, tables, pending, out, alpha, pixel, S: tl.constexpr):
    """`ImageEnhance.Color`."""
    mask = pixel < S * S
    red = mapped(image, pixel, mask, tables, pending)
    green = mapped(image + S * S, pixel, mask, tables + 256, pending)
    blue = mapped(image + 2 * S * S, pixel, mask, tables + 512, pending)
    gray = luma(red, green, blue)
    tl.store(out + pixel, blend(gray, red, alpha).to(tl.uint8), mask=mask)
    tl.store(out + S * S + pixel, blend(gray, green, alpha).to(tl.uint8), mask=mask)
    tl.store(out + 2 * S * S + pixel, blend(gray, blue, alpha).to(tl.uint8), mask=mask)


@triton.jit
def _sharpness(image, tables, pending, out, alpha, pixel, S: tl.constexpr):
    """`ImageEnhance.Sharpness`: blend with the smoothed image; PIL leaves edge pixels unsmoothed."""
    mask = pixel < S * S
    y, x = pixel // S, pixel % S
    inner = mask & (y > 0) & (y < S - 1) & (x > 0) & (x < S - 1)
    for channel in range(3):
        plane, table = image + channel * S * S, tables + channel * 256
        here = mapped(plane, pixel, mask, table, pending)
        around = 5 * here
        for near in tl.static_range(9):
            if near != 4:
                around += mapped(plane, pixel + (near // 3 - 1) * S + near % 3 - 1, inner, table, pending)
        # PIL rounds a float sum of thirteenths. No sum lies half-way, so integer arithmetic gives the same.
        level = tl.where(inner, blend((around + 6) // 13, here, alpha), here)
        tl.store(out + channel * S * S + pixel, level.to(tl.uint8), mask=mask)


@triton.jit
def _pixels(planes, operation, argument, before, fill, S: tl.constexpr, BLOCK: tl.constexpr):
    sample = tl.program_id(1).to(tl.int64)
    row = operation + sample * _OPERATION
    code, cubic = tl.load(row + _CODE), tl.load(row + _CUBIC)
    side, pending = tl.load(row + _SIDE), tl.load(row + _PENDING)
    image = planes + (2 * sample + side) * (3 * S * S)
    out = planes + (2 * sample + 1 - side) * (3 * S * S)
    tables = before + sample * 768
    numbers = argument + sample * _ARGUMENT
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if code == _COLOR:
        _color(image, tables, pending, out, tl.load(numbers).to(tl.float32), pixel, S)
    elif code == _SHARPNESS:
        _sharpness(image, tables, pending, out, tl.load(numbers).to(tl.float32), pixel, S)
    elif code == _AFFINE:
        affine(image, tables, pending, out, numbers, cubic, fill, pixel, S)
    elif (code == _SHIFT_X) | (code == _SHIFT_Y):
        slope, offset = tl.load(numbers), tl.load(numbers + 1)
        shift(image, tables, pending, out, code == _SHIFT_X, slope, offset, cubic, fill, pixel, S)


def _launch(size: int) -> Launch:
    return Launch(constants=(("S", size), ("BLOCK", 256)), num_warps=4, num_stages=1, fp_fusion=False)


def apply_operations(
    planes: Tensor, operation: Tensor, argument: Tensor, tables: Tensor, fill: Tensor, blurs: tuple[bool, ...]
) -> None:
    """Apply every layer of operations to a batch.

    planes     (B, 2, 3, S, S) uint8: two slots for each image; it starts in the first
    operation  (L, B, OPERATION) int32: code, see `augment_levels`; whether bicubic; the slot that holds the image;
               whether a table is pending. COLOR, SHARPNESS, SHIFT_X, SHIFT_Y and AFFINE move the image to the other
               slot
    argument   (L, B, ARGUMENT) float64: bits to keep, threshold, level to add, factor or radius; slope and offset of
               a shift in pixels; the matrix of a rotation, output to input coordinates
    tables     (L + 1, B, 3, 256) uint8 work memory: the tables pending before each layer and after the last
    fill       (3,) uint8: the colour of pixels from outside the image
    blurs      (L,) whether a layer blurs any sample

    Only the device is checked. The call allocates no memory and does not synchronise.
    """
    check_device("apply_operations", planes.device)
    size = planes.shape[-1]
    launch = _launch(size)
    grid = (cdiv(size * size, dict(launch.constants)["BLOCK"]), len(planes))
    for layer, blurred in enumerate(blurs if len(planes) else ()):
        here = (operation[layer], argument[layer], tables[layer])
        compose_tables(planes, *here, tables[layer + 1])
        _pixels[grid](planes, *here, fill, **launch.options())
        if blurred:
            blur(planes, *here)


def variants() -> list[Variant]:
    """The launches for 224 and 384 pixels."""
    signature = {"planes": "*u8", "operation": "*i32", "argument": "*fp64", "before": "*u8", "fill": "*u8"}
    return [_launch(size).variant(f"augment_pixels S{size}", _pixels, signature) for size in (224, 384)]

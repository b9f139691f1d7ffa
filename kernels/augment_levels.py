"""Compose operations that map levels to levels into one table of 256 levels per sample and channel.

The operations are PIL's ImageOps and ImageEnhance and timm's solarize_add, bit-identical to Pillow. AutoContrast and
Equalize need the histogram, and Contrast the mean, of the image seen through the table; one program per sample and
channel computes them.
"""

# Pyright checks kernels as Python; Triton's values have other types at run time.
# pyright: reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastdeit.kernels.launch import Launch
from fastdeit.kernels.variants import Variant

# Operation codes. From COLOR on an operation needs the pixels; the earlier ones only change the table.
(
    IDENTITY, AUTO_CONTRAST, EQUALIZE, INVERT, POSTERIZE, SOLARIZE, SOLARIZE_ADD, BRIGHTNESS, CONTRAST,
    COLOR, SHARPNESS, BLUR, SHIFT_X, SHIFT_Y, AFFINE,
) = range(15)  # fmt: skip

# Columns of `operation`, and the numbers of columns of `operation` and `argument`.
CODE, CUBIC, SIDE, PENDING = range(4)
OPERATION = 4
ARGUMENT = 6

_AUTO_CONTRAST, _EQUALIZE, _INVERT = tl.constexpr(AUTO_CONTRAST), tl.constexpr(EQUALIZE), tl.constexpr(INVERT)
_POSTERIZE, _SOLARIZE, _SOLARIZE_ADD = tl.constexpr(POSTERIZE), tl.constexpr(SOLARIZE), tl.constexpr(SOLARIZE_ADD)
_BRIGHTNESS, _CONTRAST, _COLOR = tl.constexpr(BRIGHTNESS), tl.constexpr(CONTRAST), tl.constexpr(COLOR)
_CODE, _SIDE, _PENDING = tl.constexpr(CODE), tl.constexpr(SIDE), tl.constexpr(PENDING)
_OPERATION, _ARGUMENT = tl.constexpr(OPERATION), tl.constexpr(ARGUMENT)


@triton.jit
def mapped(plane, at, mask, table, pending):
    """Levels of a plane as int32, mapped by its channel's table if one is pending."""
    level = tl.load(plane + at, mask=mask, other=0).to(tl.int32)
    if pending != 0:
        level = tl.load(table + level).to(tl.int32)
    return level


@triton.jit
def blend(low, high, alpha):
    """`Image.blend` of two levels as int32: computed in float32, clipped, truncated (Pillow, Blend.c)."""
    value = low.to(tl.float32) + alpha * (high - low).to(tl.float32)
    return tl.minimum(tl.maximum(value, 0.0), 255.0).to(tl.int32)


@triton.jit
def luma(red, green, blue):
    """PIL's conversion to "L" (Pillow, Convert.c)."""
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


@triton.jit
def _histogram(plane, table, pending, AREA: tl.constexpr, BLOCK: tl.constexpr):
    counts = tl.zeros((256,), tl.int32)
    for start in range(0, AREA, BLOCK):
        at = start + tl.arange(0, BLOCK)
        counts += tl.histogram(mapped(plane, at, at < AREA, table, pending), 256, mask=at < AREA)
    return counts


@triton.jit
def _auto_contrast(levels, counts):
    every = tl.arange(0, 256)
    low = tl.min(tl.where(counts > 0, every, 255), axis=0)
    high = tl.max(tl.where(counts > 0, every, 0), axis=0)
    scale = 255.0 / tl.maximum(high - low, 1).to(tl.float64)
    offset = (-low).to(tl.float64) * scale
    stretched = (levels.to(tl.float64) * scale + offset).to(tl.int32)
    return tl.where(high > low, tl.minimum(255, tl.maximum(0, stretched)), levels)


@triton.jit
def _equalize(levels, counts):
    used = tl.sum((counts > 0).to(tl.int32), axis=0)
    highest = tl.max(tl.where(counts > 0, tl.arange(0, 256), 0), axis=0)
    last = tl.sum(tl.where(tl.arange(0, 256) == highest, counts, 0), axis=0)
    step = (tl.sum(counts, axis=0) - last) // 255
    below = step // 2 + tl.cumsum(counts, axis=0) - counts
    equal = tl.minimum(255, below // tl.maximum(step, 1))
    return tl.where((used > 1) & (step > 0), tl.gather(equal, levels, axis=0), levels)


@triton.jit
def _mean_luma(planes, tables, pending, AREA: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, AREA, BLOCK):
        at = start + tl.arange(0, BLOCK)
        red = mapped(planes, at, at < AREA, tables, pending)
        green = mapped(planes + AREA, at, at < AREA, tables + 256, pending)
        blue = mapped(planes + 2 * AREA, at, at < AREA, tables + 512, pending)
        total += tl.where(at < AREA, luma(red, green, blue), 0)
    whole = tl.sum(total.to(tl.int64), axis=0)
    return (whole.to(tl.float64) / AREA + 0.5).to(tl.int32)


@triton.jit
def _tables(planes, operation, argument, before, after, S: tl.constexpr, BLOCK: tl.constexpr):
    AREA: tl.constexpr = S * S
    sample, channel = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = operation + sample * _OPERATION
    code, pending = tl.load(row + _CODE), tl.load(row + _PENDING)
    arg = tl.load(argument + sample * _ARGUMENT)
    image = planes + (2 * sample + tl.load(row + _SIDE)) * 3 * AREA
    tables = before + sample * 768
    every = tl.arange(0, 256)
    levels = every
    if pending != 0:
        levels = tl.load(tables + channel * 256 + every).to(tl.int32)
    if code == _AUTO_CONTRAST:
        levels = _auto_contrast(
            levels, _histogram(image + channel * AREA, tables + channel * 256, pending, AREA, BLOCK)
        )
    elif code == _EQUALIZE:
        levels = _equalize(levels, _histogram(image + channel * AREA, tables + channel * 256, pending, AREA, BLOCK))
    elif code == _INVERT:
        levels = 255 - levels
    elif code == _POSTERIZE:
        # Keeping 0 bits gives a black image, as in the Pillow of the paper's time.
        levels = levels & (256 - (1 << (8 - tl.minimum(arg.to(tl.int32), 8))))
    elif code == _SOLARIZE:
        levels = tl.where(levels.to(tl.float64) >= arg, 255 - levels, levels)
    elif code == _SOLARIZE_ADD:
        levels = tl.where(levels < 128, tl.minimum(255, levels + arg.to(tl.int32)), levels)
    elif code == _BRIGHTNESS:
        levels = blend(tl.zeros_like(levels), levels, arg.to(tl.float32))
    elif code == _CONTRAST:
        mean = _mean_luma(image, tables, pending, AREA, BLOCK)
        levels = blend(mean, levels, arg.to(tl.float32))
    elif code >= _COLOR:
        levels = every
    tl.store(after + sample * 768 + channel * 256 + every, levels.to(tl.uint8))


def _launch(size: int) -> Launch:
    return Launch(constants=(("S", size), ("BLOCK", 2048)), num_warps=8, num_stages=1, fp_fusion=False)


def compose_tables(planes: Tensor, operation: Tensor, argument: Tensor, before: Tensor, after: Tensor) -> None:
    """Write the tables pending after a layer to `after`, from the tables pending before it.

    planes     (B, 2, 3, S, S) uint8: two slots for each image
    operation  (B, OPERATION) int32: code; whether bicubic; the slot that holds the image; whether `before` is pending
    argument   (B, ARGUMENT) float64: first the bits to keep, threshold, level to add or factor
    before, after  (B, 3, 256) uint8; identities if no table is pending
    """
    launch = _launch(planes.shape[-1])
    _tables[(len(planes), 3)](planes, operation, argument, before, after, **launch.options())


def variants() -> list[Variant]:
    """The launches for 224 and 384 pixels."""
    signature = {"planes": "*u8", "operation": "*i32", "argument": "*fp64", "before": "*u8", "after": "*u8"}
    return [_launch(size).variant(f"augment_levels S{size}", _tables, signature) for size in (224, 384)]

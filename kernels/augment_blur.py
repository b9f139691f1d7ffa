"""PIL's GaussianBlur for a batch: three box passes along the rows, three along the columns, each rounded to bytes.

Radius and weights are computed as in Pillow (BoxBlur.c), in float32 and 24-bit fixed point: bit-identical to Pillow.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastdeit.kernels.augment_levels import ARGUMENT, BLUR, CODE, OPERATION, PENDING, SIDE, mapped
from fastdeit.kernels.launch import Launch, cdiv
from fastdeit.kernels.variants import Variant

_BLUR, _CODE, _SIDE, _PENDING = tl.constexpr(BLUR), tl.constexpr(CODE), tl.constexpr(SIDE), tl.constexpr(PENDING)
_OPERATION, _ARGUMENT = tl.constexpr(OPERATION), tl.constexpr(ARGUMENT)
_PASSES = 6  # an even number, so the result ends in the slot it came from


@triton.jit
def _box_radius(sigma):
    """Radius of the box whose three passes approximate a Gaussian of `sigma`, float32."""
    variance = tl.div_rn(sigma * sigma, 3.0)
    length = tl.sqrt(12.0 * variance.to(tl.float64) + 1.0).to(tl.float32)
    whole = tl.floor((length.to(tl.float64) - 1.0) / 2.0).to(tl.float32)
    part = (2.0 * whole + 1.0) * (whole * (whole + 1.0) - 3.0 * variance)
    return whole + tl.div_rn(part, 6.0 * (variance - (whole + 1.0) * (whole + 1.0)))


@triton.jit(do_not_specialize=["step"])
def _box(planes, operation, argument, tables, step, S: tl.constexpr, BLOCK: tl.constexpr):
    AREA: tl.constexpr = S * S
    sample = tl.program_id(1).to(tl.int64)
    row = operation + sample * _OPERATION
    if tl.load(row + _CODE) != _BLUR:
        return
    box = _box_radius(tl.load(argument + sample * _ARGUMENT).to(tl.float32))
    radius = box.to(tl.int32)
    weight = tl.div_rn(1.0 * (1 << 24), box * 2.0 + 1.0).to(tl.int32)
    rest = ((1 << 24) - (radius * 2 + 1) * weight) // 2
    side = tl.load(row + _SIDE) ^ (step & 1)
    pending = tl.where(step == 0, tl.load(row + _PENDING), 0)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = pixel < AREA
    along_x = step < 3
    at = tl.where(along_x, pixel % S, pixel // S)
    stride = tl.where(along_x, 1, S)
    line = pixel - at * stride
    for channel in range(3):
        plane = planes + ((2 * sample + side) * 3 + channel) * AREA
        table = tables + sample * 768 + channel * 256
        near = tl.zeros((BLOCK,), tl.int32)
        for reach in range(-radius, radius + 1):
            tap = tl.minimum(tl.maximum(at + reach, 0), S - 1)
            near += mapped(plane, line + tap * stride, mask, table, pending)
        first, last = tl.maximum(at - radius - 1, 0), tl.minimum(at + radius + 1, S - 1)
        far = mapped(plane, line + first * stride, mask, table, pending)
        far += mapped(plane, line + last * stride, mask, table, pending)
        total = near.to(tl.uint32) * weight.to(tl.uint32) + far.to(tl.uint32) * rest.to(tl.uint32)
        level = (total + (1 << 23)) >> 24
        out = planes + ((2 * sample + 1 - side) * 3 + channel) * AREA
        tl.store(out + pixel, level.to(tl.uint8), mask=mask)


def _launch(size: int) -> Launch:
    return Launch(constants=(("S", size), ("BLOCK", 1024)), num_warps=4, num_stages=1, fp_fusion=False)


def blur(planes: Tensor, operation: Tensor, argument: Tensor, tables: Tensor) -> None:
    """Blur the samples whose operation is BLUR; their first argument is the radius. Each stays in its slot.

    Arguments as in `augment_levels.compose_tables`; tables (B, 3, 256) uint8: pending before the layer.
    """
    launch = _launch(planes.shape[-1])
    grid = (cdiv(planes.shape[-1] ** 2, dict(launch.constants)["BLOCK"]), len(planes))
    for step in range(_PASSES):
        _box[grid](planes, operation, argument, tables, step, **launch.options())


def variants() -> list[Variant]:
    """The launches for 224 and 384 pixels."""
    signature = {"planes": "*u8", "operation": "*i32", "argument": "*fp64", "tables": "*u8", "step": "i32"}
    return [_launch(size).variant(f"augment_blur S{size}", _box, signature) for size in (224, 384)]

"""Normalise, erase, mix and lay out: from uint8 levels to the network's input in one pass.

A table of 256 values per channel maps a level to float32. Erasing then writes standard normals, and mixing comes last,
as in timm with a loader that does not prefetch to a GPU. The same programs handle both samples of a mixed pair, so
each value is read once.

The noise comes from Philox4x32-10 (Salmon et al., SC 2011) and Box and Muller: block k of the counter (k, image
index, epoch, 1 << 28 | repeat) holds the values 4k to 4k + 3 of the (3, S, S) output. Logarithm, sine and cosine are
float64 polynomials, accurate to 1e-11, evaluated in the same order as in fastdeit.pipelines.host.noise: the float32
results are bit-identical.
"""

# Pyright checks kernels as Python; Triton's values have other types at run time.
# pyright: reportOperatorIssue=false

from __future__ import annotations

import math
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdeit.kernels.launch import DTYPES, Launch, cdiv, check_device, pointer
from fastdeit.kernels.variants import Variant

Layout = Literal["nchw", "nhwc", "patches"]

# Kinds of mixing, columns of `mix`, and their number.
NO_MIX, MIXUP, CUTMIX = 0, 1, 2
KIND, BOX_TOP, BOX_LEFT, BOX_BOTTOM, BOX_RIGHT = range(5)
MIX = 5

_MIXUP, _CUTMIX, _MIX = tl.constexpr(MIXUP), tl.constexpr(CUTMIX), tl.constexpr(MIX)
_NCHW, _NHWC = tl.constexpr("nchw"), tl.constexpr("nhwc")

_LN2, _HALF_PI = tl.constexpr(math.log(2.0)), tl.constexpr(math.pi / 2.0)
_QUARTERS = tl.constexpr(4.0 / 4294967296.0)
_MANTISSA = tl.constexpr((1 << 52) - 1)
_ROOT_HALF_BITS = tl.constexpr(0x3FE6A09E667F3BCD)
_L3, _L5, _L7, _L9, _L11, _L13 = (tl.constexpr(1 / n) for n in (3, 5, 7, 9, 11, 13))
_S3, _S5, _S7, _S9, _S11, _S13 = (
    tl.constexpr(math.cos(math.pi * (n // 2)) / math.factorial(n)) for n in (3, 5, 7, 9, 11, 13)
)
_C2, _C4, _C6, _C8, _C10, _C12 = (
    tl.constexpr(math.cos(math.pi * (n // 2)) / math.factorial(n)) for n in (2, 4, 6, 8, 10, 12)
)


@triton.jit
def _log(x):
    """Natural logarithm of the mantissa m of x > 0, as the series of 2 artanh((m - 1) / (m + 1)), and the exponent."""
    above = x.to(tl.int64, bitcast=True) - _ROOT_HALF_BITS
    exponent = (above >> 52).to(tl.float64)
    m = ((above & _MANTISSA) + _ROOT_HALF_BITS).to(tl.float64, bitcast=True)
    s = (m - 1.0) / (m + 1.0)
    t = s * s
    series = 1.0 + t * (_L3 + t * (_L5 + t * (_L7 + t * (_L9 + t * (_L11 + t * _L13)))))
    return 2.0 * s * series, exponent


@triton.jit
def _normals(radius_word, angle_word):
    """Two standard normals from two uint32 words, float32."""
    log, exponent = _log(radius_word.to(tl.float64) + 0.5)
    radius = tl.sqrt(-2.0 * (log - (32.0 - exponent) * _LN2))
    quarters = (angle_word.to(tl.float64) + 0.5) * _QUARTERS
    nearest = tl.floor(quarters + 0.5)
    x = (quarters - nearest) * _HALF_PI
    t = x * x
    sine = x * (1.0 + t * (_S3 + t * (_S5 + t * (_S7 + t * (_S9 + t * (_S11 + t * _S13))))))
    cosine = 1.0 + t * (_C2 + t * (_C4 + t * (_C6 + t * (_C8 + t * (_C10 + t * _C12)))))
    quadrant = nearest.to(tl.int32)
    odd = (quadrant & 1) != 0
    a, b = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    a = tl.where(((quadrant + 1) & 2) != 0, -a, a)
    b = tl.where((quadrant & 2) != 0, -b, b)
    return (radius * a).to(tl.float32), (radius * b).to(tl.float32)


@triton.jit
def _noise(first, seed, epoch, index, repeat, BLOCK: tl.constexpr):
    """Values first .. first + BLOCK - 1 of a sample's noise; `first` is a multiple of 4."""
    block = (first // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    same = tl.zeros_like(block)
    stream = (repeat | (1 << 28)).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, block, same + index.to(tl.uint32), same + epoch.to(tl.uint32), same + stream)
    n0, n1 = _normals(w0, w1)
    n2, n3 = _normals(w2, w3)
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), (BLOCK,))


@triton.jit
def _values(
    planes,
    location,
    tables,
    levels,
    erase,
    identity,
    key,
    sample,
    first,
    S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Values first .. first + BLOCK - 1 of a sample, normalised and erased."""
    sample = sample.to(tl.int64)
    number = first + tl.arange(0, BLOCK)
    mask = number < 3 * S * S
    channel, y, x = number // (S * S), number // S % S, number % S
    image = planes + (2 * sample + tl.load(location + 2 * sample)) * (3 * S * S)
    level = tl.load(image + number, mask=mask, other=0).to(tl.int32)
    if tl.load(location + 2 * sample + 1) != 0:
        level = tl.load(tables + sample * 768 + channel * 256 + level, mask=mask, other=0).to(tl.int32)
    value = tl.load(levels + channel * 256 + level, mask=mask, other=0.0)
    box = erase + 4 * sample
    top, left, height, width = tl.load(box), tl.load(box + 1), tl.load(box + 2), tl.load(box + 3)
    if (height > 0) & (width > 0):
        erased = mask & (y >= top) & (y < top + height) & (x >= left) & (x < left + width)
        if tl.max(erased.to(tl.int32), axis=0) > 0:
            index, repeat = tl.load(identity + 2 * sample), tl.load(identity + 2 * sample + 1)
            noise = _noise(first, tl.load(key), tl.load(key + 1), index, repeat, BLOCK)
            value = tl.where(erased, noise, value)
    return value


@triton.jit
def _output_offset(number, S: tl.constexpr, LAYOUT: tl.constexpr, P: tl.constexpr, RUN: tl.constexpr):
    """Offset in the output sample of value `number` of (3, S, S).

    RUN values at a time are contiguous in every layout but "nhwc"; the compiler would not find that by itself.
    """
    start = number // RUN * RUN
    channel, y, x = start // (S * S), start // S % S, start % S
    if LAYOUT == _NCHW:
        offset = number
    elif LAYOUT == _NHWC:
        offset = (number % (S * S)) * 3 + number // (S * S)
    else:
        patch = (y // P) * (S // P) + x // P
        offset = patch * (3 * P * P) + (channel * P + y % P) * P + x % P + number % RUN
    return offset


@triton.jit
def _normalize_erase_mix(
    planes,
    location,
    tables,
    levels,
    erase,
    identity,
    key,
    pairs,
    mix,
    mix_weights,
    out,
    S: tl.constexpr,
    LAYOUT: tl.constexpr,
    P: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pair = pairs + 2 * tl.program_id(1)
    one, other = tl.load(pair), tl.load(pair + 1)
    first = tl.program_id(0) * BLOCK
    number = first + tl.arange(0, BLOCK)
    mask = number < 3 * S * S
    offset = _output_offset(number, S, LAYOUT, P, RUN)
    a = _values(planes, location, tables, levels, erase, identity, key, one, first, S, BLOCK)
    to_one = out + one.to(tl.int64) * (3 * S * S) + offset
    if other < 0:
        tl.store(to_one, a.to(out.dtype.element_ty), mask=mask)
        return
    b = _values(planes, location, tables, levels, erase, identity, key, other, first, S, BLOCK)
    to_other = out + other.to(tl.int64) * (3 * S * S) + offset
    mix_row = mix + _MIX * one
    kind = tl.load(mix_row)
    if kind == _MIXUP:
        own_weight, other_weight = tl.load(mix_weights + 2 * one), tl.load(mix_weights + 2 * one + 1)
        mixed_a, mixed_b = a * own_weight + b * other_weight, b * own_weight + a * other_weight
    else:
        y, x = number // S % S, number % S
        inside = (
            (y >= tl.load(mix_row + 1))
            & (x >= tl.load(mix_row + 2))
            & (y < tl.load(mix_row + 3))
            & (x < tl.load(mix_row + 4))
        )
        inside &= kind == _CUTMIX
        mixed_a, mixed_b = tl.where(inside, b, a), tl.where(inside, a, b)
    tl.store(to_one, mixed_a.to(out.dtype.element_ty), mask=mask)
    tl.store(to_other, mixed_b.to(out.dtype.element_ty), mask=mask)


def _launch(size: int, layout: Layout, patch_size: int) -> Launch:
    constants = (("S", size), ("LAYOUT", layout), ("P", patch_size), ("RUN", math.gcd(8, size, patch_size)))
    return Launch(constants=(*constants, ("BLOCK", 1024)), num_warps=4, num_stages=1, fp_fusion=False)


def normalize_erase_mix(
    planes: Tensor,
    location: Tensor,
    tables: Tensor,
    levels: Tensor,
    erase: Tensor,
    identity: Tensor,
    key: Tensor,
    pairs: Tensor,
    mix: Tensor,
    mix_weights: Tensor,
    out: Tensor,
    *,
    layout: Layout,
    patch_size: int,
) -> None:
    """Normalise, erase and mix a batch, and write it in the layout that the network takes.

    planes  (B, 2, 3, S, S) uint8: two slots for each image
    location  (B, 2) int32: the slot that holds the image; whether its table is pending
    tables  (B, 3, 256) uint8
    levels  (3, 256) float32: the normalised value of each level
    erase   (B, 4) int32 top, left, height, width; height 0: nothing erased
    identity  (B, 2) int64 image index and repeat, key (2,) int64 seed and epoch: the counter of the noise
    pairs   (P, 2) int32: samples handled together, among them those that mix with one another; second -1: one alone.
            Each sample appears once
    mix     (B, MIX) int32: NO_MIX, MIXUP, or CUTMIX and top, left, bottom, right of the partner's part
    mix_weights  (B, 2) float32: Mixup's weights of a sample itself and of its partner
    out     float32, float16 or bfloat16, contiguous: (B, 3, S, S) with layout "nchw", (B, S, S, 3) with "nhwc",
            (B, (S / P)^2, 3 * P * P) with "patches": patches in row order, each channel by channel, as
            `fastdeit.kernels.token_assembly.embed_patches` takes them
    patch_size  P

    Only the device is checked. The call allocates no memory and does not synchronise.
    """
    check_device("normalize_erase_mix", planes.device)
    size = planes.shape[-1]
    if not len(pairs):
        return
    launch = _launch(size, layout, patch_size)
    _normalize_erase_mix[(cdiv(3 * size * size, dict(launch.constants)["BLOCK"]), len(pairs))](
        planes, location, tables, levels, erase, identity, key, pairs, mix, mix_weights, out, **launch.options()
    )


def variants() -> list[Variant]:
    """The launches for 224 and 384 pixels in patches of 16, and for 224 in the other layouts."""
    signature = {
        "planes": "*u8", "location": "*i32", "tables": "*u8", "levels": "*fp32", "erase": "*i32", "identity": "*i64",
        "key": "*i64", "pairs": "*i32", "mix": "*i32", "mix_weights": "*fp32",
    }  # fmt: skip
    launches: list[tuple[int, Layout, torch.dtype]] = [
        (224, "nchw", torch.float32),
        (224, "nchw", torch.bfloat16),
        (224, "nhwc", torch.bfloat16),
        (224, "patches", torch.bfloat16),
        (224, "patches", torch.float16),
        (384, "patches", torch.bfloat16),
    ]
    return [
        _launch(size, layout, 16).variant(
            f"augment_normalize {layout} {DTYPES[dtype]} S{size}",
            _normalize_erase_mix,
            signature | {"out": pointer(dtype)},
        )
        for size, layout, dtype in launches
    ]

"""Parts of the host stage that LLVM does not vectorise by itself, written as LLVM vectors.

The code fits any processor: LLVM lowers the vectors to the machine's own.
"""

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from fastdeit.pipelines.jit import compiled

_intrinsic: Any = intrinsic  # its type hints omit the typing context that numba adds
_I8, _I32 = ir.IntType(8), ir.IntType(32)
_BYTES, _INTS = ir.VectorType(_I8, 16), ir.VectorType(_I32, 16)

LANES = 48  # bytes per `weighted_sum`
_FRACTION = 22  # bits of PIL's fixed-point resize coefficients


def _pointer(context, builder, array_type, array, offset, pointee):
    """Pointer to `pointee` at element `offset` of an array."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [offset]), ir.PointerType(pointee))


def _constant(value):
    return ir.Constant(_INTS, [value] * 16)


def _splat(builder, vector_type, value):
    one = builder.insert_element(ir.Constant(vector_type, ir.Undefined), value, ir.Constant(_I32, 0))
    zeros = ir.Constant(ir.VectorType(_I32, 16), [0] * 16)
    return builder.shuffle_vector(one, ir.Constant(vector_type, ir.Undefined), zeros)


@_intrinsic
def _transpose_16(typing_context, dst, dst_offset, dst_stride, src, src_offset, src_stride):
    """Transpose a block of 16 x 16 bytes."""
    signature = types.void(dst, types.intp, types.intp, src, types.intp, types.intp)

    def codegen(context, builder, signature, args):
        dst, dst_offset, dst_stride, src, src_offset, src_stride = args
        dst_type, src_type = signature.args[0], signature.args[3]
        rows = []
        for row in range(16):
            offset = builder.add(src_offset, builder.mul(src_stride, ir.Constant(src_stride.type, row)))
            rows.append(builder.load(_pointer(context, builder, src_type, src, offset, _BYTES), align=1))
        # An interleave of row i with row i + 8 moves one bit of the row number into the column number.
        low, high = (
            ir.Constant(ir.VectorType(_I32, 16), [first + i // 2 + 16 * (i % 2) for i in range(16)]) for first in (0, 8)
        )
        for _ in range(4):
            rows = [builder.shuffle_vector(rows[i], rows[i + 8], half) for i in range(8) for half in (low, high)]
        for row in range(16):
            offset = builder.add(dst_offset, builder.mul(dst_stride, ir.Constant(dst_stride.type, row)))
            builder.store(rows[row], _pointer(context, builder, dst_type, dst, offset, _BYTES), align=1)
        return context.get_dummy_value()

    return signature, codegen


@_intrinsic
def weighted_sum(typing_context, dst, dst_offset, src, src_offset, src_stride, taps, taps_offset, count):
    """48 bytes of `dst`: `count` runs of 48 bytes of `src`, weighted by 22-bit fixed-point taps, as in PIL.

    The sum is int32, rounded half up and clipped to 0..255. dst, src uint8 arrays, taps int32 array; offsets and
    the stride are in elements.
    """
    signature = types.void(
        dst, types.intp, src, types.intp, types.intp, taps, types.intp, types.intp
    )  # fmt: skip

    def codegen(context, builder, signature, args):
        dst, dst_offset, src, src_offset, src_stride, taps, taps_offset, count = args
        dst_type, src_type, taps_type = signature.args[0], signature.args[2], signature.args[5]
        sums = [cgutils.alloca_once_value(builder, _constant(1 << (_FRACTION - 1))) for _ in range(LANES // 16)]
        with cgutils.for_range(builder, count) as loop:
            tap = builder.load(_pointer(context, builder, taps_type, taps, builder.add(taps_offset, loop.index), _I32))
            weight = _splat(builder, _INTS, tap)
            run = builder.add(src_offset, builder.mul(src_stride, loop.index))
            for part, total in enumerate(sums):
                offset = builder.add(run, ir.Constant(run.type, 16 * part))
                pixels = builder.load(_pointer(context, builder, src_type, src, offset, _BYTES), align=1)
                product = builder.mul(builder.zext(pixels, _INTS), weight)
                builder.store(builder.add(builder.load(total), product), total)
        for part, total in enumerate(sums):
            value = builder.ashr(builder.load(total), _constant(_FRACTION))
            value = builder.select(builder.icmp_signed("<", value, _constant(0)), _constant(0), value)
            value = builder.select(builder.icmp_signed(">", value, _constant(255)), _constant(255), value)
            offset = builder.add(dst_offset, ir.Constant(dst_offset.type, 16 * part))
            pointer = _pointer(context, builder, dst_type, dst, offset, _BYTES)
            builder.store(builder.trunc(value, _BYTES), pointer, align=1)
        return context.get_dummy_value()

    return signature, codegen


@_intrinsic
def load_four(typing_context, src, offset):
    """Four bytes of a uint8 array from element `offset` on, as one little-endian uint32."""
    signature = types.uint32(src, types.intp)

    def codegen(context, builder, signature, args):
        return builder.load(_pointer(context, builder, signature.args[0], args[0], args[1], _I32), align=1)

    return signature, codegen


@compiled
def copy_run(dst, dst_offset, src, src_offset, count):
    """dst[dst_offset + i] = src[src_offset + i]; ten times as fast as numba's slice assignment for short runs."""
    to, run = dst[dst_offset : dst_offset + count], src[src_offset : src_offset + count]
    for i in range(count):
        to[i] = run[i]


@compiled
def fill_run(dst, dst_offset, value, count):
    """dst[dst_offset + i] = value."""
    to = dst[dst_offset : dst_offset + count]
    for i in range(count):
        to[i] = value


@compiled
def transpose(dst, dst_offset, dst_stride, src, src_offset, src_stride, rows, cols):
    """Transpose `rows` x `cols` bytes of `src` into `cols` x `rows` of `dst`; offsets and strides in elements."""
    if rows < 16 or cols < 16:
        for row in range(rows):
            for col in range(cols):
                dst[dst_offset + col * dst_stride + row] = src[src_offset + row * src_stride + col]
        return
    for block_row in range((rows + 15) // 16):
        row = min(block_row * 16, rows - 16)  # the last block overlaps the one before
        for block_col in range((cols + 15) // 16):
            col = min(block_col * 16, cols - 16)
            _transpose_16(
                dst, dst_offset + col * dst_stride + row, dst_stride,
                src, src_offset + row * src_stride + col, src_stride,
            )  # fmt: skip

"""Add the bias of the MLP's first layer and apply GELU, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdeit.kernels.column_sum import column_sum
from fastdeit.kernels.launch import DTYPES, Launch, cdiv, check, chosen, operator, pointer
from fastdeit.kernels.variants import Variant

_EXPONENT = tl.constexpr(-0.7213475204444817)  # -log2(e) / 2
_DENSITY = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)
_SLOPE = tl.constexpr(0.3005203820042827)


@triton.jit
def _normal_cdf(value):
    """The standard normal CDF at `value`, and exp(-value^2 / 2), its density without the constant factor."""
    # CDF(-y) = exp(-y^2 / 2) t P(t), t = 1 / (1 + _SLOPE y): the form of Abramowitz and Stegun, 7.1.26, with minimax
    # coefficients for y from 0 to 13; the largest relative error is 1.2e-7, one ulp of float32. An erf would need a
    # quarter to a third more instructions, and 1 + erf loses all digits far below zero.
    gaussian = tl.exp2(value * value * _EXPONENT)
    t = 1.0 / (1.0 + _SLOPE * tl.abs(value))
    p = 0.03609196305 * t - 0.1580486103
    p = p * t + 0.2063423363
    p = p * t - 0.0539580389
    p = p * t + 0.1287779773
    p = p * t + 0.09997853832
    p = p * t + 0.1209803848
    p = p * t + 0.1198353894
    tail = gaussian * t * p
    return tl.where(value < 0, tail, 1.0 - tail), gaussian


@triton.jit
def _bias_gelu_forward(x, bias, out, num_rows, width, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_width = columns < width
    inside = (rows < num_rows)[:, None] & in_width[None, :]
    offsets = rows[:, None] * width + columns[None, :]
    bias_row = tl.load(bias + columns, mask=in_width, other=0.0).to(tl.float32)
    value = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32) + bias_row[None, :]
    cdf, _ = _normal_cdf(value)
    tl.store(out + offsets, (value * cdf).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _bias_gelu_backward(
    x,
    bias,
    grad,
    grad_x,
    partial,
    num_rows,
    width,
    chunk,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    # Each program handles `chunk` rows of some channels and writes its own partial sums for the bias.
    first_row = tl.program_id(0).to(tl.int64) * chunk
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_width = columns < width
    bias_row = tl.load(bias + columns, mask=in_width, other=0.0).to(tl.float32)
    total = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for step in tl.range(0, chunk, ROWS, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        rows = first_row + step + tl.arange(0, ROWS)
        inside = ((rows < num_rows) & (rows < first_row + chunk))[:, None] & in_width[None, :]
        offsets = rows[:, None] * width + columns[None, :]
        value = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32) + bias_row[None, :]
        grad_value = tl.load(grad + offsets, mask=inside, other=0.0).to(tl.float32)
        cdf, gaussian = _normal_cdf(value)
        grad_value = grad_value * (cdf + value * (_DENSITY * gaussian))
        tl.store(grad_x + offsets, grad_value.to(grad_x.dtype.element_ty), mask=inside)
        total += grad_value
    offset = tl.program_id(0).to(tl.int64) * width + columns
    tl.store(partial + offset, tl.sum(total, axis=0), mask=in_width)


_ROWS_PER_PROGRAM = 256  # of the backward pass
# Tuned on an H200. A backward program loads its next two tiles while it computes one.
_FORWARD = Launch(constants=(("ROWS", 16), ("BLOCK_C", 256)), num_warps=4)
_BACKWARD = Launch(constants=(("ROWS", 16), ("BLOCK_C", 128), ("STAGES", 3)), num_warps=4)


@operator("fastdeit::bias_gelu")
def _op(x: Tensor, bias: Tensor) -> Tensor:
    out = _fake(x, bias)
    if x.numel():
        width = x.shape[-1]
        rows = x.numel() // width
        launch = chosen("bias_gelu_forward", _FORWARD)
        blocks = dict(launch.constants)
        grid = cdiv(rows, blocks["ROWS"]), cdiv(width, blocks["BLOCK_C"])
        _bias_gelu_forward[grid](x.contiguous(), bias.contiguous(), out, rows, width, **launch.options())
    return out


@_op.register_fake
def _fake(x: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@operator("fastdeit::bias_gelu_backward")
def _backward_op(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    grad_x, total = _backward_fake(grad, x, bias)
    if not x.numel():
        return grad_x, total.zero_()
    width = x.shape[-1]
    rows = x.numel() // width
    programs = cdiv(rows, _ROWS_PER_PROGRAM)
    partial = total[None] if programs == 1 else x.new_empty((programs, width), dtype=torch.float32)
    launch = chosen("bias_gelu_backward", _BACKWARD)
    _bias_gelu_backward[(programs, cdiv(width, dict(launch.constants)["BLOCK_C"]))](
        x.contiguous(),
        bias.contiguous(),
        grad.contiguous(),
        grad_x,
        partial,
        rows,
        width,
        _ROWS_PER_PROGRAM,
        **launch.options(),
    )
    if programs > 1:
        column_sum(partial, total)
    return grad_x, total


@_backward_op.register_fake
def _backward_fake(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(bias.shape, dtype=torch.float32)


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx, grad):
    x, bias = ctx.saved_tensors
    grad_x, total = _backward_op(grad, x, bias)
    return grad_x, total.to(bias.dtype)


_op.register_autograd(_autograd, setup_context=_setup)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """GELU of x + bias, exact (erf).

    x     (..., C) output of the MLP's first GEMM, without its bias
    bias  (C,)

    Both are float32, float16 or bfloat16; the arithmetic is float32. Returns (..., C) in the dtype of `x`. The
    backward pass recomputes the sum, so only `x` is saved; the bias's gradient is summed in float32 in a fixed order.
    Raises ValueError for mismatched shapes and without a GPU. Source: Hendrycks and Gimpel, arXiv 1606.08415.
    """
    check("bias_gelu", x=x, bias=bias)
    if not x.ndim or bias.shape != x.shape[-1:]:
        raise ValueError(f"bias_gelu: bias is {tuple(bias.shape)}, x is {tuple(x.shape)}: give (..., C) and (C,)")
    return _op(x, bias)


def variants() -> list[Variant]:
    """The launches for DeiT-B's MLP; other widths compile to the same code."""
    low = pointer(torch.bfloat16)
    sizes = {"num_rows": "i32", "width": "i32"}
    name = f"{DTYPES[torch.bfloat16]} C3072"
    forward = {"x": low, "bias": "*fp32", "out": low, **sizes}
    backward = {"x": low, "bias": "*fp32", "grad": low, "grad_x": low, "partial": "*fp32", "chunk": "i32", **sizes}
    return [
        _FORWARD.variant(f"bias_gelu_forward {name}", _bias_gelu_forward, forward, ("num_rows", "width")),
        _BACKWARD.variant(f"bias_gelu_backward {name}", _bias_gelu_backward, backward, ("num_rows", "width", "chunk")),
    ]

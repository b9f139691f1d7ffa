"""Stochastic depth, residual addition and layer normalisation in one pass over the tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdeit.kernels.column_sum import column_sum
from fastdeit.kernels.launch import (
    DTYPES,
    Launch,
    cdiv,
    check,
    check_dtype,
    chosen,
    next_power_of_two,
    operator,
    pointer,
)
from fastdeit.kernels.variants import Variant


@triton.jit
def _add_layer_norm_forward(
    x,
    branch,
    mask,
    weight,
    bias,
    total,
    out,
    mean,
    rstd,
    num_rows,
    rows_per_sample,
    width,
    eps,
    BRANCH: tl.constexpr,
    MASK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    in_rows = rows < num_rows
    in_width = columns < width
    inside = in_rows[:, None] & in_width[None, :]
    offsets = rows[:, None] * width + columns[None, :]
    value = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    if BRANCH:
        branch_value = tl.load(branch + offsets, mask=inside, other=0.0).to(tl.float32)
        if MASK:
            factor = tl.load(mask + rows // rows_per_sample, mask=in_rows, other=0.0)
            branch_value = branch_value * factor[:, None]
        # Normalize the sum as it is stored, rounded: that is what the next block reads.
        value = (value + branch_value.to(branch.dtype.element_ty).to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + offsets, value, mask=inside)
        value = value.to(tl.float32)
    row_mean = tl.sum(value, axis=1) / width
    centered = tl.where(inside, value - row_mean[:, None], 0.0)
    row_rstd = tl.rsqrt(tl.sum(centered * centered, axis=1) / width + eps)
    scale = tl.load(weight + columns, mask=in_width, other=0.0).to(tl.float32)
    shift = tl.load(bias + columns, mask=in_width, other=0.0).to(tl.float32)
    normalized = centered * row_rstd[:, None] * scale[None, :] + shift[None, :]
    tl.store(out + offsets, normalized.to(out.dtype.element_ty), mask=inside)
    tl.store(mean + rows, row_mean, mask=in_rows)
    tl.store(rstd + rows, row_rstd, mask=in_rows)


@triton.jit
def _add_layer_norm_backward(
    grad_out,
    grad_total,
    total,
    mask,
    weight,
    mean,
    rstd,
    grad_x,
    grad_branch,
    partial,
    num_rows,
    rows_per_sample,
    width,
    chunk,
    BRANCH: tl.constexpr,
    MASK: tl.constexpr,
    BRANCH_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    # Each program handles `chunk` rows and writes its own partial sums for weight, bias and the branch's bias.
    columns = tl.arange(0, BLOCK)
    in_width = columns < width
    scale = tl.load(weight + columns, mask=in_width, other=0.0).to(tl.float32)
    grad_weight = tl.zeros((ROWS, BLOCK), tl.float32)
    grad_bias = tl.zeros((ROWS, BLOCK), tl.float32)
    grad_branch_bias = tl.zeros((ROWS, BLOCK), tl.float32)
    # 64-bit offsets only for the program's first row: within the loop they would cost registers.
    first_row = tl.program_id(0).to(tl.int64) * chunk
    total += first_row * width
    grad_out += first_row * width
    grad_total += first_row * width
    grad_x += first_row * width
    grad_branch += first_row * width
    mean += first_row
    rstd += first_row
    own_rows = tl.minimum(chunk, num_rows - first_row).to(tl.int32)
    for step in tl.range(0, chunk, ROWS, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        rows = step + tl.arange(0, ROWS)
        in_rows = rows < own_rows
        inside = in_rows[:, None] & in_width[None, :]
        offsets = rows[:, None] * width + columns[None, :]
        value = tl.load(total + offsets, mask=inside, other=0.0).to(tl.float32)
        row_mean = tl.load(mean + rows, mask=in_rows, other=0.0)
        row_rstd = tl.load(rstd + rows, mask=in_rows, other=0.0)
        grad = tl.load(grad_out + offsets, mask=inside, other=0.0).to(tl.float32)
        # Beyond the last row all numbers are 0, and beyond the last column `grad` and `scale` are: they add nothing.
        normalized = (value - row_mean[:, None]) * row_rstd[:, None]
        grad_weight += grad * normalized
        grad_bias += grad
        scaled = grad * scale[None, :]
        mean_projection = tl.sum(scaled * normalized, axis=1) / width
        mean_scaled = tl.sum(scaled, axis=1) / width
        grad_value = (scaled - normalized * mean_projection[:, None] - mean_scaled[:, None]) * row_rstd[:, None]
        if BRANCH:
            grad_value += tl.load(grad_total + offsets, mask=inside, other=0.0).to(tl.float32)
            to_branch = grad_value
            if MASK:
                factor = tl.load(mask + (first_row + rows) // rows_per_sample, mask=in_rows, other=0.0)
                to_branch = grad_value * factor[:, None]
            tl.store(grad_branch + offsets, to_branch.to(grad_branch.dtype.element_ty), mask=inside)
            if BRANCH_BIAS:
                grad_branch_bias += to_branch
        tl.store(grad_x + offsets, grad_value.to(grad_x.dtype.element_ty), mask=inside)
    offset = tl.program_id(0).to(tl.int64) * (3 if BRANCH_BIAS else 2) * width + columns
    tl.store(partial + offset, tl.sum(grad_weight, axis=0), mask=in_width)
    tl.store(partial + offset + width, tl.sum(grad_bias, axis=0), mask=in_width)
    if BRANCH_BIAS:
        tl.store(partial + offset + 2 * width, tl.sum(grad_branch_bias, axis=0), mask=in_width)


MAX_WIDTH = 4096  # channels that fit the registers of a program with 16 warps


def _forward_launch(width: int, branch: bool, mask: bool) -> Launch:
    """16 elements a thread, and at least four warps."""
    block = max(16, next_power_of_two(width))
    constants = (("BRANCH", branch), ("MASK", mask), ("ROWS", max(1, 2048 // block)), ("BLOCK", block))
    return Launch(constants=constants, num_warps=max(4, min(16, block // 512)))


def _backward_launch(width: int, branch: bool, mask: bool, branch_bias: bool) -> Launch:
    """8 or 16 elements a thread; tuned on an H200."""
    block = max(16, next_power_of_two(width))
    warps = 2 if block <= 512 else min(16, block // 256)
    constants = (("BRANCH", branch), ("MASK", mask), ("BRANCH_BIAS", branch_bias))
    # Few programs share a multiprocessor, so prefetch the next rows while one is computed.
    constants += (("ROWS", max(1, 1024 // block)), ("BLOCK", block), ("STAGES", 3))
    return Launch(constants=constants, num_warps=warps)


# Programs of the backward pass: four for each multiprocessor of an H200. More would make more partial sums.
_PROGRAMS = 528


def _rows_per_sample(x: Tensor) -> int:
    return x.numel() // (len(x) * x.shape[-1])


@operator("fastdeit::add_layer_norm")
def _op(
    x: Tensor,
    branch: Tensor | None,
    branch_bias: Tensor | None,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs = _fake(x, branch, branch_bias, mask, weight, bias, eps, dtype)
    if not x.numel():
        return outputs
    total, out, mean, rstd = outputs
    width = x.shape[-1]
    rows = x.numel() // width
    launch = chosen("add_layer_norm_forward", _forward_launch(width, branch is not None, mask is not None))
    x = x.contiguous()
    _add_layer_norm_forward[(cdiv(rows, dict(launch.constants)["ROWS"]),)](
        x,
        x if branch is None else branch.contiguous(),
        x if mask is None else mask.contiguous(),
        weight.contiguous(),
        bias.contiguous(),
        total,
        out,
        mean,
        rstd,
        rows,
        _rows_per_sample(x),
        width,
        eps,
        **launch.options(),
    )
    return outputs


@_op.register_fake
def _fake(
    x: Tensor,
    branch: Tensor | None,
    branch_bias: Tensor | None,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # Without a branch the sum is `x`, and an operator may not return its argument.
    kind = x.dtype if branch is None else torch.promote_types(x.dtype, branch.dtype)
    total = x.new_empty(x.shape if branch is not None else (0,), dtype=kind)
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    return total, x.new_empty(x.shape, dtype=dtype), mean, rstd


@operator("fastdeit::add_layer_norm_backward")
def _backward_op(
    grad_out: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    x_dtype: torch.dtype,
    branch_dtype: torch.dtype | None,
    sum_branch: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _backward_fake(grad_out, grad_total, total, mask, weight, mean, rstd, x_dtype, branch_dtype, sum_branch)
    grad_x, grad_branch, sums = outputs
    if not total.numel():
        sums.zero_()
        return outputs
    width = total.shape[-1]
    rows = total.numel() // width
    default = _backward_launch(width, branch_dtype is not None, mask is not None, sum_branch)
    launch = chosen("add_layer_norm_backward", default)
    tile = dict(launch.constants)["ROWS"]
    chunk = cdiv(cdiv(rows, _PROGRAMS), tile) * tile
    programs = cdiv(rows, chunk)
    partial = sums[None] if programs == 1 else total.new_empty((programs, *sums.shape), dtype=torch.float32)
    total = total.contiguous()
    _add_layer_norm_backward[(programs,)](
        grad_out.contiguous(),
        total if grad_total is None else grad_total.contiguous(),
        total,
        mean if mask is None else mask.contiguous(),
        weight.contiguous(),
        mean,
        rstd,
        grad_x,
        grad_branch,
        partial,
        rows,
        _rows_per_sample(total),
        width,
        chunk,
        **launch.options(),
    )
    if programs > 1:
        column_sum(partial, sums)
    return outputs


@_backward_op.register_fake
def _backward_fake(
    grad_out: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    x_dtype: torch.dtype,
    branch_dtype: torch.dtype | None,
    sum_branch: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = total.new_empty(total.shape, dtype=x_dtype)
    grad_branch = total.new_empty(total.shape if branch_dtype is not None else (0,), dtype=branch_dtype)
    sums = total.new_empty((3 if sum_branch else 2, total.shape[-1]), dtype=torch.float32)
    return grad_x, grad_branch, sums


def _setup(ctx, inputs, output) -> None:
    x, branch, branch_bias, mask, weight, bias, _, _ = inputs
    total, _, mean, rstd = output
    ctx.save_for_backward(x if branch is None else total, mask, weight, mean, rstd)
    ctx.dtypes = [None if t is None else t.dtype for t in (x, branch, branch_bias, weight, bias)]


def _autograd(ctx, grad_total, grad_out, *_):
    total, mask, weight, mean, rstd = ctx.saved_tensors
    x_dtype, branch_dtype, branch_bias_dtype, weight_dtype, bias_dtype = ctx.dtypes
    sum_branch = branch_bias_dtype is not None
    if branch_dtype is None:
        grad_total = None
    grad_x, grad_branch, sums = _backward_op(
        grad_out, grad_total, total, mask, weight, mean, rstd, x_dtype, branch_dtype, sum_branch
    )
    branch = None if branch_dtype is None else grad_branch
    branch_bias = sums[2].to(branch_bias_dtype) if sum_branch else None
    return grad_x, branch, branch_bias, None, sums[0].to(weight_dtype), sums[1].to(bias_dtype), None, None


_op.register_autograd(_autograd, setup_context=_setup)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6, *, dtype: torch.dtype | None = None
) -> Tensor:
    """Layer normalisation over the last dimension.

    x             (B, ..., C), C at most `MAX_WIDTH`
    weight, bias  (C,)
    dtype         of the result, e.g. the dtype of the GEMM that reads it; None: the dtype of `x`

    All are float32, float16 or bfloat16; the arithmetic is float32. The gradients of weight and bias are summed in
    float32 in a fixed order. Raises ValueError for mismatched shapes and without a GPU. Source: Ba et al.,
    arXiv 1607.06450.
    """
    dtype = dtype or x.dtype
    _check(x, None, None, None, weight, bias, dtype)
    return _op(x, None, None, None, weight, bias, eps, dtype)[1]


def add_layer_norm(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-6,
    *,
    mask: Tensor | None = None,
    branch_bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Add a branch to the residual stream and normalise the sum, as after each half of a block.

    x       (B, ..., C) the residual stream
    branch  (B, ..., C) the output of attention or the MLP
    mask    (B,) float32 factors of stochastic depth, one a sample: 0 or 1 / keep probability; or None
    branch_bias  (C,) a bias that `branch` already contains, detached, or None. It changes no result: it only receives
            its gradient, the sum of the branch's gradient over all rows, from the pass that computes the latter
    dtype   of the normalised result; None: the dtype of the sum

    Returns (x + mask * branch, its normalisation). The sum has the wider dtype of `x` and `branch`; the masked branch
    is first rounded to the branch's dtype, as in `fastdeit.model.drop_path.DropPath`. No gradient reaches the mask.
    Other arguments and errors: see `layer_norm`.
    """
    dtype = dtype or torch.promote_types(x.dtype, branch.dtype)
    _check(x, branch, branch_bias, mask, weight, bias, dtype)
    total, out, _, _ = _op(x, branch, branch_bias, mask, weight, bias, eps, dtype)
    return total, out


def _check(
    x: Tensor,
    branch: Tensor | None,
    branch_bias: Tensor | None,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    dtype: torch.dtype,
) -> None:
    if mask is not None and (mask.shape != x.shape[:1] or mask.dtype != torch.float32):
        raise ValueError(
            f"add_layer_norm: mask is {tuple(mask.shape)} {mask.dtype}: "
            f"give a float32 factor for each of {len(x)} samples"
        )
    check("layer_norm", x=x, branch=branch, branch_bias=branch_bias, mask=mask, weight=weight, bias=bias)
    check_dtype("layer_norm", "dtype", dtype)
    if x.ndim < 2 or x.shape[-1] > MAX_WIDTH:
        raise ValueError(
            f"layer_norm: x is {tuple(x.shape)}: give (batch, ..., channels), at most {MAX_WIDTH} channels"
        )
    if weight.shape != x.shape[-1:] or bias.shape != x.shape[-1:]:
        raise ValueError(
            f"layer_norm: weight {tuple(weight.shape)} and bias {tuple(bias.shape)} do not match x {tuple(x.shape)}: "
            f"give both ({x.shape[-1]},)"
        )
    if branch is not None and branch.shape != x.shape:
        raise ValueError(f"add_layer_norm: branch is {tuple(branch.shape)}, x is {tuple(x.shape)}")
    if branch_bias is not None and branch_bias.shape != x.shape[-1:]:
        raise ValueError(f"add_layer_norm: branch_bias is {tuple(branch_bias.shape)}: give it ({x.shape[-1]},)")


def variants() -> list[Variant]:
    """The launches for DeiT-Ti, S and B: with and without a branch; bf16 branch, float32 or bf16 stream."""
    variants = []
    for width in (192, 384, 768):
        for stream, branch in ((torch.float32, True), (torch.bfloat16, True), (torch.float32, False)):
            forward_launch = _forward_launch(width, branch, branch)
            backward_launch = _backward_launch(width, branch, branch, branch)
            wide, low = pointer(stream), pointer(torch.bfloat16)
            name = f"{DTYPES[stream]} C{width}"
            sizes = {"num_rows": "i32", "rows_per_sample": "i32", "width": "i32"}
            common = {"mask": "*fp32", "weight": "*fp32", "mean": "*fp32", "rstd": "*fp32", "total": wide} | sizes
            forward = {"x": wide, "branch": low, "bias": "*fp32", "out": low, "eps": "fp32"} | common
            backward = {"grad_out": low, "grad_total": wide, "grad_x": wide, "grad_branch": low} | common
            backward |= {"partial": "*fp32", "chunk": "i32"}
            kind = "add_layer_norm" if branch else "layer_norm"
            both = ("num_rows", "width")
            variants.append(forward_launch.variant(f"{kind}_forward {name}", _add_layer_norm_forward, forward, both))
            variants.append(
                backward_launch.variant(f"{kind}_backward {name}", _add_layer_norm_backward, backward, both)
            )
    return variants

"""Kernels of the residual addition with layer normalisation: a program holds whole rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdeit.kernels.column_sum import column_sum
from fastdeit.kernels.launch import DTYPES, Launch, cdiv, chosen, next_power_of_two, pointer
from fastdeit.kernels.variants import Variant


@triton.jit
def _find(slots, sample, in_rows, samples, rows_per_sample, width):
    """For each row: whether its sample is kept, and how far its values move if only kept samples are stored."""
    slot = tl.load(slots + sample, mask=in_rows, other=-1)
    return (slot >= 0) & (slot < samples), (slot - sample).to(tl.int64) * (rows_per_sample * width)


@triton.jit(do_not_specialize=["branch_samples", "out_samples"])
def _add_layer_norm_forward(
    x,
    branch,
    gamma,
    mask,
    slots,
    only,
    weight,
    bias,
    total,
    out,
    mean,
    rstd,
    num_rows,
    rows_per_sample,
    branch_samples,
    out_samples,
    width,
    eps,
    BRANCH: tl.constexpr,
    SCALE: tl.constexpr,
    MASK: tl.constexpr,
    SLOTS: tl.constexpr,
    ONLY: tl.constexpr,
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
        if SLOTS:
            kept, shift = _find(slots, rows // rows_per_sample, in_rows, branch_samples, rows_per_sample, width)
            moved = (branch + shift)[:, None] + offsets
            branch_value = tl.load(moved, mask=inside & kept[:, None], other=0.0).to(tl.float32)
        else:
            branch_value = tl.load(branch + offsets, mask=inside, other=0.0).to(tl.float32)
        if SCALE:
            branch_value *= tl.load(gamma + columns, mask=in_width, other=0.0).to(tl.float32)[None, :]
        if MASK:
            factor = tl.load(mask + rows // rows_per_sample, mask=in_rows, other=0.0)
            branch_value = branch_value * factor[:, None]
        if not SCALE:
            branch_value = branch_value.to(branch.dtype.element_ty).to(tl.float32)
        # Normalize the sum as it is stored, rounded: that is what the next block reads.
        value = (value + branch_value).to(total.dtype.element_ty)
        tl.store(total + offsets, value, mask=inside)
        value = value.to(tl.float32)
    row_mean = tl.sum(value, axis=1) / width
    centered = tl.where(inside, value - row_mean[:, None], 0.0)
    row_rstd = tl.rsqrt(tl.sum(centered * centered, axis=1) / width + eps)
    scale = tl.load(weight + columns, mask=in_width, other=0.0).to(tl.float32)
    shift = tl.load(bias + columns, mask=in_width, other=0.0).to(tl.float32)
    normalized = centered * row_rstd[:, None] * scale[None, :] + shift[None, :]
    if ONLY:
        kept, shift = _find(only, rows // rows_per_sample, in_rows, out_samples, rows_per_sample, width)
        moved = (out + shift)[:, None] + offsets
        tl.store(moved, normalized.to(out.dtype.element_ty), mask=inside & kept[:, None])
    else:
        tl.store(out + offsets, normalized.to(out.dtype.element_ty), mask=inside)
    tl.store(mean + rows, row_mean, mask=in_rows)
    tl.store(rstd + rows, row_rstd, mask=in_rows)


@triton.jit(do_not_specialize=["branch_samples", "out_samples"])
def _add_layer_norm_backward(
    grad_out,
    grad_total,
    total,
    branch,
    gamma,
    mask,
    slots,
    only,
    weight,
    mean,
    rstd,
    grad_x,
    grad_branch,
    partial,
    num_rows,
    rows_per_sample,
    branch_samples,
    out_samples,
    width,
    chunk,
    BRANCH: tl.constexpr,
    SCALE: tl.constexpr,
    MASK: tl.constexpr,
    SLOTS: tl.constexpr,
    ONLY: tl.constexpr,
    BRANCH_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    # Each program handles `chunk` rows and writes its own partial sums for weight, bias, the branch's bias and gamma.
    columns = tl.arange(0, BLOCK)
    in_width = columns < width
    scale = tl.load(weight + columns, mask=in_width, other=0.0).to(tl.float32)
    grad_weight = tl.zeros((ROWS, BLOCK), tl.float32)
    grad_bias = tl.zeros((ROWS, BLOCK), tl.float32)
    grad_branch_bias = tl.zeros((ROWS, BLOCK), tl.float32)
    if SCALE:
        branch_scale = tl.load(gamma + columns, mask=in_width, other=0.0).to(tl.float32)
        grad_gamma = tl.zeros((ROWS, BLOCK), tl.float32)
    # 64-bit offsets only for the program's first row: within the loop they would cost registers.
    first_row = tl.program_id(0).to(tl.int64) * chunk
    total += first_row * width
    grad_out += first_row * width
    grad_total += first_row * width
    grad_x += first_row * width
    grad_branch += first_row * width
    branch += first_row * width
    mean += first_row
    rstd += first_row
    own_rows = tl.minimum(chunk, num_rows - first_row).to(tl.int32)
    first_sample = (first_row // rows_per_sample).to(tl.int32)
    before = (first_row % rows_per_sample).to(tl.int32)
    for step in tl.range(0, chunk, ROWS, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        rows = step + tl.arange(0, ROWS)
        in_rows = rows < own_rows
        inside = in_rows[:, None] & in_width[None, :]
        offsets = rows[:, None] * width + columns[None, :]
        sample = first_sample + (before + rows) // rows_per_sample
        value = tl.load(total + offsets, mask=inside, other=0.0).to(tl.float32)
        row_mean = tl.load(mean + rows, mask=in_rows, other=0.0)
        row_rstd = tl.load(rstd + rows, mask=in_rows, other=0.0)
        if ONLY:
            kept, shift = _find(only, sample, in_rows, out_samples, rows_per_sample, width)
            moved = (grad_out + shift)[:, None] + offsets
            grad = tl.load(moved, mask=inside & kept[:, None], other=0.0).to(tl.float32)
        else:
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
                factor = tl.load(mask + sample, mask=in_rows, other=0.0)
                to_branch = grad_value * factor[:, None]
            if SLOTS:
                kept, shift = _find(slots, sample, in_rows, branch_samples, rows_per_sample, width)
                if SCALE:
                    moved = (branch + shift)[:, None] + offsets
                    branch_value = tl.load(moved, mask=inside & kept[:, None], other=0.0).to(tl.float32)
                    grad_gamma += to_branch * branch_value
                    to_branch *= branch_scale[None, :]
                moved = (grad_branch + shift)[:, None] + offsets
                tl.store(moved, to_branch.to(grad_branch.dtype.element_ty), mask=inside & kept[:, None])
            else:
                if SCALE:
                    branch_value = tl.load(branch + offsets, mask=inside, other=0.0).to(tl.float32)
                    grad_gamma += to_branch * branch_value
                    to_branch *= branch_scale[None, :]
                tl.store(grad_branch + offsets, to_branch.to(grad_branch.dtype.element_ty), mask=inside)
            if BRANCH_BIAS:
                grad_branch_bias += to_branch
        tl.store(grad_x + offsets, grad_value.to(grad_x.dtype.element_ty), mask=inside)
    offset = tl.program_id(0).to(tl.int64) * (2 + BRANCH_BIAS + SCALE) * width + columns
    tl.store(partial + offset, tl.sum(grad_weight, axis=0), mask=in_width)
    tl.store(partial + offset + width, tl.sum(grad_bias, axis=0), mask=in_width)
    if BRANCH_BIAS:
        tl.store(partial + offset + 2 * width, tl.sum(grad_branch_bias, axis=0), mask=in_width)
    if SCALE:
        tl.store(partial + offset + (2 + BRANCH_BIAS) * width, tl.sum(grad_gamma, axis=0), mask=in_width)


MAX_WIDTH = 4096  # channels that fit the registers of a program with 16 warps


def _forward_launch(width: int, branch: bool, scale: bool, mask: bool, slots: bool, only: bool) -> Launch:
    """16 elements a thread, and at least four warps."""
    block = max(16, next_power_of_two(width))
    constants = (("BRANCH", branch), ("SCALE", scale), ("MASK", mask), ("SLOTS", slots), ("ONLY", only))
    constants += (("ROWS", max(1, 2048 // block)), ("BLOCK", block))
    return Launch(constants=constants, num_warps=max(4, min(16, block // 512)))


def _backward_launch(
    width: int, branch: bool, scale: bool, mask: bool, slots: bool, only: bool, branch_bias: bool
) -> Launch:
    """8 or 16 elements a thread; tuned on an H200."""
    block = max(16, next_power_of_two(width))
    warps = 2 if block <= 512 else min(16, block // 256)
    constants = (("BRANCH", branch), ("SCALE", scale), ("MASK", mask), ("SLOTS", slots), ("ONLY", only))
    constants += (("BRANCH_BIAS", branch_bias),)
    # Few programs share a multiprocessor, so prefetch the next rows while one is computed.
    constants += (("ROWS", max(1, 1024 // block)), ("BLOCK", block), ("STAGES", 3))
    return Launch(constants=constants, num_warps=warps)


# Programs of the backward pass: four for each multiprocessor of an H200. More would make more partial sums.
_PROGRAMS = 528


def _rows_per_sample(x: Tensor) -> int:
    return x.numel() // (len(x) * x.shape[-1])


def forward(
    x: Tensor,
    branch: Tensor | None,
    scale: Tensor | None,
    mask: Tensor | None,
    slots: Tensor | None,
    only: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    outputs: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    """Write sum, normalised rows, means and inverse deviations to `outputs`; `x` is not empty."""
    total, out, mean, rstd = outputs
    width = x.shape[-1]
    rows = x.numel() // width
    mode = scale is not None, mask is not None, slots is not None, only is not None
    default = _forward_launch(width, branch is not None, *mode)
    launch = chosen("add_layer_norm_forward", default)
    x = x.contiguous()
    _add_layer_norm_forward[(cdiv(rows, dict(launch.constants)["ROWS"]),)](
        x,
        x if branch is None else branch.contiguous(),
        x if scale is None else scale.contiguous(),
        x if mask is None else mask.contiguous(),
        x if slots is None else slots.contiguous(),
        x if only is None else only.contiguous(),
        weight.contiguous(),
        bias.contiguous(),
        total,
        out,
        mean,
        rstd,
        rows,
        _rows_per_sample(x),
        0 if branch is None else len(branch),
        len(out),
        width,
        eps,
        **launch.options(),
    )


def backward(
    grad_out: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    branch: Tensor | None,
    scale: Tensor | None,
    mask: Tensor | None,
    slots: Tensor | None,
    only: Tensor | None,
    branch_samples: int,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    outputs: tuple[Tensor, Tensor, Tensor],
    added: bool,
    sum_branch: bool,
) -> None:
    """Write the gradients of the stream and of the branch, and the sums over all rows, to `outputs`.

    added       whether a branch was added
    sum_branch  whether the branch's bias gets its gradient
    """
    grad_x, grad_branch, sums = outputs
    width = total.shape[-1]
    rows = total.numel() // width
    mode = scale is not None, mask is not None, slots is not None, only is not None
    default = _backward_launch(width, added, *mode, sum_branch)
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
        total if branch is None else branch.contiguous(),
        mean if scale is None else scale.contiguous(),
        mean if mask is None else mask.contiguous(),
        mean if slots is None else slots.contiguous(),
        mean if only is None else only.contiguous(),
        weight.contiguous(),
        mean,
        rstd,
        grad_x,
        grad_branch,
        partial,
        rows,
        _rows_per_sample(total),
        branch_samples,
        len(grad_out),
        width,
        chunk,
        **launch.options(),
    )
    if programs > 1:
        column_sum(partial, sums)


def variants() -> list[Variant]:
    """The launches for DeiT-Ti, S and B, and for DeiT III S, B, L and H; bf16 branch, float32 or bf16 stream.

    They are without a branch, with one, with one that holds only the samples that stochastic depth keeps ("kept"), and
    with LayerScale ("scaled").
    """
    plain, added = ("layer_norm", False, False, False), ("add_layer_norm", True, False, False)
    kept, scaled = ("add_layer_norm_kept", True, False, True), ("add_layer_norm_scaled", True, True, False)
    cases = [
        (width, stream, form)
        for width in (192, 384, 768)
        for stream, form in (
            (torch.float32, added),
            (torch.bfloat16, added),
            (torch.float32, plain),
            (torch.float32, kept),
        )
    ]
    cases += [(width, torch.float32, scaled) for width in (384, 768, 1024, 1280)]
    return [variant for case in cases for variant in _variants(*case)]


def _variants(width: int, stream: torch.dtype, form: tuple[str, bool, bool, bool]) -> tuple[Variant, Variant]:
    kind, branch, scale, kept = form
    wide, low, full = pointer(stream), pointer(torch.bfloat16), pointer(torch.float32)
    name = f"{DTYPES[stream]} C{width}"
    common = dict.fromkeys(("num_rows", "rows_per_sample", "branch_samples", "out_samples", "width"), "i32")
    common |= dict.fromkeys(("gamma", "mask", "weight", "mean", "rstd"), full)
    common |= {"branch": low, "slots": "*i32", "only": "*i32", "total": wide}
    forward = {"x": wide, "bias": full, "out": low, "eps": "fp32"} | common
    backward = {"grad_out": low, "grad_total": wide, "grad_x": wide, "grad_branch": low, "partial": full} | common
    backward |= {"chunk": "i32"}
    mode, multiples = (width, branch, scale, branch, kept, kept), ("num_rows", "width")
    return (
        _forward_launch(*mode).variant(f"{kind}_forward {name}", _add_layer_norm_forward, forward, multiples),
        _backward_launch(*mode, branch).variant(
            f"{kind}_backward {name}", _add_layer_norm_backward, backward, multiples
        ),
    )

"""Stochastic depth, residual addition and layer normalisation in one pass over the tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdeit.kernels.launch import check, check_dtype, operator
from fastdeit.kernels.layer_norm_rows import MAX_WIDTH, backward, forward
from fastdeit.kernels.reference import Kept


@operator("fastdeit::add_layer_norm")
def _op(
    x: Tensor,
    branch: Tensor | None,
    branch_bias: Tensor | None,
    scale: Tensor | None,
    mask: Tensor | None,
    slots: Tensor | None,
    only: Tensor | None,
    out_samples: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs = _fake(x, branch, branch_bias, scale, mask, slots, only, out_samples, weight, bias, eps, dtype)
    if x.numel():
        forward(x, branch, scale, mask, slots, only, weight, bias, eps, outputs)
    return outputs


@_op.register_fake
def _fake(x, branch, branch_bias, scale, mask, slots, only, out_samples, weight, bias, eps, dtype):
    # Without a branch the sum is `x`, and an operator may not return its argument.
    kind = x.dtype if branch is None else torch.promote_types(x.dtype, branch.dtype)
    total = x.new_empty(x.shape if branch is not None else (0,), dtype=kind)
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    return total, x.new_empty((out_samples, *x.shape[1:]), dtype=dtype), mean, rstd


@operator("fastdeit::add_layer_norm_backward")
def _backward_op(
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
    x_dtype: torch.dtype,
    branch_dtype: torch.dtype | None,
    sum_branch: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    kept, dtypes = (slots, only, branch_samples), (x_dtype, branch_dtype, sum_branch)
    outputs = _backward_fake(grad_out, grad_total, total, branch, scale, mask, *kept, weight, mean, rstd, *dtypes)
    if total.numel():
        added = branch_dtype is not None
        backward(
            grad_out, grad_total, total, branch, scale, mask, *kept, weight, mean, rstd, outputs, added, sum_branch
        )
    else:
        outputs[2].zero_()
    return outputs


@_backward_op.register_fake
def _backward_fake(
    grad_out,
    grad_total,
    total,
    branch,
    scale,
    mask,
    slots,
    only,
    branch_samples,
    weight,
    mean,
    rstd,
    x_dtype,
    branch_dtype,
    sum_branch,
):
    grad_x = total.new_empty(total.shape, dtype=x_dtype)
    shape = (branch_samples, *total.shape[1:]) if branch_dtype is not None else (0,)
    grad_branch = total.new_empty(shape, dtype=branch_dtype)
    sums = total.new_empty((2 + sum_branch + (scale is not None), total.shape[-1]), dtype=torch.float32)
    return grad_x, grad_branch, sums


def _setup(ctx, inputs, output) -> None:
    x, branch, branch_bias, scale, mask, slots, only, _, weight, bias, _, _ = inputs
    total, _, mean, rstd = output
    # Only the gradient of `scale` needs the branch.
    scaled = None if scale is None else branch
    ctx.save_for_backward(x if branch is None else total, scaled, scale, mask, slots, only, weight, mean, rstd)
    ctx.dtypes = [None if t is None else t.dtype for t in (x, branch, branch_bias, scale, weight, bias)]
    ctx.branch_samples = 0 if branch is None else len(branch)


def _autograd(ctx, grad_total, grad_out, *_):
    total, scaled, scale, mask, slots, only, weight, mean, rstd = ctx.saved_tensors
    x_dtype, branch_dtype, branch_bias_dtype, scale_dtype, weight_dtype, bias_dtype = ctx.dtypes
    sum_branch = branch_bias_dtype is not None
    if branch_dtype is None:
        grad_total = None
    kept = slots, only, ctx.branch_samples
    grad_x, grad_branch, sums = _backward_op(
        grad_out, grad_total, total, scaled, scale, mask, *kept, weight, mean, rstd, x_dtype, branch_dtype, sum_branch
    )
    branch = None if branch_dtype is None else grad_branch
    branch_bias = sums[2].to(branch_bias_dtype) if sum_branch else None
    gamma = None if scale_dtype is None else sums[-1].to(scale_dtype)
    weight, bias = sums[0].to(weight_dtype), sums[1].to(bias_dtype)
    return grad_x, branch, branch_bias, gamma, None, None, None, None, weight, bias, None, None


_op.register_autograd(_autograd, setup_context=_setup)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-6,
    *,
    only: Kept | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Layer normalisation over the last dimension.

    x             (B, ..., C), C at most `MAX_WIDTH`
    weight, bias  (C,)
    only          normalise only these samples, so that the result is (count, ..., C); None: all
    dtype         of the result, e.g. the dtype of the GEMM that reads it; None: the dtype of `x`

    All are float32, float16 or bfloat16; the arithmetic is float32. The gradients of weight and bias are summed in
    float32 in a fixed order. Raises ValueError for mismatched shapes and without a GPU. Source: Ba et al.,
    arXiv 1607.06450.
    """
    return _call(x, None, None, None, None, only, weight, bias, eps, dtype or x.dtype)[1]


def add_layer_norm(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-6,
    *,
    scale: Tensor | None = None,
    mask: Tensor | Kept | None = None,
    only: Kept | None = None,
    branch_bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Add a branch to the residual stream and normalise the sum, as after each half of a block.

    x       (B, ..., C) the residual stream
    branch  (B, ..., C) the output of attention or the MLP; (count, ..., C) if `mask` is a `Kept`
    scale   (C,) LayerScale's factor of each channel of the branch, or None (Touvron et al., arXiv 2103.17239)
    mask    (B,) float32 factors of stochastic depth, one a sample: 0 or 1 / keep probability; a `Kept` if `branch`
            holds only the kept samples; or None
    only    normalise only these samples, those of the next branch, so that the result is (count, ..., C); None: all
    branch_bias  (C,) a bias that `branch` already contains, detached, or None. It changes no result: it only receives
            its gradient, the sum of the branch's gradient over all rows, from the pass that computes the latter
    dtype   of the normalised result; None: the dtype of the sum

    Returns (x + mask * scale * branch, its normalisation). The sum has the wider dtype of `x` and `branch`. Without
    `scale` the masked branch is first rounded to the branch's dtype, as in `fastdeit.model.drop_path.DropPath`; with
    it only the sum is rounded, as PyTorch does for a float32 `scale`. No gradient reaches the mask; that of `scale` is
    summed like the weight's. Other arguments and errors: see `layer_norm`.
    """
    dtype = dtype or torch.promote_types(x.dtype, branch.dtype)
    return _call(x, branch, branch_bias, scale, mask, only, weight, bias, eps, dtype)


def _call(
    x: Tensor,
    branch: Tensor | None,
    branch_bias: Tensor | None,
    scale: Tensor | None,
    mask: Tensor | Kept | None,
    only: Kept | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    slots = None
    shape = x.shape
    if isinstance(mask, Kept):
        shape, slots, mask = (mask.count, *x.shape[1:]), mask.slots, mask.mask
    if mask is not None and (mask.shape != x.shape[:1] or mask.dtype != torch.float32):
        raise ValueError(
            f"add_layer_norm: mask is {tuple(mask.shape)} {mask.dtype}: "
            f"give a float32 factor for each of {len(x)} samples"
        )
    for own in (slots, None if only is None else only.slots):
        if own is not None and (own.shape != x.shape[:1] or own.dtype != torch.int32 or own.device != x.device):
            raise ValueError(
                f"layer_norm: slots are {tuple(own.shape)} {own.dtype} on {own.device}: "
                f"give an int32 for each of {len(x)} samples on {x.device}"
            )
    tensors = {"x": x, "branch": branch, "branch_bias": branch_bias, "scale": scale, "mask": mask}
    check("layer_norm", **tensors, weight=weight, bias=bias)
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
    if branch is not None and branch.shape != shape:
        raise ValueError(f"add_layer_norm: branch is {tuple(branch.shape)}, not {tuple(shape)} as x and mask require")
    for name, own in (("branch_bias", branch_bias), ("scale", scale)):
        if own is not None and own.shape != x.shape[-1:]:
            raise ValueError(f"add_layer_norm: {name} is {tuple(own.shape)}: give it ({x.shape[-1]},)")
    places, samples = (None, len(x)) if only is None else (only.slots, only.count)
    total, out, _, _ = _op(x, branch, branch_bias, scale, mask, slots, places, samples, weight, bias, eps, dtype)
    return total, out

"""Assemble patch embeddings, class token, distillation token and positions into one sequence, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdeit.kernels.column_sum import column_sum
from fastdeit.kernels.launch import DTYPES, Launch, cdiv, check, check_dtype, chosen, operator, pointer
from fastdeit.kernels.variants import Variant


@triton.jit
def _assemble_tokens_forward(
    patches,
    bias,
    cls_token,
    dist_token,
    pos_embed,
    out,
    stride_b,
    stride_p,
    stride_c,
    num_tokens,
    embed_dim,
    PREFIX: tl.constexpr,
    POSITIONED: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < embed_dim
    inside = (n < num_tokens)[:, None] & in_c[None, :]
    is_patch = inside & (n >= PREFIX)[:, None]
    rows = (n - PREFIX)[:, None] * stride_p + c[None, :] * stride_c
    value = tl.load(patches + sample * stride_b + rows, mask=is_patch, other=0.0).to(tl.float32)
    if BIAS:
        bias_row = tl.load(bias + c, mask=in_c, other=0.0).to(tl.float32)
        value = tl.where(is_patch, value + bias_row[None, :], value)
    cls_row = tl.load(cls_token + c, mask=in_c, other=0.0).to(tl.float32)
    value = tl.where((n == 0)[:, None], cls_row[None, :], value)
    if PREFIX > 1:
        is_other = inside & ((n >= 1) & (n < PREFIX))[:, None]
        others = tl.load(dist_token + (n - 1)[:, None] * embed_dim + c[None, :], mask=is_other, other=0.0)
        value = tl.where(is_other, others.to(tl.float32), value)
    offsets = n[:, None] * embed_dim + c[None, :]
    if POSITIONED:
        value += tl.load(pos_embed + offsets, mask=inside, other=0.0).to(tl.float32)
    else:
        value += tl.load(pos_embed + offsets - PREFIX * embed_dim, mask=is_patch, other=0.0).to(tl.float32)
    tl.store(out + sample * num_tokens * embed_dim + offsets, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _assemble_tokens_backward(
    grad,
    grad_patches,
    partial,
    batch,
    chunk,
    num_tokens,
    embed_dim,
    PREFIX: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # Each program owns some channels of one token in `chunk` samples, so no two add to the same sum.
    n = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    split = tl.program_id(2)
    in_c = c < embed_dim
    total = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
    end = tl.minimum(batch, (split + 1) * chunk)
    for start in range(split * chunk, end, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B)
        inside = (b < end)[:, None] & in_c[None, :]
        sample = b.to(tl.int64)[:, None]
        value = tl.load(grad + (sample * num_tokens + n) * embed_dim + c[None, :], mask=inside, other=0.0)
        total += value.to(tl.float32)
        if n >= PREFIX:
            offset = (sample * (num_tokens - PREFIX) + n - PREFIX) * embed_dim + c[None, :]
            tl.store(grad_patches + offset, value.to(grad_patches.dtype.element_ty), mask=inside)
    offset = (split.to(tl.int64) * num_tokens + n) * embed_dim + c
    tl.store(partial + offset, tl.sum(total, axis=0), mask=in_c)


def _block_c(embed_dim: int) -> int:
    """Channels of a tile: the widest power of two that divides the embedding, so no lane idles; at least 64."""
    return max(64, min(256, embed_dim & -embed_dim))


def _forward_launch(embed_dim: int, prefix: int, positioned: bool, bias: bool) -> Launch:
    block_c = _block_c(embed_dim)
    constants = (("PREFIX", prefix), ("POSITIONED", positioned), ("BIAS", bias))
    constants += (("BLOCK_N", 2048 // block_c), ("BLOCK_C", block_c))
    return Launch(constants=constants, num_warps=4)


def _backward_launch(embed_dim: int, prefix: int) -> Launch:
    block_c = _block_c(embed_dim)
    constants = (("PREFIX", prefix), ("BLOCK_B", 2048 // block_c), ("BLOCK_C", block_c))
    return Launch(constants=constants, num_warps=4)


_SAMPLES_PER_SPLIT = 64


def _prefix(dist_token: Tensor | None) -> int:
    return 1 if dist_token is None else 1 + dist_token.shape[1]


@operator("fastdeit::assemble_tokens")
def _op(
    patches: Tensor,
    bias: Tensor | None,
    cls_token: Tensor,
    dist_token: Tensor | None,
    pos_embed: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    batch, count, width = patches.shape
    prefix = _prefix(dist_token)
    out = _fake(patches, bias, cls_token, dist_token, pos_embed, dtype)
    launch = chosen(
        "assemble_tokens_forward", _forward_launch(width, prefix, pos_embed.shape[1] > count, bias is not None)
    )
    blocks = dict(launch.constants)
    if out.numel():
        _assemble_tokens_forward[(batch, cdiv(count + prefix, blocks["BLOCK_N"]), cdiv(width, blocks["BLOCK_C"]))](
            patches,
            cls_token if bias is None else bias.contiguous(),
            cls_token.contiguous(),
            (cls_token if dist_token is None else dist_token).contiguous(),
            pos_embed.contiguous(),
            out,
            patches.stride(0),
            patches.stride(1),
            patches.stride(2),
            count + prefix,
            width,
            **launch.options(),
        )
    return out


@_op.register_fake
def _fake(patches, bias, cls_token, dist_token, pos_embed, dtype):
    batch, count, width = patches.shape
    return patches.new_empty((batch, count + _prefix(dist_token), width), dtype=dtype)


@operator("fastdeit::assemble_tokens_backward")
def _backward_op(grad: Tensor, prefix: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    batch, tokens, width = grad.shape
    grad_patches, total = _backward_fake(grad, prefix, dtype)
    if not grad.numel():
        return grad_patches, total.zero_()
    splits = cdiv(batch, _SAMPLES_PER_SPLIT)
    partial = total[None] if splits == 1 else grad.new_empty((splits, tokens, width), dtype=torch.float32)
    launch = chosen("assemble_tokens_backward", _backward_launch(width, prefix))
    _assemble_tokens_backward[(tokens, cdiv(width, dict(launch.constants)["BLOCK_C"]), splits)](
        grad.contiguous(),
        grad_patches,
        partial,
        batch,
        cdiv(batch, splits),
        tokens,
        width,
        **launch.options(),
    )
    if splits > 1:
        column_sum(partial, total)
    return grad_patches, total


@_backward_op.register_fake
def _backward_fake(grad: Tensor, prefix: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    batch, tokens, width = grad.shape
    grad_patches = grad.new_empty((batch, tokens - prefix, width), dtype=dtype)
    return grad_patches, grad.new_empty((tokens, width), dtype=torch.float32)


def _setup(ctx, inputs, output) -> None:
    patches, bias, cls_token, dist_token, pos_embed, _ = inputs
    ctx.prefix, ctx.positions = _prefix(dist_token), pos_embed.shape[1]
    ctx.dtypes = [None if t is None else t.dtype for t in (patches, bias, cls_token, dist_token, pos_embed)]


def _autograd(ctx, grad):
    patches_dtype, bias_dtype, cls_dtype, dist_dtype, pos_dtype = ctx.dtypes
    grad_patches, total = _backward_op(grad, ctx.prefix, patches_dtype)
    # Copies: autograd keeps these tensors as `.grad` and adds to them in place, so no two may share memory.
    return (
        grad_patches,
        None if bias_dtype is None else total[ctx.prefix :].sum(0).to(bias_dtype),
        total[None, :1].to(cls_dtype, copy=True),
        None if dist_dtype is None else total[None, 1 : ctx.prefix].to(dist_dtype, copy=True),
        total[None, len(total) - ctx.positions :].to(pos_dtype),
        None,
    )


_op.register_autograd(_autograd, setup_context=_setup)


def assemble_tokens(
    patches: Tensor,
    cls_token: Tensor,
    dist_token: Tensor | None,
    pos_embed: Tensor,
    bias: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Prepend the class token and the optional distillation token to the patches; add the positions.

    patches     (B, P, C), any strides, such as a convolution's output flattened and transposed
    cls_token   (1, 1, C)
    dist_token  (1, R, C) or None: the distillation token, R = 1, or register tokens (Darcet et al., arXiv 2309.16588)
    pos_embed   (1, N, C), N = P + 1 + R: rows in the order class, distillation, patches. Or (1, P, C): only patches
                have a position, as in DeiT III (arXiv 2204.07118)
    bias        (C,) of the patch projection, if `patches` lack it, or None
    dtype       of the result; None: the wider one of `patches` and `pos_embed`

    All are float32, float16 or bfloat16; the sums are float32. Returns (B, P + 1 + R, C), contiguous. The gradients of
    tokens, positions and bias are summed over the batch in float32 in a fixed order. Raises ValueError for mismatched
    shapes, another dtype and without a GPU. Source: Touvron et al., arXiv 2012.12877, section 4, "distillation token".
    """
    check(
        "assemble_tokens",
        patches=patches,
        cls_token=cls_token,
        dist_token=dist_token,
        pos_embed=pos_embed,
        bias=bias,
    )
    if patches.ndim != 3:
        raise ValueError(f"patches are {tuple(patches.shape)}: give (batch, patches, channels)")
    _, count, width = patches.shape
    others = 1 if dist_token is None or dist_token.ndim != 3 else max(1, dist_token.shape[1])
    rows = count if pos_embed.shape[1:2] == (count,) else count + (0 if dist_token is None else others) + 1
    for name, tensor, shape in (
        ("cls_token", cls_token, (1, 1, width)),
        ("dist_token", dist_token, (1, others, width)),
        ("bias", bias, (width,)),
        ("pos_embed", pos_embed, (1, rows, width)),
    ):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, and patches of {tuple(patches.shape)} need {shape}")
    dtype = dtype or torch.promote_types(patches.dtype, pos_embed.dtype)
    check_dtype("assemble_tokens", "dtype", dtype)
    return _op(patches, bias, cls_token, dist_token, pos_embed, dtype)


def embed_patches(
    pixels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cls_token: Tensor,
    dist_token: Tensor | None,
    pos_embed: Tensor,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Embed images that are already laid out in patches: one GEMM and `assemble_tokens`.

    pixels  (B, P, 3 S S): patches of S x S pixels in row order, each channel by channel
    weight  (C, 3, S, S), bias  (C,) or None: of the patch embedding's convolution

    Other arguments, result and errors: see `assemble_tokens`.
    """
    if pixels.ndim != 3 or pixels.shape[-1] != weight[0].numel():
        raise ValueError(
            f"pixels are {tuple(pixels.shape)}, and a projection of {tuple(weight.shape)} needs (batch, patches, "
            f"{weight[0].numel()}): lay images out with fastdeit.kernels.reference.as_patches"
        )
    patches = torch.nn.functional.linear(pixels, weight.flatten(1))
    return assemble_tokens(patches, cls_token, dist_token, pos_embed, bias, dtype=dtype)


def variants() -> list[Variant]:
    """The launches for DeiT-Ti, S and B with a distillation token: bf16 patches, float32 or bf16 sequence."""
    variants = []
    for width in (192, 384, 768):
        for dtype in (torch.float32, torch.bfloat16):
            forward, backward = _forward_launch(width, 2, True, True), _backward_launch(width, 2)
            sequence, name = pointer(dtype), f"{DTYPES[dtype]} C{width}"
            parameters = dict.fromkeys(("bias", "cls_token", "dist_token", "pos_embed", "out"), sequence)
            variants.append(
                forward.variant(
                    f"assemble_tokens_forward {name}",
                    _assemble_tokens_forward,
                    {"patches": "*bf16", **parameters}
                    | {"stride_b": "i32", "stride_p": "i32", "num_tokens": "i32", "embed_dim": "i32"},
                    ("stride_b", "stride_p", "embed_dim"),
                    stride_c=1,
                )
            )
            variants.append(
                backward.variant(
                    f"assemble_tokens_backward {name}",
                    _assemble_tokens_backward,
                    {"grad": sequence, "grad_patches": "*bf16", "partial": "*fp32"}
                    | {"batch": "i32", "chunk": "i32", "num_tokens": "i32", "embed_dim": "i32"},
                    ("batch", "chunk", "embed_dim"),
                )
            )
    return variants

"""Attention on the packed queries, keys and values of a ViT block."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdeit.kernels.attention_backward import backward
from fastdeit.kernels.attention_forward import forward
from fastdeit.kernels.launch import check, operator


@operator("fastdeit::attention")
def _op(qkv: Tensor, bias: Tensor | None, rows: int) -> tuple[Tensor, Tensor]:
    return forward(qkv, rows)


@_op.register_fake
def _fake(qkv: Tensor, bias: Tensor | None, rows: int) -> tuple[Tensor, Tensor]:
    batch, _, _, heads, head_dim = qkv.shape
    out = qkv.new_empty((batch, rows, heads * head_dim))
    return out, qkv.new_empty((batch, heads, rows), dtype=torch.float32)


@operator("fastdeit::attention_backward")
def _backward_op(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    return backward(grad, qkv, out, lse, bias)


@_backward_op.register_fake
def _backward_fake(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    return qkv.new_empty(qkv.shape), qkv.new_empty(3 * grad.shape[2] if bias else 0, dtype=torch.float32)


def _setup(ctx, inputs, output) -> None:
    qkv, bias, _ = inputs
    ctx.save_for_backward(qkv, *output)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _autograd(ctx, grad, _):
    grad_qkv, sums = _backward_op(grad, *ctx.saved_tensors, ctx.bias_dtype is not None)
    return grad_qkv, None if ctx.bias_dtype is None else sums.to(ctx.bias_dtype), None


_op.register_autograd(_autograd, setup_context=_setup)


def attention(qkv: Tensor, *, bias: Tensor | None = None, rows: int | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v for every head, without mask or dropout.

    qkv   (B, N, 3, H, D) float32, float16 or bfloat16, D up to 128: a view of what timm's `qkv` layer
          returns. Any strides; copied if the channels of a head are not contiguous
    bias  (3 H D,) the bias that `qkv` already contains, detached, or None. It changes no result: it only receives its
          gradient, from the same pass. The part of the keys gets exactly 0, since it adds the same to all scores of a
          query
    rows  compute the output of the first tokens only, which attend to all N: those that the heads read. None: all

    Returns (B, rows, H D), contiguous, in the dtype of `qkv`: what timm's `proj` layer takes. Sums are float32; float32
    products do not use TF32. The gradient is packed like `qkv` and bit-reproducible: no atomic additions. Raises
    ValueError for another shape or dtype and without a GPU. Source: Vaswani et al., arXiv 1706.03762, section 3.2.1;
    the backward pass recomputes the softmax from its log-sum-exp, as in Dao, arXiv 2307.08691, section 3.1.
    """
    if qkv.ndim != 5 or qkv.shape[2] != 3 or not 0 < qkv.shape[4] <= 128:
        raise ValueError(f"qkv is {tuple(qkv.shape)}: give (batch, tokens, 3, heads, head dim of at most 128)")
    tokens, channels = qkv.shape[1], 3 * qkv.shape[3] * qkv.shape[4]
    if rows is not None and not 0 < rows <= tokens:
        raise ValueError(f"attention: rows is {rows}: give a number from 1 to the {tokens} tokens of qkv")
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"attention: bias is {tuple(bias.shape)}, and qkv {tuple(qkv.shape)} needs ({channels},)")
    check("attention", qkv=qkv, bias=bias)
    return _op(qkv if qkv.stride(-1) == 1 else qkv.contiguous(), bias, tokens if rows is None else rows)[0]

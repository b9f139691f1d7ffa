"""Attention on the packed queries, keys and values of a ViT block."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdeit.kernels.attention_backward import backward
from fastdeit.kernels.attention_forward import forward
from fastdeit.kernels.launch import check, operator


@operator("fastdeit::attention")
def _op(qkv: Tensor) -> tuple[Tensor, Tensor]:
    return forward(qkv)


@_op.register_fake
def _fake(qkv: Tensor) -> tuple[Tensor, Tensor]:
    batch, tokens, _, heads, head_dim = qkv.shape
    out = qkv.new_empty((batch, tokens, heads * head_dim))
    return out, qkv.new_empty((batch, heads, tokens), dtype=torch.float32)


@operator("fastdeit::attention_backward")
def _backward_op(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    return backward(grad, qkv, out, lse)


@_backward_op.register_fake
def _backward_fake(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[0], *output)


def _autograd(ctx, grad, _):
    return _backward_op(grad, *ctx.saved_tensors)


_op.register_autograd(_autograd, setup_context=_setup)


def attention(qkv: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v for every head, without mask or dropout.

    qkv  (B, N, 3, H, D) float32, float16 or bfloat16, D up to 128: a view of what timm's `qkv` layer
         returns. Any strides; copied if the channels of a head are not contiguous

    Returns (B, N, H D), contiguous, in the dtype of `qkv`: what timm's `proj` layer takes. Sums are float32; float32
    products do not use TF32. The gradient is packed like `qkv` and bit-reproducible: no atomic additions. Raises
    ValueError for another shape or dtype and without a GPU. Source: Vaswani et al., arXiv 1706.03762, section 3.2.1;
    the backward pass recomputes the softmax from its log-sum-exp, as in Dao, arXiv 2307.08691, section 3.1.
    """
    if qkv.ndim != 5 or qkv.shape[2] != 3 or not 0 < qkv.shape[4] <= 128:
        raise ValueError(f"qkv is {tuple(qkv.shape)}: give (batch, tokens, 3, heads, head dim of at most 128)")
    check("attention", qkv=qkv)
    return _op(qkv if qkv.stride(-1) == 1 else qkv.contiguous())[0]

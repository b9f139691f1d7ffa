"""Attention backward pass. No two programs add to the same gradient, so it is reproducible."""

# Triton annotates the result of a reduction as a union of every possible type.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdeit.kernels.attention_forward import (
    SHAPES,
    SIZES,
    STRIDES,
    attention_scale,
    load_columns,
    load_rows,
    precision,
)
from fastdeit.kernels.launch import DTYPES, Launch, cdiv, chosen, next_power_of_two, pointer
from fastdeit.kernels.variants import Variant


@triton.jit
def _store_rows(base, start, stride, num_rows, head_dim, value, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows = start + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = (rows < num_rows)[:, None] & (columns < head_dim)[None, :]
    tl.store(base + rows[:, None] * stride + columns[None, :], value.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _attention_backward_queries(
    qkv,
    out,
    lse,
    grad,
    delta,
    grad_qkv,
    stride_b,
    stride_n,
    stride_3,
    stride_h,
    num_heads,
    num_tokens,
    head_dim,
    scale,
    softmax_scale,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Gradient of a tile of queries. Also stores each query's delta, sum(output * gradient), for the other kernel.
    blocks = tl.cdiv(num_tokens, QUERIES)
    start = tl.program_id(0) % blocks * QUERIES
    batch_head = (tl.program_id(0) // blocks).to(tl.int64)
    sample = batch_head // num_heads
    head = batch_head % num_heads
    width = num_heads * head_dim
    q_base = qkv + sample * stride_b + head * stride_h
    k_base = q_base + stride_3
    v_base = k_base + stride_3
    own = sample * num_tokens * width + head * head_dim
    rows = start + tl.arange(0, QUERIES)
    inside = rows < num_tokens
    q = load_rows(q_base, start, stride_n, num_tokens, head_dim, QUERIES, COLUMNS)
    g = load_rows(grad + own, start, width, num_tokens, head_dim, QUERIES, COLUMNS)
    o = load_rows(out + own, start, width, num_tokens, head_dim, QUERIES, COLUMNS)
    own_delta = tl.sum(o.to(tl.float32) * g.to(tl.float32), axis=1)
    tl.store(delta + batch_head * num_tokens + rows, own_delta, mask=inside)
    own_lse = tl.load(lse + batch_head * num_tokens + rows, mask=inside, other=0.0)
    grad_q = tl.zeros((QUERIES, COLUMNS), tl.float32)
    for first in range(0, num_tokens, KEYS):
        k_t = load_columns(k_base, first, stride_n, num_tokens, head_dim, KEYS, COLUMNS)
        v_t = load_columns(v_base, first, stride_n, num_tokens, head_dim, KEYS, COLUMNS)
        p = tl.exp2(tl.dot(q, k_t, input_precision=PRECISION) * scale - own_lse[:, None])
        p = tl.where((first + tl.arange(0, KEYS) < num_tokens)[None, :], p, 0.0)
        grad_p = tl.dot(g, v_t, input_precision=PRECISION)
        grad_s = (p * (grad_p - own_delta[:, None])).to(q.dtype)
        grad_q = tl.dot(grad_s, tl.trans(k_t), grad_q, input_precision=PRECISION)
    to = grad_qkv + 3 * sample * num_tokens * width + head * head_dim
    _store_rows(to, start, 3 * width, num_tokens, head_dim, grad_q * softmax_scale, QUERIES, COLUMNS)


@triton.jit
def _attention_backward_keys(
    qkv,
    lse,
    grad,
    delta,
    grad_qkv,
    stride_b,
    stride_n,
    stride_3,
    stride_h,
    num_heads,
    num_tokens,
    head_dim,
    scale,
    softmax_scale,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Gradients of a tile of keys and values.
    blocks = tl.cdiv(num_tokens, KEYS)
    first = tl.program_id(0) % blocks * KEYS
    batch_head = (tl.program_id(0) // blocks).to(tl.int64)
    sample = batch_head // num_heads
    head = batch_head % num_heads
    width = num_heads * head_dim
    q_base = qkv + sample * stride_b + head * stride_h
    k_base = q_base + stride_3
    v_base = k_base + stride_3
    grad += sample * num_tokens * width + head * head_dim
    k = load_rows(k_base, first, stride_n, num_tokens, head_dim, KEYS, COLUMNS)
    v = load_rows(v_base, first, stride_n, num_tokens, head_dim, KEYS, COLUMNS)
    in_keys = (first + tl.arange(0, KEYS) < num_tokens)[:, None]
    grad_k = tl.zeros((KEYS, COLUMNS), tl.float32)
    grad_v = tl.zeros((KEYS, COLUMNS), tl.float32)
    for start in range(0, num_tokens, QUERIES):
        rows = start + tl.arange(0, QUERIES)
        inside = rows < num_tokens
        q_t = load_columns(q_base, start, stride_n, num_tokens, head_dim, QUERIES, COLUMNS)
        g = load_rows(grad, start, width, num_tokens, head_dim, QUERIES, COLUMNS)
        own_lse = tl.load(lse + batch_head * num_tokens + rows, mask=inside, other=0.0)
        own_delta = tl.load(delta + batch_head * num_tokens + rows, mask=inside, other=0.0)
        p_t = tl.exp2(tl.dot(k, q_t, input_precision=PRECISION) * scale - own_lse[None, :])
        p_t = tl.where(in_keys, p_t, 0.0)
        grad_v = tl.dot(p_t.to(g.dtype), g, grad_v, input_precision=PRECISION)
        grad_p_t = tl.dot(v, tl.trans(g), input_precision=PRECISION)
        grad_s_t = (p_t * (grad_p_t - own_delta[None, :])).to(k.dtype)
        grad_k = tl.dot(grad_s_t, tl.trans(q_t), grad_k, input_precision=PRECISION)
    to = grad_qkv + 3 * sample * num_tokens * width + head * head_dim
    _store_rows(to + width, first, 3 * width, num_tokens, head_dim, grad_k * softmax_scale, KEYS, COLUMNS)
    _store_rows(to + 2 * width, first, 3 * width, num_tokens, head_dim, grad_v, KEYS, COLUMNS)


def _launches(head_dim: int, dtype: torch.dtype) -> tuple[Launch, Launch]:
    """Launches of the query and the key kernel; tuned on an H100 for 16-bit dtypes and 64 channels."""
    columns = max(16, next_power_of_two(head_dim))
    common = (("COLUMNS", columns), ("PRECISION", precision(dtype)))
    if dtype is torch.float32 or columns > 64:
        own = 32 if dtype is torch.float32 else 64
        return (
            Launch(constants=(("QUERIES", own), ("KEYS", 32), *common), num_warps=8),
            Launch(constants=(("QUERIES", 32), ("KEYS", own), *common), num_warps=8),
        )
    return (
        Launch(constants=(("QUERIES", 64), ("KEYS", 32), *common), num_warps=4, num_stages=3),
        Launch(constants=(("QUERIES", 32), ("KEYS", 64), *common), num_warps=4, num_stages=3),
    )


def backward(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    """The packed gradient of qkv, contiguous; `grad` is the gradient of `out`, `out` and `lse` come from `forward`."""
    batch, tokens, _, heads, head_dim = qkv.shape
    grad_qkv = qkv.new_empty(qkv.shape)
    if not qkv.numel():
        return grad_qkv
    grad = grad.contiguous()
    shape = (
        qkv.stride(0),
        qkv.stride(1),
        qkv.stride(2),
        qkv.stride(3),
        heads,
        tokens,
        head_dim,
        attention_scale(head_dim),
        head_dim**-0.5,
    )
    delta = torch.empty_like(lse)
    for_queries, for_keys = _launches(head_dim, qkv.dtype)
    for_queries = chosen("attention_backward_queries", for_queries)
    for_keys = chosen("attention_backward_keys", for_keys)
    blocks = cdiv(tokens, dict(for_queries.constants)["QUERIES"]), cdiv(tokens, dict(for_keys.constants)["KEYS"])
    _attention_backward_queries[(blocks[0] * batch * heads,)](
        qkv, out, lse, grad, delta, grad_qkv, *shape, **for_queries.options()
    )
    _attention_backward_keys[(blocks[1] * batch * heads,)](
        qkv, lse, grad, delta, grad_qkv, *shape, **for_keys.options()
    )
    return grad_qkv


def variants() -> list[Variant]:
    """The launches at `SHAPES`."""
    variants = []
    for tokens, head_dim, dtype in SHAPES:
        name = f"{DTYPES[dtype]} N{tokens} D{head_dim}"
        tensors = {"lse": "*fp32", "grad": pointer(dtype), "grad_qkv": pointer(dtype), "qkv": pointer(dtype)}
        sizes = {**SIZES, "softmax_scale": "fp32"}
        multiples = (*STRIDES, "head_dim")
        for_queries, for_keys = _launches(head_dim, dtype)
        keys = {**tensors, "delta": "*fp32", **sizes}
        queries = {**keys, "out": pointer(dtype)}
        variants.append(
            for_queries.variant(f"attention_backward_queries {name}", _attention_backward_queries, queries, multiples)
        )
        variants.append(for_keys.variant(f"attention_backward_keys {name}", _attention_backward_keys, keys, multiples))
    return variants

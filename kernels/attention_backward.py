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
    load_rows,
    precision,
    store_rows,
    with_last_tiles,
)
from fastdeit.kernels.column_sum import column_sum
from fastdeit.kernels.launch import DTYPES, Launch, cdiv, chosen, next_power_of_two, pointer
from fastdeit.kernels.variants import Variant


@triton.jit
def _store_sum(to, tile, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr):
    # Write the sum of a tile's rows. A product with ones is faster than a reduction across the warps.
    columns = tl.arange(0, COLUMNS)
    if tile.dtype == tl.float32:
        tl.store(to + columns, tl.sum(tile, axis=0), mask=columns < HEAD_DIM)
    else:
        total = tl.dot(tl.full((16, ROWS), 1.0, tl.float32).to(tile.dtype), tile)
        rows = tl.arange(0, 16)[:, None]
        tl.store(to + 0 * rows + columns[None, :], total, mask=(rows == 0) & (columns < HEAD_DIM)[None, :])


@triton.jit
def _queries_tile(
    q_base,
    out,
    lse,
    grad,
    delta,
    grad_q_base,
    partial,
    start,
    stride_n,
    stride_3,
    width,
    num_queries,
    num_tokens,
    scale,
    softmax_scale,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    BIAS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    k_base = q_base + stride_3
    v_base = k_base + stride_3
    rows = start + tl.arange(0, QUERIES)
    inside = rows < num_queries
    q = load_rows(q_base, start, stride_n, num_queries, QUERIES, HEAD_DIM, COLUMNS)
    g = load_rows(grad, start, width, num_queries, QUERIES, HEAD_DIM, COLUMNS)
    o = load_rows(out, start, width, num_queries, QUERIES, HEAD_DIM, COLUMNS)
    own_delta = tl.sum(o.to(tl.float32) * g.to(tl.float32), axis=1)
    tl.store(delta + rows, own_delta, mask=inside)
    own_lse = tl.load(lse + rows, mask=inside, other=0.0)
    if BIAS:
        columns = tl.arange(0, COLUMNS)
        tl.store(partial + width + columns, tl.zeros((COLUMNS,), tl.float32), mask=columns < HEAD_DIM)
        _store_sum(partial + 2 * width, g, QUERIES, HEAD_DIM, COLUMNS)
    grad_q = tl.zeros((QUERIES, COLUMNS), tl.float32)
    for first in range(0, num_tokens, KEYS):
        k = load_rows(k_base, first, stride_n, num_tokens, KEYS, HEAD_DIM, COLUMNS)
        v = load_rows(v_base, first, stride_n, num_tokens, KEYS, HEAD_DIM, COLUMNS)
        p = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale - own_lse[:, None])
        p = tl.where((first + tl.arange(0, KEYS) < num_tokens)[None, :], p, 0.0)
        grad_p = tl.dot(g, tl.trans(v), input_precision=PRECISION)
        grad_s = (p * (grad_p - own_delta[:, None])).to(q.dtype)
        grad_q = tl.dot(grad_s, k, grad_q, input_precision=PRECISION)
    grad_q *= softmax_scale
    store_rows(grad_q_base, start, 3 * width, num_tokens, grad_q, QUERIES, HEAD_DIM, COLUMNS)
    if BIAS:
        _store_sum(partial, grad_q.to(q.dtype), QUERIES, HEAD_DIM, COLUMNS)


@triton.jit
def _attention_backward_queries(
    qkv,
    out,
    lse,
    grad,
    delta,
    grad_qkv,
    partial,
    stride_b,
    stride_n,
    stride_3,
    stride_h,
    num_heads,
    num_queries,
    num_tokens,
    scale,
    softmax_scale,
    QUERIES: tl.constexpr,
    LAST_QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    BIAS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Gradient of a tile of queries; zeros for the tokens beyond `num_queries`. Also stores each query's delta,
    # sum(output * gradient), for the other kernel, and with BIAS its share of the bias's gradient: see `backward`.
    blocks = tl.cdiv(num_tokens, QUERIES)
    block = tl.program_id(0) % blocks
    batch_head = (tl.program_id(0) // blocks).to(tl.int64)
    sample = batch_head // num_heads
    head = batch_head % num_heads
    width = num_heads * HEAD_DIM
    start = block * QUERIES
    q_base = qkv + sample * stride_b + head * stride_h
    own = sample * num_queries * width + head * HEAD_DIM
    grad_q_base = grad_qkv + 3 * sample * num_tokens * width + head * HEAD_DIM
    lse += batch_head * num_queries
    delta += batch_head * num_queries
    used = tl.cdiv(num_queries, QUERIES)
    partial += (sample * used + block) * 3 * width + head * HEAD_DIM
    written = start
    if block < used:
        if LAST_QUERIES % QUERIES == 0:  # noqa: SIM114, one condition is known to the compiler
            _queries_tile(
                q_base, out + own, lse, grad + own, delta, grad_q_base, partial, start, stride_n, stride_3, width,
                num_queries, num_tokens, scale, softmax_scale, QUERIES, KEYS, BIAS, HEAD_DIM, COLUMNS, PRECISION,
            )  # fmt: skip
            written += QUERIES
        elif block < used - 1:
            _queries_tile(
                q_base, out + own, lse, grad + own, delta, grad_q_base, partial, start, stride_n, stride_3, width,
                num_queries, num_tokens, scale, softmax_scale, QUERIES, KEYS, BIAS, HEAD_DIM, COLUMNS, PRECISION,
            )  # fmt: skip
            written += QUERIES
        else:
            _queries_tile(
                q_base, out + own, lse, grad + own, delta, grad_q_base, partial, start, stride_n, stride_3, width,
                num_queries, num_tokens, scale, softmax_scale, LAST_QUERIES, KEYS, BIAS, HEAD_DIM, COLUMNS, PRECISION,
            )  # fmt: skip
            written += LAST_QUERIES
    rows = start + tl.arange(0, QUERIES)
    columns = tl.arange(0, COLUMNS)
    rest = ((rows >= written) & (rows < num_tokens))[:, None] & (columns < HEAD_DIM)[None, :]
    zeros = tl.zeros((QUERIES, COLUMNS), grad_qkv.dtype.element_ty)
    tl.store(grad_q_base + rows[:, None] * (3 * width) + columns[None, :], zeros, mask=rest)


@triton.jit
def _add_queries(
    k,
    v,
    grad_k,
    grad_v,
    q_base,
    grad,
    lse,
    delta,
    start,
    stride_n,
    width,
    num_queries,
    scale,
    QUERIES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Add a tile of queries to the gradients of a tile of keys and values; `num_queries` None: the tile is full.
    rows = start + tl.arange(0, QUERIES)
    q = load_rows(q_base, start, stride_n, num_queries, QUERIES, HEAD_DIM, COLUMNS)
    g = load_rows(grad, start, width, num_queries, QUERIES, HEAD_DIM, COLUMNS)
    if num_queries is None:
        own_lse = tl.load(lse + rows)
        own_delta = tl.load(delta + rows)
    else:
        own_lse = tl.load(lse + rows, mask=rows < num_queries, other=0.0)
        own_delta = tl.load(delta + rows, mask=rows < num_queries, other=0.0)
    # What lies beyond the last query is zero and adds nothing; what lies beyond the last key is not stored.
    p_t = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale - own_lse[None, :])
    grad_v = tl.dot(p_t.to(g.dtype), g, grad_v, input_precision=PRECISION)
    grad_p_t = tl.dot(v, tl.trans(g), input_precision=PRECISION)
    grad_s_t = (p_t * (grad_p_t - own_delta[None, :])).to(k.dtype)
    return tl.dot(grad_s_t, q, grad_k, input_precision=PRECISION), grad_v


@triton.jit
def _keys_tile(
    q_base,
    lse,
    grad,
    delta,
    grad_q_base,
    first,
    stride_n,
    stride_3,
    width,
    num_queries,
    num_tokens,
    scale,
    softmax_scale,
    QUERIES: tl.constexpr,
    LAST_QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    k_base = q_base + stride_3
    k = load_rows(k_base, first, stride_n, num_tokens, KEYS, HEAD_DIM, COLUMNS)
    v = load_rows(k_base + stride_3, first, stride_n, num_tokens, KEYS, HEAD_DIM, COLUMNS)
    grad_k = tl.zeros((KEYS, COLUMNS), tl.float32)
    grad_v = tl.zeros((KEYS, COLUMNS), tl.float32)
    if LAST_QUERIES == QUERIES:
        end, bound = num_queries, num_queries
    else:
        # Only the last queries need a mask, and they take a tile of their own size.
        end, bound = num_queries // QUERIES * QUERIES, None
    for start in range(0, end, QUERIES):
        grad_k, grad_v = _add_queries(
            k, v, grad_k, grad_v, q_base, grad, lse, delta, start, stride_n, width, bound, scale,
            QUERIES, HEAD_DIM, COLUMNS, PRECISION,
        )  # fmt: skip
    if LAST_QUERIES % QUERIES != 0:
        grad_k, grad_v = _add_queries(
            k, v, grad_k, grad_v, q_base, grad, lse, delta, end, stride_n, width, num_queries, scale,
            LAST_QUERIES, HEAD_DIM, COLUMNS, PRECISION,
        )  # fmt: skip
    grad_k_base = grad_q_base + width
    store_rows(grad_k_base, first, 3 * width, num_tokens, grad_k * softmax_scale, KEYS, HEAD_DIM, COLUMNS)
    store_rows(grad_k_base + width, first, 3 * width, num_tokens, grad_v, KEYS, HEAD_DIM, COLUMNS)


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
    num_queries,
    num_tokens,
    scale,
    softmax_scale,
    QUERIES: tl.constexpr,
    LAST_QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    LAST_KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Gradients of a tile of keys and values.
    blocks = tl.cdiv(num_tokens, KEYS)
    block = tl.program_id(0) % blocks
    batch_head = (tl.program_id(0) // blocks).to(tl.int64)
    sample = batch_head // num_heads
    head = batch_head % num_heads
    width = num_heads * HEAD_DIM
    q_base = qkv + sample * stride_b + head * stride_h
    grad += sample * num_queries * width + head * HEAD_DIM
    grad_q_base = grad_qkv + 3 * sample * num_tokens * width + head * HEAD_DIM
    lse += batch_head * num_queries
    delta += batch_head * num_queries
    if LAST_KEYS % KEYS == 0:  # noqa: SIM114, as above
        _keys_tile(
            q_base, lse, grad, delta, grad_q_base, block * KEYS, stride_n, stride_3, width, num_queries, num_tokens,
            scale, softmax_scale, QUERIES, LAST_QUERIES, KEYS, HEAD_DIM, COLUMNS, PRECISION,
        )  # fmt: skip
    elif block < blocks - 1:
        _keys_tile(
            q_base, lse, grad, delta, grad_q_base, block * KEYS, stride_n, stride_3, width, num_queries, num_tokens,
            scale, softmax_scale, QUERIES, LAST_QUERIES, KEYS, HEAD_DIM, COLUMNS, PRECISION,
        )  # fmt: skip
    else:
        _keys_tile(
            q_base, lse, grad, delta, grad_q_base, block * KEYS, stride_n, stride_3, width, num_queries, num_tokens,
            scale, softmax_scale, QUERIES, LAST_QUERIES, LAST_KEYS, HEAD_DIM, COLUMNS, PRECISION,
        )  # fmt: skip


def _launches(head_dim: int, dtype: torch.dtype, bias: bool) -> tuple[Launch, Launch]:
    """Launches of the query and the key kernel; tuned on an H200 for 16-bit dtypes and 64 channels."""
    columns = max(16, next_power_of_two(head_dim))
    common = (("HEAD_DIM", head_dim), ("COLUMNS", columns), ("PRECISION", precision(dtype)))
    warps, stages, limits = (8, 2, (0, 0)) if dtype is torch.float32 or columns > 64 else (4, 3, (96, 128))
    own = 32 if dtype is torch.float32 else 64
    for_queries = (("QUERIES", own), ("KEYS", 32), ("BIAS", bias), *common)
    for_keys = (("QUERIES", 32), ("KEYS", own), *common)
    return (
        Launch(constants=for_queries, num_warps=warps, num_stages=stages, registers=limits[0]),
        Launch(constants=for_keys, num_warps=warps, num_stages=stages, registers=limits[1]),
    )


def backward(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    """The packed gradient of qkv, contiguous, and the gradient (3 H D,) float32 of a bias that it contains.

    grad  gradient of `out`; `out` and `lse` come from `forward`
    bias  whether to compute the second result; False: it is empty

    The bias of the keys has no gradient: it adds the same to all scores of a query. That of the values is added to each
    output, so its gradient is the sum of `grad`.
    """
    batch, tokens, _, heads, head_dim = qkv.shape
    rows, width = grad.shape[1:]
    grad_qkv = qkv.new_empty(qkv.shape)
    sums = qkv.new_empty(3 * width if bias else 0, dtype=torch.float32)
    if not qkv.numel():
        return grad_qkv, sums.zero_()
    grad = grad.contiguous()
    shape = (
        qkv.stride(0),
        qkv.stride(1),
        qkv.stride(2),
        qkv.stride(3),
        heads,
        rows,
        tokens,
        attention_scale(head_dim),
        head_dim**-0.5,
    )
    delta = torch.empty_like(lse)
    for_queries, for_keys = _launches(head_dim, qkv.dtype, bias)
    for_queries = with_last_tiles(chosen("attention_backward_queries", for_queries), QUERIES=rows)
    for_keys = with_last_tiles(chosen("attention_backward_keys", for_keys), QUERIES=rows, KEYS=tokens)
    tiles = dict(for_queries.constants)["QUERIES"], dict(for_keys.constants)["KEYS"]
    partial = qkv.new_empty((batch * cdiv(rows, tiles[0]) if bias else 0, len(sums)), dtype=torch.float32)
    _attention_backward_queries[(cdiv(tokens, tiles[0]) * batch * heads,)](
        qkv, out, lse, grad, delta, grad_qkv, partial, *shape, **for_queries.options()
    )
    _attention_backward_keys[(cdiv(tokens, tiles[1]) * batch * heads,)](
        qkv, lse, grad, delta, grad_qkv, *shape, **for_keys.options()
    )
    if bias:
        column_sum(partial, sums)
    return grad_qkv, sums


def variants() -> list[Variant]:
    """The launches at `SHAPES`, with a bias."""
    variants = []
    for tokens, head_dim, dtype in SHAPES:
        name = f"{DTYPES[dtype]} N{tokens} D{head_dim}"
        tensors = {"lse": "*fp32", "grad": pointer(dtype), "grad_qkv": pointer(dtype), "qkv": pointer(dtype)}
        sizes = {**SIZES, "softmax_scale": "fp32"}
        for_queries, for_keys = _launches(head_dim, dtype, True)
        for_queries = with_last_tiles(for_queries, QUERIES=tokens)
        for_keys = with_last_tiles(for_keys, QUERIES=tokens, KEYS=tokens)
        keys = {**tensors, "delta": "*fp32", **sizes}
        queries = {**keys, "out": pointer(dtype), "partial": "*fp32"}
        variants.append(
            for_queries.variant(f"attention_backward_queries {name}", _attention_backward_queries, queries, STRIDES)
        )
        variants.append(for_keys.variant(f"attention_backward_keys {name}", _attention_backward_keys, keys, STRIDES))
    return variants

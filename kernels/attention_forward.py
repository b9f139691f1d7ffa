"""Kernels of attention's forward pass on packed queries, keys and values."""

# Triton's annotations give a reduction's result as any of what it can be.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdeit.kernels.launch import DTYPES, Launch, cdiv, chosen, next_power_of_two, pointer
from fastdeit.kernels.variants import Variant

RESIDENT = 208  # tokens: their scores for 64 queries are all that the registers of 4 warps hold


@triton.jit
def load_rows(base, start, stride, num_rows, head_dim, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Tile (ROWS, COLUMNS) of rows `start` on, zeros beyond `num_rows` and `head_dim`."""
    rows = start + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = (rows < num_rows)[:, None] & (columns < head_dim)[None, :]
    return tl.load(base + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def load_columns(base, start, stride, num_rows, head_dim, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The transpose of `load_rows`, (COLUMNS, ROWS). Transposed by its addresses, a tile that a loop uses again and
    again is put into shared memory once, before the loop; by `tl.trans`, it would be in every turn."""
    rows = start + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = (columns < head_dim)[:, None] & (rows < num_rows)[None, :]
    return tl.load(base + rows[None, :] * stride + columns[:, None], mask=inside, other=0.0)


@triton.jit
def scores(q, k_t, start, num_rows, scale, ROWS: tl.constexpr, PRECISION: tl.constexpr):
    """Products of queries and keys in units of log2, -inf for keys beyond `num_rows`."""
    s = tl.dot(q, k_t, input_precision=PRECISION) * scale
    return tl.where((start + tl.arange(0, ROWS) < num_rows)[None, :], s, -float("inf"))


@triton.jit
def _attention_resident(
    qkv,
    out,
    lse,
    stride_b,
    stride_n,
    stride_3,
    stride_h,
    num_heads,
    num_tokens,
    head_dim,
    scale,
    QUERIES: tl.constexpr,
    KEYS_A: tl.constexpr,
    KEYS_B: tl.constexpr,
    KEYS_C: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # A program has a head: its keys and values are read once, and the queries pass by. Up to three tiles of keys of
    # falling width cover 197 tokens with 208 columns instead of 256.
    sample = tl.program_id(0).to(tl.int64) // num_heads
    head = tl.program_id(0) % num_heads
    q_base = qkv + sample * stride_b + head * stride_h
    k_base = q_base + stride_3
    v_base = k_base + stride_3
    out += (sample * num_tokens * num_heads + head) * head_dim
    lse += tl.program_id(0).to(tl.int64) * num_tokens
    k_a = load_columns(k_base, 0, stride_n, num_tokens, head_dim, KEYS_A, COLUMNS)
    v_a = load_rows(v_base, 0, stride_n, num_tokens, head_dim, KEYS_A, COLUMNS)
    if KEYS_B > 0:
        k_b = load_columns(k_base, KEYS_A, stride_n, num_tokens, head_dim, KEYS_B, COLUMNS)
        v_b = load_rows(v_base, KEYS_A, stride_n, num_tokens, head_dim, KEYS_B, COLUMNS)
    if KEYS_C > 0:
        k_c = load_columns(k_base, KEYS_A + KEYS_B, stride_n, num_tokens, head_dim, KEYS_C, COLUMNS)
        v_c = load_rows(v_base, KEYS_A + KEYS_B, stride_n, num_tokens, head_dim, KEYS_C, COLUMNS)
    columns = tl.arange(0, COLUMNS)
    for start in range(0, num_tokens, QUERIES):
        q = load_rows(q_base, start, stride_n, num_tokens, head_dim, QUERIES, COLUMNS)
        s_a = scores(q, k_a, 0, num_tokens, scale, KEYS_A, PRECISION)
        largest = tl.max(s_a, axis=1)
        if KEYS_B > 0:
            s_b = scores(q, k_b, KEYS_A, num_tokens, scale, KEYS_B, PRECISION)
            largest = tl.maximum(largest, tl.max(s_b, axis=1))
        if KEYS_C > 0:
            s_c = scores(q, k_c, KEYS_A + KEYS_B, num_tokens, scale, KEYS_C, PRECISION)
            largest = tl.maximum(largest, tl.max(s_c, axis=1))
        p_a = tl.exp2(s_a - largest[:, None])
        total = tl.sum(p_a, axis=1)
        weighted = tl.dot(p_a.to(v_a.dtype), v_a, input_precision=PRECISION)
        if KEYS_B > 0:
            p_b = tl.exp2(s_b - largest[:, None])
            total += tl.sum(p_b, axis=1)
            weighted = tl.dot(p_b.to(v_b.dtype), v_b, weighted, input_precision=PRECISION)
        if KEYS_C > 0:
            p_c = tl.exp2(s_c - largest[:, None])
            total += tl.sum(p_c, axis=1)
            weighted = tl.dot(p_c.to(v_c.dtype), v_c, weighted, input_precision=PRECISION)
        rows = start + tl.arange(0, QUERIES)
        inside = rows < num_tokens
        places = rows[:, None] * (num_heads * head_dim) + columns[None, :]
        mask = inside[:, None] & (columns < head_dim)[None, :]
        tl.store(out + places, (weighted / total[:, None]).to(out.dtype.element_ty), mask=mask)
        tl.store(lse + rows, largest + tl.log2(total), mask=inside)


@triton.jit
def _attention_online(
    qkv,
    out,
    lse,
    stride_b,
    stride_n,
    stride_3,
    stride_h,
    num_heads,
    num_tokens,
    head_dim,
    scale,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Neighbouring programs share a head, whose keys and values then come from the cache.
    blocks = tl.cdiv(num_tokens, QUERIES)
    block = tl.program_id(0) % blocks
    pair = tl.program_id(0) // blocks
    sample = pair.to(tl.int64) // num_heads
    head = pair % num_heads
    q_base = qkv + sample * stride_b + head * stride_h
    k_base = q_base + stride_3
    v_base = k_base + stride_3
    q = load_rows(q_base, block * QUERIES, stride_n, num_tokens, head_dim, QUERIES, COLUMNS)
    largest = tl.full((QUERIES,), -float("inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    weighted = tl.zeros((QUERIES, COLUMNS), tl.float32)
    for start in range(0, num_tokens, KEYS):
        k = load_columns(k_base, start, stride_n, num_tokens, head_dim, KEYS, COLUMNS)
        s = scores(q, k, start, num_tokens, scale, KEYS, PRECISION)
        higher = tl.maximum(largest, tl.max(s, axis=1))
        p = tl.exp2(s - higher[:, None])
        shrink = tl.exp2(largest - higher)
        total = total * shrink + tl.sum(p, axis=1)
        v = load_rows(v_base, start, stride_n, num_tokens, head_dim, KEYS, COLUMNS)
        weighted = tl.dot(p.to(v.dtype), v, weighted * shrink[:, None], input_precision=PRECISION)
        largest = higher
    rows = block * QUERIES + tl.arange(0, QUERIES)
    columns = tl.arange(0, COLUMNS)
    inside = rows < num_tokens
    places = (sample * num_tokens + rows[:, None]) * (num_heads * head_dim) + head * head_dim + columns[None, :]
    mask = inside[:, None] & (columns < head_dim)[None, :]
    tl.store(out + places, (weighted / total[:, None]).to(out.dtype.element_ty), mask=mask)
    tl.store(lse + pair.to(tl.int64) * num_tokens + rows, largest + tl.log2(total), mask=inside)


def tiles(num_tokens: int) -> tuple[int, int, int]:
    """Widths of at most three tiles, falling powers of two from 16 on (0: none), that cover up to 256 tokens."""
    first = min(128, max(16, 1 << (num_tokens.bit_length() - 1)))
    rest = max(0, num_tokens - first)
    second = min(first, max(16, 1 << (rest.bit_length() - 1))) if rest else 0
    third = max(16, next_power_of_two(rest - second)) if rest > second else 0
    return (first, second, third) if third < second else (first, 2 * second, 0)


def precision(dtype: torch.dtype) -> str:
    """Of products of tiles: float32 is not to be cut to TF32."""
    return "ieee" if dtype is torch.float32 else "tf32"


def is_resident(num_tokens: int, head_dim: int, dtype: torch.dtype) -> bool:
    """Whether a program can hold the keys and values of a whole head, and its registers all scores of 64 queries."""
    return num_tokens <= RESIDENT and head_dim <= 64 and dtype is not torch.float32


def forward_launch(num_tokens: int, head_dim: int, dtype: torch.dtype) -> Launch:
    columns = (("COLUMNS", max(16, next_power_of_two(head_dim))), ("PRECISION", precision(dtype)))
    if is_resident(num_tokens, head_dim, dtype):
        a, b, c = tiles(num_tokens)
        return Launch(constants=(("QUERIES", 64), ("KEYS_A", a), ("KEYS_B", b), ("KEYS_C", c), *columns), num_warps=4)
    if dtype is torch.float32:
        return Launch(constants=(("QUERIES", 32), ("KEYS", 32), *columns), num_warps=4)
    if head_dim <= 64:
        return Launch(constants=(("QUERIES", 64), ("KEYS", 64), *columns), num_warps=4)
    return Launch(constants=(("QUERIES", 128), ("KEYS", 64), *columns), num_warps=8)


def attention_scale(head_dim: int) -> float:
    """Of the scores: 1 / sqrt(head_dim), in units of log2, since 2 ** x is what the hardware has."""
    return head_dim**-0.5 * math.log2(math.e)


def forward(qkv: Tensor) -> tuple[Tensor, Tensor]:
    """Output (B, N, H D) and, for the backward pass, log2 of the sum of 2 ** score of each query, (B, H, N) float32."""
    batch, tokens, _, heads, head_dim = qkv.shape
    out = qkv.new_empty((batch, tokens, heads * head_dim))
    lse = qkv.new_empty((batch, heads, tokens), dtype=torch.float32)
    if not qkv.numel():
        return out, lse
    launch = chosen("attention_forward", forward_launch(tokens, head_dim, qkv.dtype))
    if is_resident(tokens, head_dim, qkv.dtype):
        kernel, grid = _attention_resident, (batch * heads,)
    else:
        kernel, grid = _attention_online, (cdiv(tokens, dict(launch.constants)["QUERIES"]) * batch * heads,)
    kernel[grid](
        qkv,
        out,
        lse,
        qkv.stride(0),
        qkv.stride(1),
        qkv.stride(2),
        qkv.stride(3),
        heads,
        tokens,
        head_dim,
        attention_scale(head_dim),
        **launch.options(),
    )
    return out, lse


# Tokens, heads, head dim and dtype of the launches that are compiled without a GPU: DeiT at 224 and 384 pixels.
SHAPES = (
    (197, 12, 64, torch.bfloat16),
    (198, 12, 64, torch.float16),
    (578, 12, 64, torch.bfloat16),
    (197, 8, 32, torch.bfloat16),
    (197, 8, 96, torch.bfloat16),
    (578, 8, 128, torch.bfloat16),
    (197, 12, 64, torch.float32),
)
STRIDES = ("stride_b", "stride_n", "stride_3", "stride_h")
SIZES = dict.fromkeys((*STRIDES, "num_heads", "num_tokens", "head_dim"), "i32") | {"scale": "fp32"}


def variants() -> list[Variant]:
    """The launches at `SHAPES`."""
    return [
        forward_launch(tokens, head_dim, dtype).variant(
            f"attention_forward {DTYPES[dtype]} N{tokens} D{head_dim}",
            _attention_resident if is_resident(tokens, head_dim, dtype) else _attention_online,
            {"qkv": pointer(dtype), "out": pointer(dtype), "lse": "*fp32", **SIZES},
            (*STRIDES, "head_dim"),
        )
        for tokens, _, head_dim, dtype in SHAPES
    ]

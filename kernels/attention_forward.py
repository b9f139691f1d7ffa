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


@triton.jit
def load_rows(base, start, stride, num_rows, head_dim, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Tile (ROWS, COLUMNS) of rows `start` on, zeros beyond `num_rows` and `head_dim`."""
    rows = start + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = (rows < num_rows)[:, None] & (columns < head_dim)[None, :]
    return tl.load(base + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def load_columns(base, start, stride, num_rows, head_dim, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The transpose of `load_rows`, (COLUMNS, ROWS)."""
    rows = start + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = (columns < head_dim)[:, None] & (rows < num_rows)[None, :]
    return tl.load(base + rows[None, :] * stride + columns[:, None], mask=inside, other=0.0)


@triton.jit
def _attention_forward(
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
        k_t = load_columns(k_base, start, stride_n, num_tokens, head_dim, KEYS, COLUMNS)
        s = tl.dot(q, k_t, input_precision=PRECISION)
        s = tl.where((start + tl.arange(0, KEYS) < num_tokens)[None, :], s, -float("inf"))
        higher = tl.maximum(largest, tl.max(s, axis=1) * scale)
        p = tl.exp2(s * scale - higher[:, None])
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


def precision(dtype: torch.dtype) -> str:
    """Of products of tiles: float32 is not to be cut to TF32."""
    return "ieee" if dtype is torch.float32 else "tf32"


def forward_launch(num_tokens: int, head_dim: int, dtype: torch.dtype) -> Launch:
    """The launch for these shapes; those of 16 bits and 64 channels were tuned on an H100."""
    channels = max(16, next_power_of_two(head_dim))
    if dtype is torch.float32:
        queries, keys, warps, stages = 32, 32, 4, 2
    elif channels > 64:
        queries, keys, warps, stages = 128, 64, 8, 2
    elif channels < 64:
        queries, keys, warps, stages = 64, 64, 4, 2
    elif num_tokens > 256:
        queries, keys, warps, stages = 128, 64, 8, 3
    else:
        queries, keys, warps, stages = 64, 32, 4, 3
    tiles = (("QUERIES", queries), ("KEYS", keys), ("COLUMNS", channels), ("PRECISION", precision(dtype)))
    return Launch(constants=tiles, num_warps=warps, num_stages=stages)


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
    _attention_forward[(cdiv(tokens, dict(launch.constants)["QUERIES"]) * batch * heads,)](
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
            _attention_forward,
            {"qkv": pointer(dtype), "out": pointer(dtype), "lse": "*fp32", **SIZES},
            (*STRIDES, "head_dim"),
        )
        for tokens, _, head_dim, dtype in SHAPES
    ]

"""Attention forward pass on packed queries, keys and values."""

# Triton annotates the result of a reduction as a union of every possible type.
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
    """Tile (ROWS, COLUMNS) starting at row `start`; zeros beyond `num_rows` and `head_dim`."""
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
    # Neighbouring programs share a head, so its keys and values come from the cache.
    blocks = tl.cdiv(num_tokens, QUERIES)
    block = tl.program_id(0) % blocks
    batch_head = tl.program_id(0) // blocks
    sample = batch_head.to(tl.int64) // num_heads
    head = batch_head % num_heads
    q_base = qkv + sample * stride_b + head * stride_h
    k_base = q_base + stride_3
    v_base = k_base + stride_3
    q = load_rows(q_base, block * QUERIES, stride_n, num_tokens, head_dim, QUERIES, COLUMNS)
    row_max = tl.full((QUERIES,), -float("inf"), tl.float32)
    row_sum = tl.zeros((QUERIES,), tl.float32)
    acc = tl.zeros((QUERIES, COLUMNS), tl.float32)
    for start in range(0, num_tokens, KEYS):
        k_t = load_columns(k_base, start, stride_n, num_tokens, head_dim, KEYS, COLUMNS)
        s = tl.dot(q, k_t, input_precision=PRECISION)
        s = tl.where((start + tl.arange(0, KEYS) < num_tokens)[None, :], s, -float("inf"))
        new_max = tl.maximum(row_max, tl.max(s, axis=1) * scale)
        p = tl.exp2(s * scale - new_max[:, None])
        rescale = tl.exp2(row_max - new_max)
        row_sum = row_sum * rescale + tl.sum(p, axis=1)
        v = load_rows(v_base, start, stride_n, num_tokens, head_dim, KEYS, COLUMNS)
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
        row_max = new_max
    rows = block * QUERIES + tl.arange(0, QUERIES)
    columns = tl.arange(0, COLUMNS)
    inside = rows < num_tokens
    offsets = (sample * num_tokens + rows[:, None]) * (num_heads * head_dim) + head * head_dim + columns[None, :]
    mask = inside[:, None] & (columns < head_dim)[None, :]
    tl.store(out + offsets, (acc / row_sum[:, None]).to(out.dtype.element_ty), mask=mask)
    tl.store(lse + batch_head.to(tl.int64) * num_tokens + rows, row_max + tl.log2(row_sum), mask=inside)


def precision(dtype: torch.dtype) -> str:
    """Input precision of tile products: float32 must not become TF32."""
    return "ieee" if dtype is torch.float32 else "tf32"


def forward_launch(num_tokens: int, head_dim: int, dtype: torch.dtype) -> Launch:
    """The launch for these shapes; tuned on an H100 for 16-bit dtypes and 64 channels."""
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
    """Scale of the scores: log2(e) / sqrt(head_dim), because the hardware computes 2 ** x."""
    return head_dim**-0.5 * math.log2(math.e)


def forward(qkv: Tensor) -> tuple[Tensor, Tensor]:
    """Output (B, N, H D), and for the backward pass log2(sum of 2 ** score) of each query, (B, H, N) float32."""
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


# Tokens, head dim and dtype of the launches compiled without a GPU: DeiT at 224 and 384 pixels.
SHAPES = (
    (197, 64, torch.bfloat16),
    (198, 64, torch.float16),
    (578, 64, torch.bfloat16),
    (197, 32, torch.bfloat16),
    (197, 96, torch.bfloat16),
    (578, 128, torch.bfloat16),
    (197, 64, torch.float32),
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
        for tokens, head_dim, dtype in SHAPES
    ]

"""Attention forward pass on packed queries, keys and values."""

# Triton annotates the result of a reduction as a union of every possible type.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import math
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdeit.kernels.launch import DTYPES, Launch, cdiv, chosen, next_power_of_two, pointer
from fastdeit.kernels.variants import Variant


@triton.jit
def load_rows(base, start, stride, num_rows, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr):
    """Tile (ROWS, COLUMNS) starting at row `start`; zeros beyond `num_rows` (None: there are enough) and HEAD_DIM."""
    rows = start + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    at = base + rows[:, None] * stride + columns[None, :]
    if num_rows is None and HEAD_DIM == COLUMNS:
        return tl.load(at)
    elif num_rows is None:
        return tl.load(at, mask=(columns < HEAD_DIM)[None, :], other=0.0)
    elif HEAD_DIM == COLUMNS:
        return tl.load(at, mask=(rows < num_rows)[:, None], other=0.0)
    else:
        return tl.load(at, mask=(rows < num_rows)[:, None] & (columns < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def store_rows(base, start, stride, num_rows, value, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr):
    """Write what lies within `num_rows` and HEAD_DIM of a tile (ROWS, COLUMNS) that starts at row `start`."""
    rows = start + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = (rows < num_rows)[:, None] & (columns < HEAD_DIM)[None, :]
    tl.store(base + rows[:, None] * stride + columns[None, :], value.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _attend(
    q,
    k_base,
    v_base,
    stride_n,
    start,
    num_tokens,
    scale,
    row_max,
    row_sum,
    acc,
    KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Add a tile of keys to the running softmax of a tile of queries; `num_tokens` None: the tile is full.
    k = load_rows(k_base, start, stride_n, num_tokens, KEYS, HEAD_DIM, COLUMNS)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if num_tokens is not None:
        s = tl.where((start + tl.arange(0, KEYS) < num_tokens)[None, :], s, -float("inf"))
    new_max = tl.maximum(row_max, tl.max(s, axis=1) * scale)
    p = tl.exp2(s * scale - new_max[:, None])
    rescale = tl.exp2(row_max - new_max)
    row_sum = row_sum * rescale + tl.sum(p, axis=1)
    v = load_rows(v_base, start, stride_n, num_tokens, KEYS, HEAD_DIM, COLUMNS)
    acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
    return new_max, row_sum, acc


@triton.jit
def _forward_tile(
    q_base,
    out,
    lse,
    start,
    stride_n,
    stride_3,
    width,
    num_queries,
    num_tokens,
    scale,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    LAST_KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    k_base = q_base + stride_3
    v_base = k_base + stride_3
    q = load_rows(q_base, start, stride_n, num_queries, QUERIES, HEAD_DIM, COLUMNS)
    row_max = tl.full((QUERIES,), -float("inf"), tl.float32)
    row_sum = tl.zeros((QUERIES,), tl.float32)
    acc = tl.zeros((QUERIES, COLUMNS), tl.float32)
    if LAST_KEYS == KEYS:
        end, bound = num_tokens, num_tokens
    else:
        # Only the last keys need a mask, and they take a tile of their own size.
        end, bound = num_tokens // KEYS * KEYS, None
    for first in range(0, end, KEYS):
        row_max, row_sum, acc = _attend(
            q, k_base, v_base, stride_n, first, bound, scale, row_max, row_sum, acc,
            KEYS, HEAD_DIM, COLUMNS, PRECISION,
        )  # fmt: skip
    if LAST_KEYS % KEYS != 0:
        row_max, row_sum, acc = _attend(
            q, k_base, v_base, stride_n, end, num_tokens, scale, row_max, row_sum, acc,
            LAST_KEYS, HEAD_DIM, COLUMNS, PRECISION,
        )  # fmt: skip
    store_rows(out, start, width, num_queries, acc / row_sum[:, None], QUERIES, HEAD_DIM, COLUMNS)
    rows = start + tl.arange(0, QUERIES)
    tl.store(lse + rows, row_max + tl.log2(row_sum), mask=rows < num_queries)


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
    num_queries,
    num_tokens,
    scale,
    QUERIES: tl.constexpr,
    LAST_QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    LAST_KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Neighbouring programs share a head, so its keys and values come from the cache.
    blocks = tl.cdiv(num_queries, QUERIES)
    block = tl.program_id(0) % blocks
    batch_head = (tl.program_id(0) // blocks).to(tl.int64)
    sample = batch_head // num_heads
    head = batch_head % num_heads
    width = num_heads * HEAD_DIM
    q_base = qkv + sample * stride_b + head * stride_h
    out += sample * num_queries * width + head * HEAD_DIM
    lse += batch_head * num_queries
    if LAST_QUERIES % QUERIES == 0:  # noqa: SIM114, this condition is known to the compiler
        _forward_tile(
            q_base, out, lse, block * QUERIES, stride_n, stride_3, width, num_queries, num_tokens, scale,
            QUERIES, KEYS, LAST_KEYS, HEAD_DIM, COLUMNS, PRECISION,
        )  # fmt: skip
    elif block < blocks - 1:
        _forward_tile(
            q_base, out, lse, block * QUERIES, stride_n, stride_3, width, num_queries, num_tokens, scale,
            QUERIES, KEYS, LAST_KEYS, HEAD_DIM, COLUMNS, PRECISION,
        )  # fmt: skip
    else:
        _forward_tile(
            q_base, out, lse, block * QUERIES, stride_n, stride_3, width, num_queries, num_tokens, scale,
            LAST_QUERIES, KEYS, LAST_KEYS, HEAD_DIM, COLUMNS, PRECISION,
        )  # fmt: skip


def precision(dtype: torch.dtype) -> str:
    """Input precision of tile products: float32 must not become TF32."""
    return "ieee" if dtype is torch.float32 else "tf32"


def with_last_tiles(launch: Launch, **counts: int) -> Launch:
    """Give a launch the sizes of the tiles for the rows that full tiles leave over.

    counts  number of rows that the tiles of a name cover: QUERIES=197 adds LAST_QUERIES, the smallest power of two that
            holds the rest, at least 16, or 0 if there is none. In float32, and above 64 channels, a second tile size
            would need more registers than there are: there it is the tile itself
    """
    constants = dict(launch.constants)
    small = constants["COLUMNS"] <= 64 and constants["PRECISION"] != "ieee"
    for name, count in counts.items():
        rest = count % constants[name]
        last = max(16, next_power_of_two(rest)) if rest else 0
        constants[f"LAST_{name}"] = last if small else constants[name]
    return replace(launch, constants=tuple(constants.items()))


def _launch(num_tokens: int, head_dim: int, dtype: torch.dtype) -> Launch:
    """The launch for these shapes; tuned on an H200 for 16-bit dtypes and 64 channels."""
    columns = max(16, next_power_of_two(head_dim))
    if dtype is torch.float32:
        queries, keys, warps, stages, registers = 32, 32, 4, 2, 0
    elif columns > 64:
        queries, keys, warps, stages, registers = 128, 64, 8, 2, 0
    elif num_tokens > 256:
        queries, keys, warps, stages, registers = 128, 64, 8, 3, 0
    else:
        queries, keys, warps, stages, registers = 64, 32, 4, 3, 80
    tiles = (("QUERIES", queries), ("KEYS", keys), ("HEAD_DIM", head_dim), ("COLUMNS", columns))
    constants = (*tiles, ("PRECISION", precision(dtype)))
    return Launch(constants=constants, num_warps=warps, num_stages=stages, registers=registers)


def _with_last_tiles(launch: Launch, rows: int, tokens: int) -> Launch:
    queries = dict(launch.constants)["QUERIES"]
    # A second tile of queries costs registers, which costs more time than it saves: only for the first few rows.
    return with_last_tiles(launch, QUERIES=rows if rows < queries else queries, KEYS=tokens)


def attention_scale(head_dim: int) -> float:
    """Scale of the scores: log2(e) / sqrt(head_dim), because the hardware computes 2 ** x."""
    return head_dim**-0.5 * math.log2(math.e)


def forward(qkv: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Output (B, rows, H D), and for the backward pass log2(sum of 2 ** score) of each query, (B, H, rows) float32."""
    batch, tokens, _, heads, head_dim = qkv.shape
    out = qkv.new_empty((batch, rows, heads * head_dim))
    lse = qkv.new_empty((batch, heads, rows), dtype=torch.float32)
    if not qkv.numel():
        return out, lse
    launch = chosen("attention_forward", _launch(tokens, head_dim, qkv.dtype))
    launch = _with_last_tiles(launch, rows, tokens)
    _attention_forward[(cdiv(rows, dict(launch.constants)["QUERIES"]) * batch * heads,)](
        qkv,
        out,
        lse,
        qkv.stride(0),
        qkv.stride(1),
        qkv.stride(2),
        qkv.stride(3),
        heads,
        rows,
        tokens,
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
SIZES = dict.fromkeys((*STRIDES, "num_heads", "num_queries", "num_tokens"), "i32") | {"scale": "fp32"}


def variants() -> list[Variant]:
    """The launches at `SHAPES`."""
    return [
        _with_last_tiles(_launch(tokens, head_dim, dtype), tokens, tokens).variant(
            f"attention_forward {DTYPES[dtype]} N{tokens} D{head_dim}",
            _attention_forward,
            {"qkv": pointer(dtype), "out": pointer(dtype), "lse": "*fp32", **SIZES},
            STRIDES,
        )
        for tokens, head_dim, dtype in SHAPES
    ]

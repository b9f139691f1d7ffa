"""Second stage of gradients summed over rows: add the partial sums that the first stage's programs wrote."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastdeit.kernels.launch import Launch, cdiv, chosen
from fastdeit.kernels.variants import Variant


@triton.jit
def _column_sum(partial, out, num_rows, width, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_width = columns < width
    total = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for first in range(0, num_rows, ROWS):
        rows = first + tl.arange(0, ROWS)
        inside = (rows < num_rows)[:, None] & in_width[None, :]
        total += tl.load(partial + rows.to(tl.int64)[:, None] * width + columns[None, :], mask=inside, other=0.0)
    tl.store(out + columns, tl.sum(total, axis=0), mask=in_width)


# Few columns a program, to have programs for most multiprocessors, and most rows in one load.
_LAUNCH = Launch(constants=(("ROWS", 256), ("BLOCK_C", 16)), num_warps=8)


def column_sum(partial: Tensor, out: Tensor) -> None:
    """Write the sum of `partial` over its first dimension to `out`, always in the same order.

    partial  (P, ...) float32, contiguous
    out      (...) float32, contiguous

    PyTorch's own sum takes two to three times as long for a few hundred rows (docs/log.md, 2026-11-26).
    """
    width = out.numel()
    launch = chosen("column_sum", _LAUNCH)
    grid = (cdiv(width, dict(launch.constants)["BLOCK_C"]),)
    _column_sum[grid](partial, out, len(partial), width, **launch.options())


def variants() -> list[Variant]:
    """The only launch."""
    signature = {"partial": "*fp32", "out": "*fp32", "num_rows": "i32", "width": "i32"}
    return [_LAUNCH.variant("column_sum fp32", _column_sum, signature, ("width",))]

"""Kernel launches as the compiler sees them; the tests compile these without a GPU."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from triton.runtime.jit import JITFunction


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A kernel with the argument types and constants of one launch.

    name        e.g. "attention_forward bf16 N197 D64"
    kernel      the result of `triton.jit`
    signature   Triton's type of every non-constant argument, e.g. "*bf16", "i32", "fp32"
    constants   value of every `tl.constexpr` argument
    multiples   integers that are multiples of 16; all pointers are
    registers   the most that a thread may have on sm_90; 0: no limit
    fp_fusion   whether the compiler may fuse a multiplication and an addition into one operation
    """

    name: str
    kernel: JITFunction[Any]
    signature: dict[str, str]
    constants: dict[str, Any] = field(default_factory=dict)
    multiples: frozenset[str] = frozenset()
    num_warps: int = 4
    num_stages: int = 2
    registers: int = 0
    fp_fusion: bool = True

"""The configurations in which kernels are launched, as the compiler sees them: what the tests compile without a GPU."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from triton.runtime.jit import JITFunction


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A kernel with the types and constants of one launch.

    name        e.g. "attention_forward bf16 N197 D64"
    kernel      what `triton.jit` returned
    signature   Triton's type of every argument that is no constant, e.g. "*bf16", "i32", "fp32"
    constants   value of every `tl.constexpr` argument
    unaligned   pointers and integers that are not multiples of 16; all pointers otherwise are
    multiples   integers that are multiples of 16
    fp_fusion   whether a multiplication and an addition may become one operation with one rounding
    """

    name: str
    kernel: JITFunction[Any]
    signature: dict[str, str]
    constants: dict[str, Any] = field(default_factory=dict)
    unaligned: frozenset[str] = frozenset()
    multiples: frozenset[str] = frozenset()
    num_warps: int = 4
    num_stages: int = 2
    fp_fusion: bool = True

"""Launch configurations, operator registration and argument checks shared by all kernels."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdeit.kernels.variants import Variant

HOPPER = (9, 0)  # compute capability
DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True, kw_only=True)
class Launch:
    """A kernel's launch configuration, except for its grid; `variants()` compiles the same one.

    constants  values of the kernel's `tl.constexpr` arguments
    registers  the most that a thread may have on Hopper, so that one more program fits a multiprocessor; 0: no limit.
               There a product reads its operands from shared memory, which leaves registers to spare
    fp_fusion  whether the compiler may fuse a multiplication and an addition into one operation
    """

    constants: tuple[tuple[str, Any], ...]
    num_warps: int
    num_stages: int = 2
    registers: int = 0
    fp_fusion: bool = True

    def options(self) -> dict[str, Any]:
        """Keyword arguments of the launch, on the current device."""
        limited = self.registers and torch.cuda.is_available() and torch.cuda.get_device_capability() == HOPPER
        return {
            **dict(self.constants),
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": self.fp_fusion,
            **({"maxnreg": self.registers} if limited else {}),
        }

    def variant(
        self, name: str, kernel: Any, signature: dict[str, str], multiples: Iterable[str] = (), **constants: Any
    ) -> Variant:
        """This launch of `kernel` as the compiler sees it; `constants` are arguments that Triton specializes as 1."""
        return Variant(
            name=name,
            kernel=kernel,
            signature=signature,
            constants={**dict(self.constants), **constants},
            multiples=frozenset(multiples),
            num_warps=self.num_warps,
            num_stages=self.num_stages,
            registers=self.registers,
            fp_fusion=self.fp_fusion,
        )


Choose = Callable[[str, Launch], Launch]
_choose: Choose | None = None


def chosen(name: str, default: Launch) -> Launch:
    """The launch of the kernel `name`: `default`, unless a benchmark tries another."""
    return default if _choose is None else _choose(name, default)


@contextlib.contextmanager
def trying(choose: Choose) -> Iterator[None]:
    """Replace every launch by `choose(name, default)`, in the whole process; for benchmarks."""
    global _choose
    before, _choose = _choose, choose
    try:
        yield
    finally:
        _choose = before


def operator(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Register a function whose first argument is a tensor as a PyTorch operator (`torch.library.custom_op`).

    It makes that tensor's device current: Triton launches on the current device, wherever the pointers lie.
    """

    def define(function: Callable[..., Any]) -> Any:
        @functools.wraps(function)
        def on_its_device(first: Tensor, *rest: Any) -> Any:
            with torch.cuda.device_of(first):
                return function(first, *rest)

        return torch.library.custom_op(name, on_its_device, mutates_args=())

    return define


def check(op: str, **tensors: Tensor | None) -> None:
    """Raise ValueError unless `op` can run on the named tensors: 16- or 32-bit floats on one CUDA device.

    Under Triton's interpreter (TRITON_INTERPRET=1 before the first import) the CPU works too.
    """
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first, device = next((name, tensor.device) for name, tensor in given.items())
    for name, tensor in given.items():
        check_dtype(op, name, tensor.dtype)
        if tensor.device != device:
            raise ValueError(f"{op}: {first} lies on {device}, {name} on {tensor.device}: move them to one device")
    check_device(op, device)


def check_dtype(op: str, name: str, dtype: torch.dtype) -> None:
    """Raise ValueError unless kernels support `dtype`."""
    if dtype not in DTYPES:
        raise ValueError(f"{op}: {name} is {dtype}: give float32, float16 or bfloat16")


def check_device(op: str, device: torch.device) -> None:
    """Raise ValueError unless kernels can run on `device`."""
    if device.type not in ("cuda", "meta") and os.environ.get("TRITON_INTERPRET", "0") != "1":
        raise ValueError(
            f"{op}: Triton's kernels need a CUDA device, and the tensors are on {device}: "
            f"move them to one, or set TRITON_INTERPRET=1 before Python starts to interpret the kernels, slowly"
        )


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def pointer(dtype: torch.dtype) -> str:
    """Triton's type for a pointer to `dtype`."""
    return f"*{DTYPES[dtype]}"


def _serialize_interpreted_launches() -> None:
    """Serialise launches: Triton's interpreter patches `triton.language` for all threads while a kernel runs."""
    from triton.runtime.interpreter import GridExecutor

    lock, launch = threading.RLock(), GridExecutor.__call__

    def locked(self: Any, *arguments: Any, **options: Any) -> Any:
        with lock:
            return launch(self, *arguments, **options)

    GridExecutor.__call__ = locked


def _add_index_to_interpreted_tensors() -> None:
    """Give interpreted tensors an `__index__`: Triton 3.6 passes loop ends as arrays, which NumPy 2.4 rejects."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


if os.environ.get("TRITON_INTERPRET", "0") == "1":
    _serialize_interpreted_launches()
    _add_index_to_interpreted_tensors()

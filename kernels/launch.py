"""What every launch of a kernel shares: its configuration, Triton's names of dtypes, and where kernels can run."""

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

DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How a kernel is launched, besides its grid; `variants()` compiles what a launch runs.

    constants  values of the kernel's `tl.constexpr` arguments
    fp_fusion  whether a multiplication and an addition may become one operation with one rounding
    """

    constants: tuple[tuple[str, Any], ...]
    num_warps: int
    num_stages: int = 2
    fp_fusion: bool = True

    def options(self) -> dict[str, Any]:
        """Keyword arguments of the launch."""
        return {
            **dict(self.constants),
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": self.fp_fusion,
        }

    def variant(
        self, name: str, kernel: Any, signature: dict[str, str], multiples: Iterable[str] = (), **constants: Any
    ) -> Variant:
        """This launch of `kernel` as the compiler sees it; `constants`: arguments that are 1, constants to Triton."""
        return Variant(
            name=name,
            kernel=kernel,
            signature=signature,
            constants={**dict(self.constants), **constants},
            multiples=frozenset(multiples),
            num_warps=self.num_warps,
            num_stages=self.num_stages,
            fp_fusion=self.fp_fusion,
        )


Choose = Callable[[str, Launch], Launch]
_choose: Choose | None = None


def chosen(name: str, default: Launch) -> Launch:
    """How to launch the kernel `name`: `default`, unless a benchmark tries another way."""
    return default if _choose is None else _choose(name, default)


@contextlib.contextmanager
def trying(choose: Choose) -> Iterator[None]:
    """Launch kernels as `choose(name, default)` says, for the whole process; for benchmarks."""
    global _choose
    before, _choose = _choose, choose
    try:
        yield
    finally:
        _choose = before


def operator(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Make a PyTorch operator of a function whose first argument is a tensor: `torch.library.custom_op`.

    It runs with that tensor's device as the current one, on which Triton launches, whosever the pointers are.
    """

    def define(function: Callable[..., Any]) -> Any:
        @functools.wraps(function)
        def on_its_device(first: Tensor, *rest: Any) -> Any:
            with torch.cuda.device_of(first):
                return function(first, *rest)

        return torch.library.custom_op(name, on_its_device, mutates_args=())

    return define


def check(op: str, **tensors: Tensor | None) -> None:
    """Raise ValueError unless `op` can run on the named tensors: floats of 16 or 32 bits, on one CUDA device.

    Under Triton's interpreter (TRITON_INTERPRET=1 before the first import) the CPU is as good.
    """
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first, device = next((name, tensor.device) for name, tensor in given.items())
    for name, tensor in given.items():
        check_dtype(op, name, tensor.dtype)
        if tensor.device != device:
            raise ValueError(f"{op}: {first} lies on {device}, {name} on {tensor.device}: move them to one device")
    check_device(op, device)


def check_dtype(op: str, name: str, dtype: torch.dtype) -> None:
    """Raise ValueError unless kernels take `dtype`."""
    if dtype not in DTYPES:
        raise ValueError(f"{op}: {name} is {dtype}: give float32, float16 or bfloat16")


def check_device(op: str, device: torch.device) -> None:
    """Raise ValueError unless kernels run on `device`."""
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
    """Triton's type of a pointer to `dtype`."""
    return f"*{DTYPES[dtype]}"


def _interpret_one_launch_at_a_time() -> None:
    """Triton's interpreter changes `triton.language` while a kernel runs, for every thread of the process."""
    from triton.runtime.interpreter import GridExecutor

    lock, launch = threading.RLock(), GridExecutor.__call__

    def locked(self: Any, *arguments: Any, **options: Any) -> Any:
        with lock:
            return launch(self, *arguments, **options)

    GridExecutor.__call__ = locked


def _count_in_loops_whatever_numpy() -> None:
    """NumPy takes an array of one for no index from 2.4 on, as which Triton's interpreter 3.6 gives it a loop's end."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


if os.environ.get("TRITON_INTERPRET", "0") == "1":
    _interpret_one_launch_at_a_time()
    _count_in_loops_whatever_numpy()

"""The number format of a step, and whether it is compiled."""

import contextlib
from dataclasses import dataclass

import torch

from fastdeit.config import Recipe
from fastdeit.pipelines.errors import UserError

COMPILER = "inductor"  # torch.compile's own name of its default backend


@dataclass(frozen=True)
class Precision:
    """A resolved precision: its name, the autocast dtype (None: float32 throughout), the device.

    `note` is a sentence if it differs from the request, else empty.
    """

    name: str
    dtype: torch.dtype | None
    device: torch.device
    note: str = ""

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)


def allow_tf32(precision: Precision) -> None:
    """Allow TF32 for products that autocast leaves in float32; with precision "fp32", forbid it.

    Applies to the whole process.
    """
    if precision.device.type == "cuda":
        torch.set_float32_matmul_precision("highest" if precision.dtype is None else "high")
        torch.backends.cudnn.allow_tf32 = precision.dtype is not None  # PyTorch's own default is True


def resolve(recipe: Recipe, device: torch.device) -> Precision:
    """The precision of a run. "auto" is float32 on a CPU and `run.amp_dtype` on a GPU.

    A GPU without bf16 falls back to fp16 with loss scaling; the caller logs `note`. Raises UserError for fp16 on a CPU.
    """
    wanted, note = recipe.run.precision, ""
    if wanted == "auto":
        wanted = "fp32" if device.type == "cpu" else (recipe.run.amp_dtype or "bf16")
        if wanted == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
            wanted, note = "fp16", "this GPU has no bf16: fp16 with loss scaling instead"
    if wanted == "fp16" and device.type == "cpu":
        raise UserError("run.precision fp16 needs a GPU: use fp32 or bf16 on a CPU")
    return Precision(wanted, {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[wanted], device, note)


def check_residual_dtype(recipe: Recipe, precision: Precision) -> None:
    """Raise UserError if training asks for a residual stream in bf16, and its steps do not compute in bf16."""
    if recipe.model.residual_dtype == "bfloat16" and precision.name != "bf16":
        reason = precision.note or f"this run's precision is {precision.name}"
        raise UserError(f"model.residual_dtype 'bfloat16' needs run.precision bf16, but {reason}")


def compiles(recipe: Recipe, device: torch.device) -> bool:
    """Whether student, teacher and loss are compiled: `run.compile`; "auto" is on with a GPU."""
    return recipe.run.compile == "on" or (recipe.run.compile == "auto" and device.type == "cuda")

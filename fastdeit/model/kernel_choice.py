"""Choose which operations of a run use Triton kernels and which use PyTorch."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import Any

import torch

from fastdeit.config import ModelConfig
from fastdeit.distributed import World
from fastdeit.pipelines.errors import UserError
from fastdeit.precision import Precision

# Operations, and their names in a log.
MODEL_OPS = {
    "assemble_tokens": "token assembly",
    "attention": "attention",
    "layer_norm": "LayerNorm with the residual",
    "bias_gelu": "bias + GELU",
}
OPS = {**MODEL_OPS, "distillation_loss": "the loss", "evaluate_heads": "the scores"}
# Operations that "auto" leaves to PyTorch because they measured slower, and that measurement. None so far.
SLOWER: dict[str, str] = {}


@dataclass(frozen=True)
class Kernels:
    """The operations `ops`, out of `OPS`, that run Triton kernels.

    left    the other operations, each with the reason why PyTorch runs it
    reason  the reason for this choice
    """

    ops: frozenset[str]
    left: dict[str, str]
    reason: str

    @property
    def name(self) -> str:
        """ "torch", or "triton" with the operations left out; runs with the same name round alike."""
        if not self.ops:
            return "torch"
        return "triton" + (f" without {', '.join(sorted(self.left))}" if self.left else "")

    def sentence(self) -> str:
        """The choice as a sentence for the log."""
        if not self.ops:
            return f"kernels torch: {self.reason}"
        running = ", ".join(words for op, words in OPS.items() if op in self.ops)
        left = "".join(f"; not {OPS[op]}: {why}" for op, why in self.left.items())
        return f"kernels triton, {self.reason}: {running}{left}"

    def event(self) -> dict[str, Any]:
        """The choice as an event for the log file."""
        return {"ops": [op for op in OPS if op in self.ops], "left": self.left, "reason": self.reason}


TORCH = Kernels(frozenset(), {}, "as requested")


def choose_kernels(cfg: ModelConfig, precision: Precision, num_classes: int, world: World) -> Kernels:
    """Resolve `model.kernels` for a model on a device.

    "triton" is every kernel that the model can use. "auto" is the same on a GPU, except for `SLOWER` and kernels whose
    results or gradients on a small batch differ from PyTorch's on any process. Raises UserError for "triton" if no
    kernel can run.
    """
    if cfg.kernels == "torch":
        return TORCH
    device, left = precision.device, _unsuited(cfg)
    obstacle = _obstacle(device)
    if cfg.kernels == "triton":
        if obstacle is not None:
            raise UserError(f"model.kernels triton is not available: {obstacle}. Set --model.kernels torch, or auto")
        reason = "as requested" + ("" if _on_gpu(device) else ", under Triton's interpreter, which is slow")
        return Kernels(frozenset(OPS) - left.keys(), left, reason)
    if obstacle is not None or not _on_gpu(device):
        return Kernels(frozenset(), {}, obstacle or "there is no GPU")
    left |= {op: why for op, why in SLOWER.items() if op not in left}
    left |= _failing(cfg, precision, num_classes, world, left)
    return Kernels(frozenset(OPS) - left.keys(), left, "each matched PyTorch on a small batch")


def _on_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def _obstacle(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if not _on_gpu(device) and os.environ.get("TRITON_INTERPRET", "0") != "1":
        return "there is no GPU"
    return None


def _unsuited(cfg: ModelConfig) -> dict[str, str]:
    """Kernels that this model cannot use."""
    if cfg.arch != "deit":
        return dict.fromkeys(MODEL_OPS, f"a {cfg.arch} is timm's own")
    if cfg.embed_dim // cfg.num_heads > 128:
        return {"attention": f"its head dim {cfg.embed_dim // cfg.num_heads} is above 128"}
    return {}


def _failing(
    cfg: ModelConfig, precision: Precision, num_classes: int, world: World, left: dict[str, str]
) -> dict[str, str]:
    """Operations whose check fails on any process, and the reason."""
    from fastdeit.model.kernel_checks import failure  # here, since it needs Triton

    reasons = {op: None if op in left else failure(op, cfg, precision, num_classes) for op in OPS}
    counts = world.sum(torch.tensor([why is not None for why in reasons.values()], device=precision.device).double())
    elsewhere = "its check failed on another process"
    return {op: why or elsewhere for (op, why), count in zip(reasons.items(), counts.tolist(), strict=True) if count}

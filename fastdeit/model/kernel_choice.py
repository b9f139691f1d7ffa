"""Choose which operations of a run use Triton kernels and which use PyTorch."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from fastdeit.distributed import World
from fastdeit.model import kernel_table
from fastdeit.model.timm_vit import as_deit
from fastdeit.pipelines.errors import UserError
from fastdeit.precision import Precision
from fastdeit.sections import ModelConfig

# Operations, and their names in a log.
MODEL_OPS = {
    "assemble_tokens": "token assembly",
    "attention": "attention",
    "layer_norm": "LayerNorm with the residual",
    "bias_gelu": "bias + GELU",
}
OPS = {**MODEL_OPS, "distillation_loss": "the loss", "evaluate_heads": "the scores"}


@dataclass(frozen=True)
class Kernels:
    """The operations `ops`, out of `OPS`, that run Triton kernels.

    left       the other operations, each with the reason why PyTorch runs it
    reason     the reason for this choice
    attention  the backend of PyTorch's attention; None: PyTorch chooses one
    table      the version of the table that made the choice; None: no table did
    note       a sentence about operations that the table lacks
    """

    ops: frozenset[str]
    left: dict[str, str]
    reason: str
    attention: str | None = None
    table: int | None = None
    note: str = ""

    @property
    def name(self) -> str:
        """What runs which operation, such as "triton without attention (cudnn)"; equal names round alike."""
        backend = {"attention": f"attention ({self.attention})"} if self.attention else {}
        if not self.ops:
            return " with ".join(["torch", *backend.values()])
        left = ", ".join(backend.get(op, op) for op in sorted(self.left))
        return "triton" + (f" without {left}" if left else "")

    def sentence(self) -> str:
        """The choice as a sentence for the log."""
        running = ", ".join(words for op, words in OPS.items() if op in self.ops)
        left = "".join(f"; not {OPS[op]}: {why}" for op, why in self.left.items())
        if not self.ops:
            return f"kernels torch: {self.reason}{left}"
        return f"kernels triton, {self.reason}: {running}{left}{self.note and f'. {self.note}'}"

    def event(self) -> dict[str, Any]:
        """The choice for the log file and the checkpoint."""
        return {**asdict(self), "ops": [op for op in OPS if op in self.ops]}


TORCH = Kernels(frozenset(), {}, "as requested")


def choose_kernels(
    cfg: ModelConfig, precision: Precision, num_classes: int, world: World, kept: Kernels | None = None
) -> Kernels:
    """Resolve `model.kernels` for a model on a device.

    "triton" is every kernel that the model can use. On a GPU, "auto" is `kept`, the choice of the checkpoint that the
    run continues from. Without `kept`, it is the table's choice for the card, and our kernel for each operation that
    the table lacks. In both cases, a kernel or backend is left out if its results or gradients on a small batch differ
    from PyTorch's on any process. All processes use the main process's choice, even on different cards. Raises
    UserError for "triton" if no kernel can run, and for a damaged table.
    """
    if cfg.kernels == "torch":
        return TORCH
    shape = cfg if cfg.arch == "deit" else as_deit(cfg)
    device, left = precision.device, _unsuited(cfg, shape)
    cfg = shape or cfg
    obstacle = _obstacle(device)
    if cfg.kernels == "triton":
        if obstacle is not None:
            raise UserError(f"model.kernels triton is not available: {obstacle}. Set --model.kernels torch, or auto")
        reason = "as requested" + ("" if _on_gpu(device) else ", under Triton's interpreter, which is slow")
        return Kernels(frozenset(OPS) - left.keys(), left, reason)
    if not _on_gpu(device):
        return Kernels(frozenset(), {}, obstacle or "there is no GPU")
    obstacle = world.first(obstacle)
    if obstacle is not None:
        return Kernels(frozenset(), {}, obstacle)
    wanted = world.from_main(kept or _from_table(cfg, precision, num_classes, left, world))
    failing = _failing(cfg, precision, num_classes, world, wanted)
    return replace(
        wanted,
        ops=wanted.ops - failing.keys(),
        left=wanted.left | failing,
        attention=None if "attention" in failing else wanted.attention,
    )


def _from_table(
    cfg: ModelConfig, precision: Precision, num_classes: int, left: dict[str, str], world: World
) -> Kernels:
    """The faster form of each operation on this card; ours if the table has no measurement."""
    table, card = kernel_table.read(), _card(precision.device)
    keys = {op: kernel_table.key(card, op, cfg, precision, num_classes) for op in OPS if op not in left}
    rows = {op: table.rows[key] for op, key in keys.items() if key in table.rows}
    slower = {op: row.reason() for op, row in rows.items() if row.choice != kernel_table.OURS}
    where = card if world.size == 1 else f"{card}, the main process's card"
    reason, note = "each matched PyTorch on a small batch", ""
    if rows:
        reason = f"measured on {where} (version {table.version} of the table), {reason}"
    if len(rows) < len(keys):
        unknown = ", ".join(OPS[op] for op in keys if op not in rows)
        note = (
            f"Not measured on {where}, so ours by default: {unknown}. `{kernel_table.COMMAND} --recipe RECIPE "
            f"--classes {num_classes}` in a checkout measures them; RECIPE is a name or a run's recipe.json"
        )
    return Kernels(
        frozenset(OPS) - left.keys() - slower.keys(),
        left | slower,
        reason,
        attention=rows["attention"].choice if "attention" in slower else None,
        table=table.version,
        note=note,
    )


def _card(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def _on_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def _obstacle(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if not _on_gpu(device) and os.environ.get("TRITON_INTERPRET", "0") != "1":
        return "there is no GPU"
    return None


def _unsuited(cfg: ModelConfig, shape: ModelConfig | None) -> dict[str, str]:
    """Kernels that this model cannot use; `shape` is that of a vision transformer, None of another network."""
    if shape is None:
        return dict.fromkeys(MODEL_OPS, f"a {cfg.arch} is timm's own")
    if shape.embed_dim // shape.num_heads > 128:
        return {"attention": f"its head dim {shape.embed_dim // shape.num_heads} is above 128"}
    return {}


def _failing(cfg: ModelConfig, precision: Precision, num_classes: int, world: World, wanted: Kernels) -> dict[str, str]:
    """Operations whose kernel or backend fails its check on any process, and the reason."""
    from fastdeit.model.kernel_checks import failure  # here, since it needs Triton

    def check(op: str) -> str | None:
        if op == "attention" and wanted.attention is not None:
            why = failure(op, cfg, precision, num_classes, wanted.attention)
            return why and f"PyTorch chooses its backend, since {wanted.attention}'s check failed: {why}"
        return failure(op, cfg, precision, num_classes) if op in wanted.ops else None

    reasons = {op: check(op) for op in OPS}
    counts = world.sum(torch.tensor([why is not None for why in reasons.values()], device=precision.device).double())
    elsewhere = "its check failed on another process"
    return {op: why or elsewhere for (op, why), count in zip(reasons.items(), counts.tolist(), strict=True) if count}

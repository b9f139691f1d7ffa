"""Build the network of a recipe: a DeiT, or a timm model to train as a teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import timm
import torch
from torch import nn

from fastdeit.model.attention_backend import use_backend
from fastdeit.model.deit import DeiT, StudentOutput, build_model
from fastdeit.model.kernel_choice import MODEL_OPS, TORCH, Kernels
from fastdeit.model.timm_vit import size_option
from fastdeit.pipelines.errors import UserError, fact
from fastdeit.sections import ModelConfig


class ConvnetStudent(nn.Module):
    """A timm model with the student's interface; its state dict is the timm model's own.

    left  "module: reason" for those modules of a vision transformer that run no kernel, though others do
    """

    def __init__(self, network: nn.Module, left: Sequence[str] = ()) -> None:
        super().__init__()
        self.network, self.left = network, tuple(left)

    def forward(self, images: torch.Tensor) -> StudentOutput:
        """Logits (B, K) of images (B, 3, S, S)."""
        return StudentOutput(self.network(images), None)

    def set_drop_path(self, masks: torch.Tensor | None, kept: Sequence[int] | None = None) -> None:
        """Do nothing: a timm model draws its own stochastic depth from PyTorch's generator."""

    def set_dropout(self, keys: torch.Tensor | None) -> None:
        """Do nothing: a timm model draws its own dropout from PyTorch's generator."""

    def state_dict(self, *args, **kwargs):  # type: ignore[override]
        return self.network.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):  # type: ignore[override]
        return self.network.load_state_dict(state_dict, strict=strict, assign=assign)


class OfClasses(nn.Module):
    """A network whose logits are those of some of its classes, `columns`, in that order."""

    columns: torch.Tensor

    def __init__(self, network: nn.Module, columns: Sequence[int]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("columns", torch.tensor(list(columns)), persistent=False)

    def forward(self, images: torch.Tensor) -> StudentOutput:
        cls, dist = self.network(images)
        return StudentOutput(cls[:, self.columns], None if dist is None else dist[:, self.columns])


def build_network(cfg: ModelConfig, num_classes: int, kernels: Kernels = TORCH) -> DeiT | ConvnetStudent:
    """A freshly initialised network; a DeiT and timm's vision transformers use `kernels`.

    Raises UserError for an arch unknown to timm, and for a resolution that timm cannot build it for.
    """
    if cfg.arch == "deit":
        model = build_model(cfg, num_classes)
        _use(kernels, model)
        return model
    if not timm.is_model(cfg.arch):
        close = timm.list_models(f"*{cfg.arch[:6]}*")[:5]
        hint = f", such as {', '.join(close)}" if close else ""
        raise UserError(f"model.arch '{cfg.arch}' is neither 'deit' nor a timm model{hint}")
    options: dict[str, Any] = {"drop_rate": cfg.drop_rate, **size_option(cfg.arch, cfg.img_size)}
    if cfg.drop_path:
        options["drop_path_rate"] = cfg.drop_path
    try:
        network = timm.create_model(cfg.arch, pretrained=False, num_classes=num_classes, **options)
    except (AssertionError, ArithmeticError, RuntimeError, ValueError) as error:
        raise UserError(f"timm cannot build {cfg.arch} with model.img_size {cfg.img_size}: {fact(error)}") from error
    return ConvnetStudent(network, _use(kernels, network))


def _use(kernels: Kernels, model: nn.Module) -> list[str]:
    """Make the model run its kernels, in place; "module: reason" for those that do not."""
    left: list[str] = []
    if kernels.ops & MODEL_OPS.keys():
        from fastdeit.model.fused import fuse  # here, since it needs Triton

        left = fuse(model, {op: why for op, why in kernels.left.items() if op in MODEL_OPS}).left
    if kernels.attention is not None:
        use_backend(model, kernels.attention)
    return left

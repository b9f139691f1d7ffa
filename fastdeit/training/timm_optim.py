"""Optimizers of timm under timm's names: LAMB, Lion, Muon and their like."""

from __future__ import annotations

import difflib
from typing import Any

import timm
import torch
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers

from fastdeit.pipelines.errors import UserError
from fastdeit.sections import OptimConfig

# timm lists these too; here NVIDIA's apex has a switch of its own, and nothing has tested bitsandbytes.
_OTHER_PACKAGES = {"fused": "--optim.name lamb --optim.implementation apex, or adamw", "bnb": "a name without bnb"}


def check_name(cfg: OptimConfig) -> None:
    """Raise UserError unless timm has an optimizer `optim.name` that a training step can use, with these options."""
    known = [name for name in map(str, list_optimizers()) if not name.startswith(tuple(_OTHER_PACKAGES))]
    for prefix, remedy in _OTHER_PACKAGES.items():
        if cfg.name.startswith(prefix):
            raise UserError(f"optim.name '{cfg.name}' needs another package: set {remedy}")
    if cfg.name not in known and cfg.name.lower() in known:
        raise UserError(f"optim.name '{cfg.name}' is written in lower case: --optim.name {cfg.name.lower()}")
    if cfg.name not in known:
        close: list[str] = difflib.get_close_matches(cfg.name, known, 4) or ["lamb", "lion", "muon"]
        raise UserError(
            f"optim.name '{cfg.name}' is neither adamw, sgd nor an optimizer of timm, such as {', '.join(close)}"
        )
    info = get_optimizer_info(cfg.name)
    if info.second_order:
        raise UserError(f"optim.name '{cfg.name}' needs second derivatives, which a training step does not compute")
    if cfg.name.startswith("kron"):
        raise UserError(f"optim.name '{cfg.name}' draws random numbers that no checkpoint holds: it cannot be resumed")
    if cfg.betas is not None and not (info.has_betas and info.num_betas == 2):
        raise UserError(f"optim.betas has no effect: {cfg.name} does not take two betas. Set --optim.betas None")
    if cfg.eps is not None and not info.has_eps:
        raise UserError(f"optim.eps has no effect: {cfg.name} takes none. Set --optim.eps None")
    if cfg.momentum != OptimConfig().momentum and not info.has_momentum:
        raise UserError(f"optim.momentum has no effect: {cfg.name} takes none. Leave it out")


def why_slow(optimizer: torch.optim.Optimizer, device: torch.device) -> str | None:
    """A sentence if timm's LAMB launches its update tensor by tensor on a GPU, as it did before timm 1.0.31."""
    if device.type != "cuda" or type(optimizer).__name__ != "Lamb" or "foreach" in optimizer.defaults:
        return None
    return (
        f"timm {timm.__version__} launches LAMB's update tensor by tensor, which costs more than the rest of a step of "
        f"a small model: pip install 'timm>=1.0.31', or --optim.implementation apex"
    )


def build_timm_optimizer(groups: list[dict[str, Any]], cfg: OptimConfig, lr: float) -> torch.optim.Optimizer:
    """timm's optimizer `optim.name` over `groups`, with timm's own betas and eps unless the recipe gives them.

    lr  the learning rate after warm-up, to which some of the optimizers refer the weight decay

    Raises UserError as `check_name` does.
    """
    check_name(cfg)
    options: dict[str, Any] = {"betas": cfg.betas, "eps": cfg.eps}
    options = {name: value for name, value in options.items() if value is not None}
    info = get_optimizer_info(cfg.name)
    if info.has_momentum:
        options["momentum"] = cfg.momentum
    return create_optimizer_v2(
        groups, opt=cfg.name, lr=lr, weight_decay=cfg.weight_decay, filter_bias_and_bn=False, **options
    )

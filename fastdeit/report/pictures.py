"""Shows images as the network saw them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastdeit.config import Recipe
from fastdeit.pipelines.plan.plan import CUTMIX, OPS, Plan


@dataclass(frozen=True)
class Missing:
    """Why a part of the page is missing."""

    why: str


@dataclass(frozen=True)
class Picture:
    """An image (H, W, 3) uint8, what it shows, and a line below it."""

    pixels: np.ndarray
    shows: str
    caption: str


def as_pixels(images: Tensor, recipe: Recipe) -> np.ndarray:
    """Normalised images (B, 3, S, S) as (B, S, S, 3) uint8."""
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (recipe.augment.mean, recipe.augment.std))
    levels = (images.float().cpu() * std + mean).clamp(0, 1) * 255
    return levels.round().byte().permute(0, 2, 3, 1).numpy()


def described(plan: Plan, sample: int) -> str:
    """What the augmentation did to a sample, besides crop and flip."""
    parts = [OPS[code] for code in plan.op[sample] if code]
    if plan.erase[sample, 2]:
        parts.append("erased")
    if plan.mixed[sample]:
        group = int(plan.group[sample])
        parts.append(f"{'CutMix' if plan.mix[group] == CUTMIX else 'Mixup'} {plan.lam[group]:.2f}")
    return ", ".join(parts) or "crop only"

"""DeiT III pre-trained on ImageNet-21k, then fine-tuned on ImageNet-1k: the authors' commands (README_revenge.md).

Both steps take DeiT III's simple random crop, CutMix alone, cross-entropy and LAMB. A mixing group is the batch that
one of their GPUs had.
"""

from __future__ import annotations

import dataclasses

from fastdeit.config import Recipe
from fastdeit.recipes.deit3 import deit3_base, deit3_huge, deit3_large, deit3_small
from fastdeit.sections import DataConfig, Departures, ObjectiveConfig


def _simple(
    recipe: Recipe, step: str, *, img_size: int, lr: float, epochs: int, drop_path: float, mix_group: int
) -> Recipe:
    """A recipe of DeiT III's own pre-training, with what both steps have instead."""
    replace = dataclasses.replace
    return replace(
        recipe,
        name=f"{recipe.name}_{step}",
        model=replace(recipe.model, img_size=img_size, drop_path=drop_path),
        objective=ObjectiveConfig(),
        data=DataConfig(repeats=1),
        augment=replace(recipe.augment, crop="simple", mixup_alpha=0.0, cutmix_alpha=1.0, label_smoothing=0.1),
        optim=replace(recipe.optim, lr=lr, weight_decay=0.02),
        run=replace(recipe.run, epochs=epochs),
        departures=Departures(mix_group=mix_group),
    )


def _finetune(recipe: Recipe, *, drop_path: float, mix_group: int) -> Recipe:
    recipe = _simple(recipe, "21k_224", img_size=224, lr=3e-4, epochs=50, drop_path=drop_path, mix_group=mix_group)
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, finetune=True))


def deit3_small_21k() -> Recipe:
    """DeiT III S on ImageNet-21k, 240 epochs at 224, to be fine-tuned by `deit3_small_21k_224`.

    fastdeit-train deit3_small_21k --data.train train21k.beton --data.val val21k.beton \
        --run.output runs/deit3_small_21k

    Hours: not measured.
    Top-1: 83.1 on ImageNet-1k after `deit3_small_21k_224` (authors' README).
    """
    return _simple(deit3_small(), "21k", img_size=224, lr=1e-3, epochs=240, drop_path=0.05, mix_group=128)


def deit3_base_21k() -> Recipe:
    """DeiT III B on ImageNet-21k, 240 epochs at 224, to be fine-tuned by `deit3_base_21k_224`.

    fastdeit-train deit3_base_21k --data.train train21k.beton --data.val val21k.beton \
        --run.output runs/deit3_base_21k

    Hours: not measured.
    Top-1: 85.7 on ImageNet-1k after `deit3_base_21k_224` (authors' README).
    """
    return _simple(deit3_base(), "21k", img_size=224, lr=1e-3, epochs=240, drop_path=0.1, mix_group=64)


def deit3_large_21k() -> Recipe:
    """DeiT III L on ImageNet-21k, 240 epochs at 224, to be fine-tuned by `deit3_large_21k_224`.

    fastdeit-train deit3_large_21k --data.train train21k.beton --data.val val21k.beton \
        --run.output runs/deit3_large_21k

    Hours: not measured.
    Top-1: 87.0 on ImageNet-1k after `deit3_large_21k_224` (authors' README).
    """
    return _simple(deit3_large(), "21k", img_size=224, lr=1e-3, epochs=240, drop_path=0.3, mix_group=64)


def deit3_huge_21k() -> Recipe:
    """DeiT III H/14 on ImageNet-21k, 90 epochs at 126, to be fine-tuned by `deit3_huge_21k_224`.

    The authors give 128 pixels, of which their patches read 126.

    fastdeit-train deit3_huge_21k --data.train train21k.beton --data.val val21k.beton \
        --run.output runs/deit3_huge_21k

    Hours: not measured.
    Top-1: 87.2 on ImageNet-1k after `deit3_huge_21k_224` (authors' README).
    """
    return _simple(deit3_huge(), "21k", img_size=126, lr=1e-3, epochs=90, drop_path=0.5, mix_group=64)


def deit3_small_21k_224() -> Recipe:
    """DeiT III S fine-tuned on ImageNet-1k at 224 from `deit3_small_21k` (`--model.init`), 50 epochs: 83.1 (authors).

    fastdeit-train deit3_small_21k_224 --data.train train.beton --data.val val.beton \
        --model.init runs/deit3_small_21k/checkpoints/last.pt \
        --run.output runs/deit3_small_21k_224

    Hours: not measured.
    Top-1: 83.1 (authors' README).
    """
    return _finetune(deit3_small(), drop_path=0.05, mix_group=128)


def deit3_base_21k_224() -> Recipe:
    """DeiT III B fine-tuned on ImageNet-1k at 224 from `deit3_base_21k` (`--model.init`), 50 epochs: 85.7 (authors).

    fastdeit-train deit3_base_21k_224 --data.train train.beton --data.val val.beton \
        --model.init runs/deit3_base_21k/checkpoints/last.pt \
        --run.output runs/deit3_base_21k_224

    Hours: not measured.
    Top-1: 85.7 (authors' README).
    """
    return _finetune(deit3_base(), drop_path=0.15, mix_group=64)


def deit3_large_21k_224() -> Recipe:
    """DeiT III L fine-tuned on ImageNet-1k at 224 from `deit3_large_21k` (`--model.init`), 50 epochs: 87.0 (authors).

    fastdeit-train deit3_large_21k_224 --data.train train.beton --data.val val.beton \
        --model.init runs/deit3_large_21k/checkpoints/last.pt \
        --run.output runs/deit3_large_21k_224

    Hours: not measured.
    Top-1: 87.0 (authors' README).
    """
    return _finetune(deit3_large(), drop_path=0.4, mix_group=64)


def deit3_huge_21k_224() -> Recipe:
    """DeiT III H/14 fine-tuned on ImageNet-1k at 224 from `deit3_huge_21k` (`--model.init`), 50 epochs: 87.2 (authors).

    fastdeit-train deit3_huge_21k_224 --data.train train.beton --data.val val.beton \
        --model.init runs/deit3_huge_21k/checkpoints/last.pt \
        --run.output runs/deit3_huge_21k_224

    Hours: not measured.
    Top-1: 87.2 (authors' README).
    """
    return _finetune(deit3_huge(), drop_path=0.45, mix_group=64)

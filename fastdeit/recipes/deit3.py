"""DeiT III, "Revenge of the ViT": Touvron et al., arXiv 2204.07118, and the authors' commands (README_revenge.md).

A mixing group is the batch that one of their GPUs had. Their code never evaluates the average of the weights that it
keeps; here it is evaluated too.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from fastdeit.config import Recipe
from fastdeit.sections import (
    AugmentConfig,
    DataConfig,
    Departures,
    EmaConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    RunConfig,
)


class _Size(NamedTuple):
    """A model, and what differs between the sizes in pre-training."""

    embed_dim: int
    depth: int
    num_heads: int
    patch_size: int
    img_size: int
    lr: float
    drop_path: float
    mix_group: int


_SIZES = {
    "small": _Size(384, 12, 6, 16, 224, 4e-3, 0.05, 256),
    "medium": _Size(512, 12, 8, 16, 224, 3e-3, 0.1, 256),
    "base": _Size(768, 12, 12, 16, 192, 3e-3, 0.2, 256),
    "large": _Size(1024, 24, 16, 16, 192, 3e-3, 0.45, 64),
    "huge": _Size(1280, 32, 16, 14, 154, 3e-3, 0.6, 64),  # the authors give 160, of which their patches read 154
}


def _pretrain(name: str) -> Recipe:
    size = _SIZES[name]
    return Recipe(
        name=f"deit3_{name}",
        model=ModelConfig(
            img_size=size.img_size,
            patch_size=size.patch_size,
            embed_dim=size.embed_dim,
            depth=size.depth,
            num_heads=size.num_heads,
            layer_scale=1e-4,
            no_embed_class=True,
            drop_path=size.drop_path,
            drop_path_uniform=True,
        ),
        objective=ObjectiveConfig(loss="bce", bce_target_thresh=0.0),
        data=DataConfig(repeats=3),
        augment=AugmentConfig(
            policy="three_augment",
            color_jitter=0.3,
            erase_prob=0.0,
            mixup_alpha=0.8,
            cutmix_alpha=1.0,
            label_smoothing=0.0,
            eval_crop=1.0,
        ),
        optim=OptimConfig(name="lamb", lr=size.lr, lr_batch=0, eps=1e-8, weight_decay=0.05, min_lr=1e-5),
        ema=EmaConfig(decay=0.99996),
        run=RunConfig(epochs=800, global_batch=2048),
        departures=Departures(mix_group=size.mix_group),
    )


def _finetune(name: str, img_size: int, *, drop_path: float, mix_group: int) -> Recipe:
    recipe, replace = _pretrain(name), dataclasses.replace
    return replace(
        recipe,
        name=f"{recipe.name}_{img_size}",
        model=replace(recipe.model, img_size=img_size, drop_path=drop_path, finetune=True),
        objective=ObjectiveConfig(),
        data=replace(recipe.data, repeats=1),
        augment=replace(recipe.augment, policy="randaugment", randaugment="rand-m9-mstd0.5-inc1", label_smoothing=0.1),
        # The rate stays at 1e-5 after warm-up: that is also the authors' lowest.
        optim=OptimConfig(name="adamw", lr=1e-5, lr_batch=0, weight_decay=0.1, min_lr=1e-5),
        run=replace(recipe.run, epochs=20, global_batch=512),
        departures=Departures(mix_group=mix_group),
    )


def deit3_small() -> Recipe:
    """DeiT III S, 22 M parameters, 800 epochs at 224: 81.4 top-1 (authors).

    fastdeit-train deit3_small --data.train train.beton --data.val val.beton \
        --run.output runs/deit3_small

    Hours: not measured.
    Top-1: 81.4 (authors' README).
    """
    return _pretrain("small")


def deit3_medium() -> Recipe:
    """DeiT III M, 39 M parameters, 800 epochs at 224: 83.0 top-1 (authors).

    fastdeit-train deit3_medium --data.train train.beton --data.val val.beton \
        --run.output runs/deit3_medium

    Hours: not measured.
    Top-1: 83.0 (authors' README). They give no command for this size: the drop path rate, between S and B, is ours.
    """
    return _pretrain("medium")


def deit3_base() -> Recipe:
    """DeiT III B, 87 M parameters, 800 epochs at 192, to be fine-tuned by `deit3_base_224`.

    fastdeit-train deit3_base --data.train train.beton --data.val val.beton \
        --run.output runs/deit3_base

    Hours: not measured.
    Top-1: 83.8 after `deit3_base_224` (authors' README).
    """
    return _pretrain("base")


def deit3_large() -> Recipe:
    """DeiT III L, 304 M parameters, 800 epochs at 192, to be fine-tuned by `deit3_large_224`.

    fastdeit-train deit3_large --data.train train.beton --data.val val.beton \
        --run.output runs/deit3_large

    Hours: not measured.
    Top-1: 84.9 after `deit3_large_224` (authors' README).
    """
    return _pretrain("large")


def deit3_huge() -> Recipe:
    """DeiT III H/14, 632 M parameters, 800 epochs at 154, to be fine-tuned by `deit3_huge_224`.

    fastdeit-train deit3_huge --data.train train.beton --data.val val.beton \
        --run.output runs/deit3_huge

    Hours: not measured.
    Top-1: 85.2 after `deit3_huge_224` (authors' README).
    """
    return _pretrain("huge")


def deit3_small_384() -> Recipe:
    """DeiT III S fine-tuned at 384 from `deit3_small` (`--model.init`), 20 epochs: 83.4 top-1 (authors).

    fastdeit-train deit3_small_384 --data.train train.beton --data.val val.beton \
        --model.init runs/deit3_small/checkpoints/last.pt \
        --run.output runs/deit3_small_384

    Hours: not measured.
    Top-1: 83.4 (authors' README).
    """
    return _finetune("small", 384, drop_path=0.0, mix_group=64)


def deit3_base_224() -> Recipe:
    """DeiT III B fine-tuned at 224 from `deit3_base` (`--model.init`), 20 epochs: 83.8 top-1 (authors).

    fastdeit-train deit3_base_224 --data.train train.beton --data.val val.beton \
        --model.init runs/deit3_base/checkpoints/last.pt \
        --run.output runs/deit3_base_224

    Hours: not measured.
    Top-1: 83.8 (authors' README).
    """
    return _finetune("base", 224, drop_path=0.2, mix_group=64)


def deit3_base_384() -> Recipe:
    """DeiT III B fine-tuned at 384 from `deit3_base_224` (`--model.init`), 20 epochs: 85.0 top-1 (authors).

    fastdeit-train deit3_base_384 --data.train train.beton --data.val val.beton \
        --model.init runs/deit3_base_224/checkpoints/last.pt \
        --run.output runs/deit3_base_384

    Hours: not measured.
    Top-1: 85.0 (authors' README).
    """
    return _finetune("base", 384, drop_path=0.15, mix_group=32)


def deit3_large_224() -> Recipe:
    """DeiT III L fine-tuned at 224 from `deit3_large` (`--model.init`), 20 epochs: 84.9 top-1 (authors).

    fastdeit-train deit3_large_224 --data.train train.beton --data.val val.beton \
        --model.init runs/deit3_large/checkpoints/last.pt \
        --run.output runs/deit3_large_224

    Hours: not measured.
    Top-1: 84.9 (authors' README).
    """
    return _finetune("large", 224, drop_path=0.45, mix_group=64)


def deit3_large_384() -> Recipe:
    """DeiT III L fine-tuned at 384 from `deit3_large_224` (`--model.init`), 20 epochs: 85.8 top-1 (authors).

    fastdeit-train deit3_large_384 --data.train train.beton --data.val val.beton \
        --model.init runs/deit3_large_224/checkpoints/last.pt \
        --run.output runs/deit3_large_384

    Hours: not measured.
    Top-1: 85.8 (authors' README).
    """
    return _finetune("large", 384, drop_path=0.4, mix_group=16)


def deit3_huge_224() -> Recipe:
    """DeiT III H/14 fine-tuned at 224 from `deit3_huge` (`--model.init`), 20 epochs: 85.2 top-1 (authors).

    fastdeit-train deit3_huge_224 --data.train train.beton --data.val val.beton \
        --model.init runs/deit3_huge/checkpoints/last.pt \
        --run.output runs/deit3_huge_224

    Hours: not measured.
    Top-1: 85.2 (authors' README).
    """
    return _finetune("huge", 224, drop_path=0.55, mix_group=32)

"""DeiT, pre-trained and fine-tuned at 384: Touvron et al., arXiv 2012.12877, Tables 5 and 9.

"Step alone" is the time for 300 epochs at the measured rate of the training step on an H200, with random data
(docs/kernels.md).
"""

import dataclasses

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

_SIZES = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}


def _pretrain(size: str, *, distilled: bool) -> Recipe:
    embed_dim, num_heads = _SIZES[size]
    return Recipe(
        name=f"deit_{size}" + ("_distilled" if distilled else ""),
        model=ModelConfig(embed_dim=embed_dim, num_heads=num_heads, distilled=distilled, drop_path=0.1),
        objective=ObjectiveConfig(distillation="hard" if distilled else "none"),
        data=DataConfig(repeats=3),
        augment=AugmentConfig(
            policy="randaugment",
            randaugment="rand-m9-mstd0.5-inc1",
            erase_prob=0.25,
            mixup_alpha=0.8,
            cutmix_alpha=1.0,
            label_smoothing=0.1,
        ),
        optim=OptimConfig(name="adamw", lr=5e-4, lr_batch=512, weight_decay=0.05, warmup_epochs=5.0, min_lr=1e-5),
        ema=EmaConfig(decay=0.99996),
        run=RunConfig(epochs=300, global_batch=1024),
    )


def deit_tiny() -> Recipe:
    """DeiT-Ti, 5 M parameters, 300 epochs: 72.2 top-1 (paper).

    fastdeit-train deit_tiny --data.train train.beton --data.val val.beton --run.output runs/deit_tiny

    Hours: not measured. Step alone on an H200: 4.4 hours at 24,209 images/s.
    Top-1: 72.2 (paper, Table 5).
    """
    return _pretrain("tiny", distilled=False)


def deit_small() -> Recipe:
    """DeiT-S, 22 M parameters, 300 epochs: 79.8 top-1 (paper).

    fastdeit-train deit_small --data.train train.beton --data.val val.beton --run.output runs/deit_small

    Hours: not measured. Step alone on an H200: 9.8 hours at 10,921 images/s.
    Top-1: 79.8 (paper, Table 5).
    """
    return _pretrain("small", distilled=False)


def deit_base() -> Recipe:
    """DeiT-B, 86 M parameters, 300 epochs: 81.8 top-1 (paper).

    fastdeit-train deit_base --data.train train.beton --data.val val.beton --run.output runs/deit_base

    Hours: not measured (paper: 53 on 8 V100). Step alone on an H200: 26 hours at 4,049 images/s.
    Top-1: 81.8 (paper, Table 5).
    """
    return _pretrain("base", distilled=False)


def deit_tiny_distilled() -> Recipe:
    """DeiT-Ti with distillation token, hard labels of a RegNetY-16GF, 300 epochs: 74.5 top-1 (paper).

    fastdeit-train deit_tiny_distilled --data.train train.beton --data.val val.beton \
        --teacher.checkpoint regnety_160.pth --run.output runs/deit_tiny_distilled

    Hours: not measured. A teacher in the loop costs time in each step; `fastdeit-label` stores its labels once.
    Top-1: 74.5 (paper, Table 5), with a teacher of 82.9.
    """
    return _pretrain("tiny", distilled=True)


def deit_small_distilled() -> Recipe:
    """DeiT-S with distillation token, hard labels of a RegNetY-16GF, 300 epochs: 81.2 top-1 (paper).

    fastdeit-train deit_small_distilled --data.train train.beton --data.val val.beton \
        --teacher.checkpoint regnety_160.pth --run.output runs/deit_small_distilled

    Hours: not measured. A teacher in the loop costs time in each step; `fastdeit-label` stores its labels once.
    Top-1: 81.2 (paper, Table 5), with a teacher of 82.9.
    """
    return _pretrain("small", distilled=True)


def deit_base_distilled() -> Recipe:
    """DeiT-B with distillation token, hard labels of a RegNetY-16GF, 300 epochs: 83.4 top-1 (paper).

    fastdeit-train deit_base_distilled --data.train train.beton --data.val val.beton \
        --teacher.checkpoint regnety_160.pth --run.output runs/deit_base_distilled

    Hours: not measured. A teacher in the loop costs time in each step; `fastdeit-label` stores its labels once.
    Top-1: 83.4 (paper, Table 5), with a teacher of 82.9.
    """
    return _pretrain("base", distilled=True)


def _finetune_384(recipe: Recipe) -> Recipe:
    replace = dataclasses.replace
    return replace(
        recipe,
        name=f"{recipe.name}_384",
        model=replace(recipe.model, img_size=384, finetune=True),
        teacher=replace(recipe.teacher, img_size=384),
        optim=replace(recipe.optim, lr=5e-6, lr_batch=0, min_lr=5e-6, warmup_epochs=5.0, weight_decay=1e-8),
        run=replace(recipe.run, epochs=30, global_batch=512),
        departures=Departures(finetune_mode="eval"),  # deit issue 177: fine-tuning is best without stochastic depth
    )


def deit_base_384() -> Recipe:
    """DeiT-B fine-tuned at 384 from its 224 checkpoint (`--model.init`), 30 epochs: 83.1 top-1 (paper).

    fastdeit-train deit_base_384 --data.train train.beton --data.val val.beton \
        --model.init runs/deit_base/checkpoints/checkpoint-000375300.pt --run.output runs/deit_base_384

    Hours: not measured (paper: 20 on 8 V100).
    Top-1: 83.1 (paper, Table 5).
    """
    return _finetune_384(deit_base())


def deit_base_distilled_384() -> Recipe:
    """Distilled DeiT-B fine-tuned at 384 (`--model.init`), 30 epochs: 84.5 top-1 (paper).

    fastdeit-train deit_base_distilled_384 --data.train train.beton --data.val val.beton \
        --model.init runs/deit_base_distilled/checkpoints/checkpoint-000375300.pt --teacher.checkpoint regnety_160.pth \
        --run.output runs/deit_base_distilled_384

    Hours: not measured (paper: 20 on 8 V100 without distillation).
    Top-1: 84.5 (paper, Table 5).
    """
    return _finetune_384(deit_base_distilled())


def deit_tiny_384() -> Recipe:
    """DeiT-Ti fine-tuned at 384 from its 224 checkpoint (`--model.init`), 30 epochs.

    fastdeit-train deit_tiny_384 --data.train train.beton --data.val val.beton \
        --model.init runs/deit_tiny/checkpoints/checkpoint-000375300.pt --run.output runs/deit_tiny_384

    Hours: not measured.
    Top-1: not measured, and not in the paper.
    """
    return _finetune_384(deit_tiny())


def deit_small_384() -> Recipe:
    """DeiT-S fine-tuned at 384 from its 224 checkpoint (`--model.init`), 30 epochs.

    fastdeit-train deit_small_384 --data.train train.beton --data.val val.beton \
        --model.init runs/deit_small/checkpoints/checkpoint-000375300.pt --run.output runs/deit_small_384

    Hours: not measured.
    Top-1: not measured, and not in the paper.
    """
    return _finetune_384(deit_small())


def deit_tiny_distilled_384() -> Recipe:
    """Distilled DeiT-Ti fine-tuned at 384 (`--model.init`), 30 epochs.

    fastdeit-train deit_tiny_distilled_384 --data.train train.beton --data.val val.beton \
        --model.init runs/deit_tiny_distilled/checkpoints/checkpoint-000375300.pt --teacher.checkpoint regnety_160.pth \
        --run.output runs/deit_tiny_distilled_384

    Hours: not measured.
    Top-1: not measured, and not in the paper.
    """
    return _finetune_384(deit_tiny_distilled())


def deit_small_distilled_384() -> Recipe:
    """Distilled DeiT-S fine-tuned at 384 (`--model.init`), 30 epochs.

    fastdeit-train deit_small_distilled_384 --data.train train.beton --data.val val.beton \
        --model.init runs/deit_small_distilled/checkpoints/checkpoint-000375300.pt \
        --teacher.checkpoint regnety_160.pth --run.output runs/deit_small_distilled_384

    Hours: not measured.
    Top-1: not measured, and not in the paper.
    """
    return _finetune_384(deit_small_distilled())

"""Teachers, and students of small data sets: fine-tuning on one's own images, Fashion-MNIST."""

import dataclasses

from fastdeit.config import Recipe
from fastdeit.recipes.deit import deit_base, deit_small, deit_tiny, deit_tiny_distilled
from fastdeit.sections import Departures, EmaConfig, ModelConfig


def convnet_teacher() -> Recipe:
    """A timm convnet (`--model.arch`) trained from scratch with the same data path, to be a teacher.

    fastdeit-train convnet_teacher --data.train train.beton --data.val val.beton --run.output runs/teacher

    Hours and top-1: not measured. The demo trains one on scikit-learn's digits.
    """
    replace = dataclasses.replace
    recipe = Recipe(name="convnet_teacher", model=ModelConfig(arch="resnet18", drop_path=0.0))
    return replace(
        recipe,
        augment=replace(recipe.augment, policy="plain", erase_prob=0.0, mixup_alpha=0.0, cutmix_alpha=0.0),
        data=replace(recipe.data, repeats=1),
        ema=EmaConfig(enabled=False),
    )


def _finetune(recipe: Recipe) -> Recipe:
    replace = dataclasses.replace
    return replace(
        recipe,
        name=f"{recipe.name}_finetune",
        model=replace(recipe.model, finetune=True),
        data=replace(recipe.data, repeats=1),
        # Without mixing, a batch of any size will do.
        augment=replace(recipe.augment, crop_scale=(0.3, 1.0), mixup_alpha=0.0, cutmix_alpha=0.0),
        optim=replace(recipe.optim, lr=2e-4, lr_batch=0, min_lr=1e-6, warmup_epochs=2.0, layer_decay=0.75),
        ema=EmaConfig(enabled=False),
        run=replace(recipe.run, epochs=30, global_batch=64),
        departures=Departures(mix_group=1),
    )


def deit_tiny_finetune() -> Recipe:
    """DeiT-Ti fine-tuned on your own images from its ImageNet checkpoint (`--model.init`), 30 epochs.

    fastdeit-train deit_tiny_finetune --data.train photos/train --data.hold_out 0.1 \
        --model.init deit_tiny_patch16_224.pth --run.output runs/photos

    Hours: not measured.
    Top-1: not measured. AdamW with layer-wise learning-rate decay, as in BEiT and MAE.
    """
    return _finetune(deit_tiny())


def deit_small_finetune() -> Recipe:
    """DeiT-S fine-tuned on your own images from its ImageNet checkpoint (`--model.init`), 30 epochs.

    fastdeit-train deit_small_finetune --data.train photos/train --data.hold_out 0.1 \
        --model.init deit_small_patch16_224.pth --run.output runs/photos

    Hours: not measured.
    Top-1: not measured. AdamW with layer-wise learning-rate decay, as in BEiT and MAE.
    """
    return _finetune(deit_small())


def deit_base_finetune() -> Recipe:
    """DeiT-B fine-tuned on your own images from its ImageNet checkpoint (`--model.init`), 30 epochs.

    fastdeit-train deit_base_finetune --data.train photos/train --data.hold_out 0.1 \
        --model.init deit_base_patch16_224.pth --run.output runs/photos

    Hours: not measured.
    Top-1: not measured. AdamW with layer-wise learning-rate decay, as in BEiT and MAE.
    """
    return _finetune(deit_base())


def _fashion_mnist(recipe: Recipe, *, epochs: int, lr: float, warmup: float) -> Recipe:
    replace = dataclasses.replace
    return replace(
        recipe,
        model=replace(recipe.model, img_size=28),
        augment=replace(
            recipe.augment,
            policy="plain",
            crop_scale=(0.7, 1.0),
            crop_ratio=(0.9, 1.1),
            eval_crop=1.0,
            erase_prob=0.0,
            mean=(0.286, 0.286, 0.286),
            std=(0.353, 0.353, 0.353),
        ),
        optim=replace(recipe.optim, lr=lr, lr_batch=0, warmup_epochs=warmup),
        run=replace(recipe.run, epochs=epochs, global_batch=256, eval_batch=500),
    )


def fashion_mnist_teacher() -> Recipe:
    """A ResNet for Fashion-MNIST on a CPU, the teacher of `fashion_mnist_distilled`.

    fastdeit-train fashion_mnist_teacher --data.train fm-train.beton --data.val fm-test.beton \
        --run.output runs/fm-teacher

    Hours: 0.25 (15 minutes) on two shared CPU cores for 8 epochs, measured.
    Top-1: 92.12 on the 10,000 test images, measured (benchmarks/results).
    """
    replace = dataclasses.replace
    recipe = _fashion_mnist(convnet_teacher(), epochs=8, lr=2e-3, warmup=1)
    return replace(recipe, name="fashion_mnist_teacher", model=replace(recipe.model, arch="resnet10t"))


def fashion_mnist_distilled() -> Recipe:
    """A small distilled DeiT for Fashion-MNIST on a CPU (`--teacher.checkpoint`).

    fastdeit-train fashion_mnist_distilled --data.train fm-train.beton --data.val fm-test.beton \
        --teacher.checkpoint runs/fm-teacher/checkpoints/checkpoint-000001872.pt --run.output runs/fm

    Hours: 1.3 (78 minutes) on two shared CPU cores for 24 epochs, measured.
    Top-1: class head 91.09, distillation head 91.18, both 91.13, on the 10,000 test images, measured
    (benchmarks/results).
    """
    replace = dataclasses.replace
    recipe = _fashion_mnist(deit_tiny_distilled(), epochs=24, lr=1.5e-3, warmup=1)
    return replace(
        recipe,
        name="fashion_mnist_distilled",
        model=replace(recipe.model, patch_size=4, embed_dim=96, depth=4, num_heads=3, drop_path=0.0),
        augment=replace(recipe.augment, crop_scale=(0.9, 1.0), mixup_alpha=0.0, cutmix_alpha=0.0, label_smoothing=0.05),
        data=replace(recipe.data, repeats=1),
        optim=replace(recipe.optim, betas=(0.9, 0.98)),
        teacher=replace(recipe.teacher, name="resnet10t"),
        ema=replace(recipe.ema, decay=0.998),
        run=replace(recipe.run, global_batch=128, eval_every=2),
    )

"""Named recipes: functions that return a `Recipe`, to be overridden from the command line or a file.

Each docstring gives the command, the hours, and the top-1 accuracy. Hyperparameters and ImageNet accuracies come from
Touvron et al., arXiv 2012.12877 (Tables 5 and 9, and the section on transfer). No recipe has been trained on ImageNet
with this code. "Step alone" is the time for 300 epochs at the measured rate of the training step on an H200, with
random data (docs/kernels.md).
"""

import dataclasses
from collections.abc import Callable

from fastdeit.config import (
    AugmentConfig,
    DataConfig,
    Departures,
    EmaConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    Recipe,
    RunConfig,
)
from fastdeit.pipelines.errors import UserError

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


def deit_base_transfer() -> Recipe:
    """DeiT-B transferred to a small data set (`--model.init`), 1000 epochs: CIFAR-10 99.1 (paper).

    fastdeit-train deit_base_transfer --data.train cifar-train.beton --data.val cifar-test.beton \
        --model.init runs/deit_base/checkpoints/checkpoint-000375300.pt --run.output runs/cifar

    Hours: not measured.
    Top-1: CIFAR-10 99.1, CIFAR-100 90.8, Flowers-102 98.4, Stanford Cars 92.1 (paper, DeiT-B at 224 or 384). SGD as the
    authors ran it on CIFAR-10 and Cars (deit issue 45).
    """
    replace = dataclasses.replace
    recipe = deit_base()
    return replace(
        recipe,
        name="deit_base_transfer",
        model=replace(recipe.model, drop_path=0.0, finetune=True),
        augment=replace(recipe.augment, erase_prob=0.0),
        optim=replace(recipe.optim, name="sgd", lr=0.01, lr_batch=0, weight_decay=1e-4),
        run=replace(recipe.run, epochs=1000, global_batch=768),
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


RECIPES: dict[str, Callable[[], Recipe]] = {
    f.__name__: f
    for f in (
        deit_tiny,
        deit_small,
        deit_base,
        deit_tiny_distilled,
        deit_small_distilled,
        deit_base_distilled,
        deit_tiny_384,
        deit_small_384,
        deit_base_384,
        deit_tiny_distilled_384,
        deit_small_distilled_384,
        deit_base_distilled_384,
        deit_base_transfer,
        deit_tiny_finetune,
        deit_small_finetune,
        deit_base_finetune,
        convnet_teacher,
        fashion_mnist_teacher,
        fashion_mnist_distilled,
    )
}


def recipe_of(recipe: str | Recipe) -> Recipe:
    """The recipe itself, or that of the name. Raises UserError as `recipe_named` does."""
    return recipe_named(recipe) if isinstance(recipe, str) else recipe


def recipe_named(name: str) -> Recipe:
    """The recipe of this name. Raises UserError if there is none."""
    if name not in RECIPES:
        raise UserError(f"there is no recipe '{name}': choose one of {', '.join(RECIPES)}")
    return RECIPES[name]()

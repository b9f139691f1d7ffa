"""DeiT-B transferred from ImageNet to other data sets: the paper's section 5.4, with the authors' hyperparameters.

The authors published hyperparameters for CIFAR-10 and Cars (deit issue 45) and for iNaturalist (deit issue 105).
CIFAR-100 and Flowers-102 use those of CIFAR-10 here. All other settings are those of `deit_base`.
"""

import dataclasses

from fastdeit.config import Recipe
from fastdeit.recipes.deit import deit_base


def _sgd(name: str) -> Recipe:
    replace, recipe = dataclasses.replace, deit_base()
    return replace(
        recipe,
        name=f"deit_base_{name}",
        model=replace(recipe.model, drop_path=0.0, finetune=True),
        augment=replace(recipe.augment, erase_prob=0.0),
        optim=replace(recipe.optim, name="sgd", lr=0.01, lr_batch=0, weight_decay=1e-4),
        run=replace(recipe.run, epochs=1000, global_batch=768),
    )


def _inaturalist(name: str) -> Recipe:
    replace, recipe = dataclasses.replace, deit_base()
    return replace(
        recipe,
        name=f"deit_base_{name}",
        model=replace(recipe.model, drop_path=0.1, finetune=True),
        augment=replace(recipe.augment, erase_prob=0.1),
        optim=replace(recipe.optim, name="adamw", lr=7.5e-5, lr_batch=0, weight_decay=0.05),
        run=replace(recipe.run, epochs=360, global_batch=768),
    )


def deit_base_transfer() -> Recipe:
    """DeiT-B on a small data set, from its ImageNet checkpoint (`--model.init`), 1000 epochs.

    fastdeit-train deit_base_transfer --data.train small-train.beton --data.val small-val.beton \
        --model.init runs/deit_base/checkpoints/last.pt --run.output runs/small

    Hours: not measured.
    Top-1: depends on the data set; see the `deit_base_*` recipes for the paper's data sets.
    """
    return _sgd("transfer")


def deit_base_cifar10() -> Recipe:
    """DeiT-B on CIFAR-10, from its ImageNet checkpoint (`--model.init`), 1000 epochs: 99.1 top-1 (paper).

    fastdeit convert cifar:cifar-10-python.tar.gz:train cifar10-train.beton
    fastdeit-train deit_base_cifar10 --data.train cifar10-train.beton --data.val cifar10-test.beton \
        --model.init runs/deit_base/checkpoints/last.pt --run.output runs/cifar10

    Hours: not measured.
    Top-1: 99.1 (paper, Table 7, DeiT-B; this recipe trains at 224).
    """
    return _sgd("cifar10")


def deit_base_cifar100() -> Recipe:
    """DeiT-B on CIFAR-100, from its ImageNet checkpoint (`--model.init`), 1000 epochs: 90.8 top-1 (paper).

    fastdeit convert cifar:cifar-100-python.tar.gz:train cifar100-train.beton
    fastdeit-train deit_base_cifar100 --data.train cifar100-train.beton --data.val cifar100-test.beton \
        --model.init runs/deit_base/checkpoints/last.pt --run.output runs/cifar100

    Hours: not measured.
    Top-1: 90.8 (paper, Table 7, DeiT-B; this recipe trains at 224).
    """
    return _sgd("cifar100")


def deit_base_flowers102() -> Recipe:
    """DeiT-B on Flowers-102, from its ImageNet checkpoint (`--model.init`), 1000 epochs: 98.4 top-1 (paper).

    fastdeit convert torchvision:Flowers102:data --split train+val flowers-train.beton
    fastdeit-train deit_base_flowers102 --data.train flowers-train.beton --data.val flowers-test.beton \
        --model.init runs/deit_base/checkpoints/last.pt --run.output runs/flowers102

    Hours: not measured.
    Top-1: 98.4 (paper, Table 7, DeiT-B; this recipe trains at 224).
    """
    return _sgd("flowers102")


def deit_base_cars() -> Recipe:
    """DeiT-B on Stanford Cars, from its ImageNet checkpoint (`--model.init`), 1000 epochs: 92.1 top-1 (paper).

    fastdeit convert torchvision:StanfordCars:data:train cars-train.beton
    fastdeit-train deit_base_cars --data.train cars-train.beton --data.val cars-test.beton \
        --model.init runs/deit_base/checkpoints/last.pt --run.output runs/cars

    Hours: not measured.
    Top-1: 92.1 (paper, Table 7, DeiT-B; this recipe trains at 224).
    """
    return _sgd("cars")


def deit_base_inat18() -> Recipe:
    """DeiT-B on iNaturalist 2018, from its ImageNet checkpoint (`--model.init`), 360 epochs: 73.2 top-1 (paper).

    fastdeit convert train2018.json inat18-train.beton --max-side 500
    fastdeit-train deit_base_inat18 --data.train inat18-train.beton --data.val inat18-val.beton \
        --model.init runs/deit_base/checkpoints/last.pt --run.output runs/inat18

    Hours: not measured.
    Top-1: 73.2 (paper, Table 7, DeiT-B).
    """
    return _inaturalist("inat18")


def deit_base_inat19() -> Recipe:
    """DeiT-B on iNaturalist 2019, from its ImageNet checkpoint (`--model.init`), 360 epochs: 77.7 top-1 (paper).

    fastdeit convert train2019.json inat19-train.beton --max-side 500
    fastdeit-train deit_base_inat19 --data.train inat19-train.beton --data.val inat19-val.beton \
        --model.init runs/deit_base/checkpoints/last.pt --run.output runs/inat19

    Hours: not measured.
    Top-1: 77.7 (paper, Table 7, DeiT-B).
    """
    return _inaturalist("inat19")

"""Short schedules, and a curriculum: Wang et al., EfficientTrain++, arXiv 2405.08768, and the authors' commands.

All use the hyperparameters of the authors' scripts: batch 4,096, no repeated augmentation, no average of the weights.
The scripts cover DeiT-Ti and DeiT-S; the DeiT-B recipes use the same values. A mixing group has 256 images, the
per-GPU batch of their DeiT-S script at 192 and 224 pixels.
"""

from __future__ import annotations

import dataclasses

from fastdeit.config import Recipe
from fastdeit.recipes.deit import deit_base, deit_small, deit_tiny
from fastdeit.sections import CurriculumConfig, DataConfig, Departures, EmaConfig, OptimConfig

# Ten parts: image size, and RandAugment's magnitude, equal to the index of the part (_ET_pp_main_deitS.py).
_SIZES = (96, 96, 160, 160, 160, 160, 192, 192, 224, 224)
_MAGNITUDES = tuple(map(float, range(10)))


def _short(recipe: Recipe, name: str, *, epochs: int, warmup: float, drop_path: float) -> Recipe:
    replace = dataclasses.replace
    return replace(
        recipe,
        name=f"{recipe.name}_{name}",
        model=replace(recipe.model, drop_path=drop_path),
        data=DataConfig(repeats=1),
        optim=OptimConfig(
            name="adamw",
            lr=4e-3,
            lr_batch=0,
            weight_decay=0.05,
            clip_grad=5.0,
            warmup_epochs=warmup,
            warmup_lr=0.0,
            warmup_prefix=True,
            min_lr=1e-6,
        ),
        ema=EmaConfig(enabled=False),
        run=replace(recipe.run, epochs=epochs, global_batch=4096),
        departures=Departures(mix_group=256),
    )


def _curriculum(recipe: Recipe) -> Recipe:
    # 469 epochs cost as much as 200 epochs at 224 pixels; warm-up is 20% of the run.
    recipe = _short(recipe, "curriculum", epochs=469, warmup=93.8, drop_path=0.1)
    return dataclasses.replace(recipe, curriculum=CurriculumConfig(sizes=_SIZES, magnitudes=_MAGNITUDES))


def deit_tiny_short_100() -> Recipe:
    """DeiT-Ti, 100 epochs: 68.3 top-1 (authors).

    fastdeit-train deit_tiny_short_100 --data.train train.beton --data.val val.beton \
        --run.output runs/deit_tiny_short_100

    Hours: not measured.
    Top-1: 68.3 (Figure 7, "baseline").
    """
    return _short(deit_tiny(), "short_100", epochs=100, warmup=20.0, drop_path=0.05)


def deit_tiny_short_200() -> Recipe:
    """DeiT-Ti, 200 epochs: 71.5 top-1 (authors).

    fastdeit-train deit_tiny_short_200 --data.train train.beton --data.val val.beton \
        --run.output runs/deit_tiny_short_200

    Hours: not measured.
    Top-1: 71.5 (Figure 7, "baseline").
    """
    return _short(deit_tiny(), "short_200", epochs=200, warmup=20.0, drop_path=0.1)


def deit_small_short_100() -> Recipe:
    """DeiT-S, 100 epochs: 76.7 top-1 (authors).

    fastdeit-train deit_small_short_100 --data.train train.beton --data.val val.beton \
        --run.output runs/deit_small_short_100

    Hours: not measured.
    Top-1: 76.7 (Figure 7, "baseline").
    """
    return _short(deit_small(), "short_100", epochs=100, warmup=20.0, drop_path=0.05)


def deit_small_short_200() -> Recipe:
    """DeiT-S, 200 epochs: 79.5 top-1 (authors).

    fastdeit-train deit_small_short_200 --data.train train.beton --data.val val.beton \
        --run.output runs/deit_small_short_200

    Hours: not measured.
    Top-1: 79.5 (Figure 7, "baseline").
    """
    return _short(deit_small(), "short_200", epochs=200, warmup=20.0, drop_path=0.1)


def deit_base_short_100() -> Recipe:
    """DeiT-B, 100 epochs.

    fastdeit-train deit_base_short_100 --data.train train.beton --data.val val.beton \
        --run.output runs/deit_base_short_100

    Hours: not measured.
    Top-1: not measured, and not in the paper.
    """
    return _short(deit_base(), "short_100", epochs=100, warmup=20.0, drop_path=0.05)


def deit_base_short_200() -> Recipe:
    """DeiT-B, 200 epochs.

    fastdeit-train deit_base_short_200 --data.train train.beton --data.val val.beton \
        --run.output runs/deit_base_short_200

    Hours: not measured.
    Top-1: not measured, and not in the paper.
    """
    return _short(deit_base(), "short_200", epochs=200, warmup=20.0, drop_path=0.1)


def deit_tiny_curriculum() -> Recipe:
    """DeiT-Ti, 469 epochs on growing images, at the compute of 200 at 224 pixels: 73.7 top-1 (authors).

    fastdeit-train deit_tiny_curriculum --data.train train.beton --data.val val.beton \
        --run.output runs/deit_tiny_curriculum

    Hours: not measured.
    Top-1: 73.7 (Table 7).
    """
    return _curriculum(deit_tiny())


def deit_small_curriculum() -> Recipe:
    """DeiT-S, 469 epochs on growing images, at the compute of 200 at 224 pixels: 81.0 top-1 (authors).

    fastdeit-train deit_small_curriculum --data.train train.beton --data.val val.beton \
        --run.output runs/deit_small_curriculum

    Hours: not measured.
    Top-1: 81.0 (Table 7).
    """
    return _curriculum(deit_small())


def deit_base_curriculum() -> Recipe:
    """DeiT-B, 469 epochs on growing images, at the compute of 200 at 224 pixels.

    fastdeit-train deit_base_curriculum --data.train train.beton --data.val val.beton \
        --run.output runs/deit_base_curriculum

    Hours: not measured.
    Top-1: not measured, and not in the paper.
    """
    return _curriculum(deit_base())

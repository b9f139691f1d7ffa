"""The cells of the study: one recipe and its changes, and which cell answers which claim of the papers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from fastdeit.config import Recipe
from fastdeit.recipes import deit3_small, deit_tiny, deit_tiny_distilled

Changes = dict[str, dict[str, Any]]


class Claim(NamedTuple):
    """A claim: the scores of `cell` are above those of `control`, or with `equal` no different."""

    text: str
    source: str
    cell: str
    control: str
    cell_head: str = "class"
    control_head: str = "class"
    cell_weights: str = "model"
    control_weights: str = "model"
    equal: bool = False


class Study(NamedTuple):
    """A data set and the size of its runs."""

    train: Path
    val: Path
    teacher: Path  # a convnet's checkpoint
    teacher_arch: str
    epochs: int
    model: dict[str, Any]
    augment: dict[str, Any]
    sizes: tuple[int, ...]  # of the images in the parts of a curriculum
    transformer: Path | None  # checkpoint of a DeiT that teaches
    fraction: float = 1.0  # of the training images
    global_batch: int = 128


def _small_images_first(study: Study) -> Changes:
    """A curriculum with the computation of half the epochs."""
    sizes = study.sizes
    epochs = round(study.epochs / 2 * sum((sizes[-1] / size) ** 2 for size in sizes) / len(sizes))
    magnitudes = tuple(9.0 * part / (len(sizes) - 1) for part in range(len(sizes)))
    return {"run": {"epochs": epochs}, "curriculum": {"sizes": sizes, "magnitudes": magnitudes}}


_TOKEN = {"model": {"distilled": True}}
_HARD = {**_TOKEN, "objective": {"distillation": "hard"}}
TAUGHT_BY_TRANSFORMER = "hard, transformer teacher"
# Each cell: the recipe it starts from, and the fields that it changes.
CELLS: dict[str, tuple[str, Changes | Callable[[Study], Changes]]] = {
    "deit": ("deit", {}),
    "hard, distillation token": ("deit", _HARD),
    "soft, distillation token": ("deit", {**_TOKEN, "objective": {"distillation": "soft"}}),
    "hard, class token": ("deit", {"objective": {"distillation": "hard"}}),
    "soft, class token": ("deit", {"objective": {"distillation": "soft"}}),
    "second class token": ("deit", _TOKEN),
    "without repeated augmentation": ("deit", {"data": {"repeats": 1}}),
    "without Mixup": ("deit", {"augment": {"mixup_alpha": 0.0}}),
    "without CutMix": ("deit", {"augment": {"cutmix_alpha": 0.0}}),
    "without Mixup and CutMix": ("deit", {"augment": {"mixup_alpha": 0.0, "cutmix_alpha": 0.0}}),
    "without erasing": ("deit", {"augment": {"erase_prob": 0.0}}),
    "without RandAugment": ("deit", {"augment": {"policy": "plain"}}),
    "without drop path": ("deit", {"model": {"drop_path": 0.0}}),
    "one lambda a batch": ("deit", {"departures": {"mix_group": 0}}),
    "deit 3": ("deit3", {}),
    TAUGHT_BY_TRANSFORMER: (
        "deit",
        lambda study: {**_HARD, "teacher": {"name": "deit", "checkpoint": study.transformer}},
    ),
    "half the epochs": ("deit", lambda study: {"run": {"epochs": study.epochs // 2}}),
    "small images first": ("deit", _small_images_first),
    "small images first, full RandAugment": (
        "deit",
        lambda study: {**_small_images_first(study), "curriculum": {"sizes": study.sizes}},
    ),
}

_2021, _2022, _2024 = "arXiv 2012.12877", "arXiv 2204.07118", "arXiv 2405.08768"
CLAIMS = (
    Claim("hard distillation beats none", f"{_2021}, Table 3", "hard, class token", "deit"),
    Claim("hard distillation beats soft", f"{_2021}, Table 3", "hard, class token", "soft, class token"),
    Claim("soft distillation beats none", f"{_2021}, Table 3", "soft, class token", "deit"),
    Claim(
        "the distillation token beats the class token",
        f"{_2021}, Table 3",
        "hard, distillation token",
        "hard, class token",
        "distillation",
    ),
    Claim(
        "both heads together beat the class head",
        f"{_2021}, Table 3",
        "hard, distillation token",
        "hard, distillation token",
        "fused_probabilities",
    ),
    Claim(
        "both heads together beat the distillation head",
        f"{_2021}, Table 3",
        "hard, distillation token",
        "hard, distillation token",
        "fused_probabilities",
        "distillation",
    ),
    Claim("a second class token gains nothing", f"{_2021}, section 4", "second class token", "deit", equal=True),
    Claim("repeated augmentation helps", f"{_2021}, Table 8", "deit", "without repeated augmentation"),
    Claim("Mixup helps", f"{_2021}, Table 8", "deit", "without Mixup"),
    Claim("CutMix helps", f"{_2021}, Table 8", "deit", "without CutMix"),
    Claim("Mixup and CutMix help", f"{_2021}, Table 8", "deit", "without Mixup and CutMix"),
    Claim("random erasing helps", f"{_2021}, Table 8", "deit", "without erasing"),
    Claim("RandAugment helps", f"{_2021}, Table 8", "deit", "without RandAugment"),
    Claim("stochastic depth helps", f"{_2021}, Table 8", "deit", "without drop path"),
    Claim("the average of the weights helps", f"{_2021}, Table 8", "deit", "deit", cell_weights="ema"),
    Claim("a lambda for each mixing group helps", "deit issue 63", "deit", "one lambda a batch"),
    Claim("DeiT III's recipe helps", f"{_2022}, Table 4", "deit 3", "deit"),
    Claim(
        "a convnet teaches better than a transformer",
        f"{_2021}, Table 2",
        "hard, distillation token",
        TAUGHT_BY_TRANSFORMER,
        "fused_probabilities",
        "fused_probabilities",
    ),
    Claim(
        "small images first, half the compute: same accuracy",
        f"{_2024}, Figure 7",
        "small images first",
        "deit",
        equal=True,
    ),
    Claim("small images first beats half the epochs", f"{_2024}, Figure 7", "small images first", "half the epochs"),
    Claim(
        "small images first with full RandAugment beats half the epochs",
        f"{_2024}, section 4",
        "small images first, full RandAugment",
        "half the epochs",
    ),
)


def recipe(study: Study, cell: str, seed: int, output: Path) -> Recipe:
    """The recipe of a run, on the CPU."""
    base, changes = CELLS[cell]
    replace = dataclasses.replace
    made = deit3_small() if base == "deit3" else deit_tiny()
    lr = 5e-3 if base == "deit3" else 1e-3
    made = replace(
        made,
        name=f"{base}, {cell}",
        model=replace(made.model, **study.model, drop_path=0.1),
        data=replace(made.data, train=study.train, val=study.val, threads=1, fraction=study.fraction),
        augment=replace(made.augment, **study.augment),
        teacher=replace(deit_tiny_distilled().teacher, name=study.teacher_arch, checkpoint=study.teacher),
        optim=replace(made.optim, lr=lr, lr_batch=0),
        ema=replace(made.ema, decay=0.98),
        run=replace(
            made.run,
            epochs=study.epochs,
            global_batch=study.global_batch,
            eval_every=study.epochs,
            seed=seed,
            precision="fp32",
            device="cpu",
            tensorboard=False,
            progress=False,
            output=output,
        ),
        departures=replace(made.departures, mix_group=study.global_batch // 16),
    )
    for section, fields in (changes(study) if callable(changes) else changes).items():
        made = replace(made, **{section: replace(getattr(made, section), **fields)})
    return replace(made, optim=replace(made.optim, warmup_epochs=made.run.epochs / 10))

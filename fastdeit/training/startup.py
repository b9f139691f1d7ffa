"""What a run says before its first step: the choices that shape it, and what is probably a mistake."""

from __future__ import annotations

import math

import numpy as np
import torch

from fastdeit.config import Recipe
from fastdeit.data import evaluation_batch
from fastdeit.distributed import World
from fastdeit.effects import frozen_mode
from fastdeit.pipelines.formats.dataset import Dataset
from fastdeit.precision import Precision
from fastdeit.teacher.teacher import Teacher
from fastdeit.training.optim import learning_rate, peak_lr

FEW_IMAGES = 1000  # different images of an epoch, below which repeats are worth a warning
STALE_SHARE = 0.1  # of the initial weights in their average at the end of the run
CHANCE_IMAGES = 64  # shown to the teacher


def lr_sentence(recipe: Recipe) -> str:
    """The learning rate that the run really uses."""
    cfg, batch = recipe.optim, recipe.run.global_batch
    scaled = f" ({cfg.lr:g} x global batch {batch} / {cfg.lr_batch})" if cfg.lr_batch else ""
    warm_up = f" after {cfg.warmup_epochs:g} epochs of warm-up" if cfg.warmup_epochs else ""
    return f"learning rate {peak_lr(cfg, batch):g}{scaled}{warm_up}, {cfg.name}"


def mode_sentence(recipe: Recipe) -> str | None:
    """How a run that starts from trained weights treats dropout and stochastic depth; None for any other run."""
    model, mode = recipe.model, recipe.departures.finetune_mode
    if model.init is None:
        return None
    noise = f"stochastic depth {model.drop_path:g} and dropout {model.drop_rate:g}"
    if frozen_mode(recipe):
        return f"fine-tuning {model.init} in eval mode: {noise} are off (departures.finetune_mode '{mode}')"
    return f"fine-tuning {model.init} in training mode, with {noise} (departures.finetune_mode '{mode}')"


def recipe_warnings(recipe: Recipe, train: Dataset, val: Dataset | None, *, steps: int, repeats: int) -> list[str]:
    """A sentence for each setting that is probably a mistake.

    steps    steps of an epoch
    repeats  copies of an image that are in use
    """
    return [
        *_warm_up(recipe, steps),
        *_average(recipe, steps),
        *_few_images(recipe, len(train), steps, repeats),
        *_same_data(train, val),
    ]


def _warm_up(recipe: Recipe, steps: int) -> list[str]:
    cfg, epochs = recipe.optim, recipe.run.epochs
    if cfg.warmup_epochs < epochs:
        return []
    last = learning_rate(recipe, epochs - 1, steps - 1, steps)
    top = peak_lr(cfg, recipe.run.global_batch)
    return [
        f"optim.warmup_epochs {cfg.warmup_epochs:g} is not shorter than the run ({epochs} epochs): the learning rate "
        f"only climbs, to {last:.3g} instead of {top:.3g}. Set a shorter --optim.warmup_epochs"
    ]


def _average(recipe: Recipe, steps: int) -> list[str]:
    total = recipe.run.epochs * steps
    share = recipe.ema.decay**total
    if not recipe.ema.enabled or share < STALE_SHARE:
        return []
    fitting = 1 - 10 / total  # a tenth of the run's length as its memory
    return [
        f"the average of the weights (ema.decay {recipe.ema.decay:g}) hardly moves in {total} steps: it ends as "
        f"{100 * share:.0f}% initial weights. Set --ema.decay {max(fitting, 0.5):.4g}, or --ema.enabled False"
    ]


def _few_images(recipe: Recipe, images: int, steps: int, repeats: int) -> list[str]:
    distinct = math.ceil(steps * recipe.run.global_batch / repeats)
    if repeats == 1 or distinct >= FEW_IMAGES:
        return []
    return [
        f"an epoch shows only {distinct} of the {images} images, {repeats} times each (data.repeats): for so small a "
        f"data set use --data.repeats 1"
    ]


def _same_data(train: Dataset, val: Dataset | None) -> list[str]:
    if val is None:
        return []
    same_content = train.content_hash is not None and train.content_hash == val.content_hash
    if not same_content and train.path.resolve() != val.path.resolve():
        return []
    return [
        f"data.val {val.path} holds the same images as data.train {train.path}: the accuracy on it says nothing about "
        f"new images"
    ]


def teacher_warnings(recipe: Recipe, teacher: Teacher, known: Dataset, world: World, precision: Precision) -> list[str]:
    """A sentence where the teacher works at another resolution, and where it knows no more than chance.

    It is shown `CHANCE_IMAGES` images of the data set `known`, spread over all of it, as an evaluation makes them; on
    the main process alone.
    """
    out: list[str] = []
    if teacher.img_size != teacher.student_size:
        out.append(
            f"the teacher works at {teacher.img_size} pixels, the student at {teacher.student_size}: every image is "
            f"resized for the teacher. Set --teacher.img_size {teacher.student_size} if the teacher accepts that size"
        )
    if not world.main:
        return out
    index = np.unique(np.linspace(0, len(known) - 1, min(CHANCE_IMAGES, len(known))).astype(np.int64))
    with evaluation_batch(recipe, known, world, index) as batch, torch.no_grad(), precision.autocast():
        says = teacher.labels(batch.images.to(world.device)).cpu().numpy()
        labels = batch.label_a.cpu().numpy()
    right = int((says == labels).sum())
    # Whoever always names the commonest class is right this often.
    chance = np.bincount(labels).max() / len(labels)
    if right <= chance * len(labels) + 2 * math.sqrt(len(labels) * chance * (1 - chance)):
        out.append(
            f"the teacher {teacher.source} is right on {right} of {len(labels)} images of {known.path}, which is no "
            f"better than chance: check --teacher.checkpoint, and that its classes are in the data set's order"
        )
    return out

"""Whether the teacher suits the data: warnings before a run spends hours on its labels."""

import math

import numpy as np
import torch

from fastdeit.config import Recipe
from fastdeit.data import evaluation_batch
from fastdeit.distributed import World
from fastdeit.inputs import DataSets
from fastdeit.precision import Precision
from fastdeit.subsets import spaced
from fastdeit.teacher.teacher import Teacher

CHANCE_IMAGES = 64  # shown to the teacher


def teacher_warnings(recipe: Recipe, teacher: Teacher, sets: DataSets, world: World, precision: Precision) -> list[str]:
    """A sentence if the teacher works at another resolution, and one if it is no better than chance.

    The main process shows it `CHANCE_IMAGES` images, processed as for evaluation. They are spread over the validation
    set, or over the training set if there is no validation set.
    """
    out: list[str] = []
    other = ", ".join(str(size) for size in sorted(teacher.student_sizes - {teacher.img_size}))
    if other and len(teacher.student_sizes) == 1:
        out.append(
            f"the teacher works at {teacher.img_size} pixels, the student at {other}: every image is resized for the "
            f"teacher. Set --teacher.img_size {other} if the teacher accepts that size"
        )
    elif other:
        out.append(
            f"the teacher works at {teacher.img_size} pixels: the curriculum's images of {other} pixels are resized "
            f"for it, so the curriculum does not speed up the teacher"
        )
    if not world.main:
        return out
    known, images = (sets.train, sets.train_images) if sets.val is None else (sets.val, sets.val_images)
    index = images[spaced(len(images), CHANCE_IMAGES)]
    with evaluation_batch(recipe, known, world, index) as batch, torch.no_grad(), precision.autocast():
        decisions = teacher.labels(batch.images.to(world.device)).cpu().numpy()
        labels = batch.label_a.cpu().numpy()
    right = int((decisions == labels).sum())
    # Naming the commonest class every time is right this often.
    chance = np.bincount(labels).max() / len(labels)
    if right <= chance * len(labels) + 2 * math.sqrt(len(labels) * chance * (1 - chance)):
        out.append(
            f"the teacher {teacher.source} is right on {right} of {len(labels)} images of {known.path}, which is no "
            f"better than chance: check --teacher.checkpoint, and that its classes are in the data set's order"
        )
    return out

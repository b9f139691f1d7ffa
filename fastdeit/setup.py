"""The one assembly: from a recipe and a world to what training, evaluation and labelling compute with.

Each function makes one part from the parts before it:

    set_up -> inputs.open_data_sets -> copied_here -> choose_kernels -> open_training_data, open_evaluation_data
           -> build_student -> open_teaching
"""

import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from fastdeit.config import Recipe
from fastdeit.data import EvaluationData, TrainingData
from fastdeit.distributed import World
from fastdeit.inputs import DataSets, check_class_names
from fastdeit.memory import moved
from fastdeit.model.deit import DeiT
from fastdeit.model.kernel_choice import TORCH, Kernels
from fastdeit.model.networks import ConvnetStudent, build_network
from fastdeit.model.weights import load_weights
from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.formats.dataset import Dataset
from fastdeit.pipelines.formats.local_copy import local_copy
from fastdeit.pipelines.host.stage import compile_sentence
from fastdeit.pipelines.loaders.prefetch import usable_cores
from fastdeit.precision import Precision, allow_tf32, resolve
from fastdeit.sections import LITE0
from fastdeit.stage_choice import image_dtype, image_layout
from fastdeit.teacher.label_cache import LabelCache, pixel_key
from fastdeit.teacher.teacher import Teacher

Say = Callable[[str], object]


def silent(text: str) -> None:
    """Prints nothing: for processes other than the main one."""


def set_up(recipe: Recipe, world: World) -> Precision:
    """The run's precision, after setting threads and TF32 for the whole process.

    Raises UserError for a precision that the device does not have.
    """
    set_compute_threads(world)
    precision = resolve(recipe, world.device)
    allow_tf32(precision)
    return precision


def copied_here(recipe: Recipe, sets: DataSets, world: World, say: Say) -> DataSets:
    """The machine's own copies of the data sets if `data.cache_dir` asks for them, else `sets`; see `local_copy`.

    One process of each machine copies; the others wait for it. On machines without the main process, the first process
    prints the messages itself.
    """
    cache, first = recipe.data.cache_dir, world.rank % world.local_size == 0
    if cache is None:
        return sets
    speak = say if world.main else partial(print, f"{socket.gethostname()}:", file=sys.stderr) if first else silent
    progress = recipe.run.progress and first
    train, val = local_copy(sets.train, cache, speak, progress=progress), sets.val
    if val is not None:
        val = train if val is sets.train else local_copy(val, cache, speak, progress=progress)
    world.barrier()
    return replace(sets, train=train, val=val)


def set_compute_threads(world: World) -> None:
    """Give PyTorch's CPU operators this process's share of the cores, unless the user set OMP_NUM_THREADS.

    torchrun sets OMP_NUM_THREADS to 1 on its own; that value is ignored.
    """
    given = os.environ.get("OMP_NUM_THREADS")
    if given is None or (given == "1" and "TORCHELASTIC_RUN_ID" in os.environ):
        torch.set_num_threads(max(1, usable_cores() // world.local_size))


def teacher_in_loop(recipe: Recipe) -> bool:
    """Whether training runs the teacher itself; with stored labels it does not."""
    return recipe.objective.distillation != "none" and recipe.teacher.labels is None


def open_training_data(
    recipe: Recipe,
    train_set: Dataset,
    world: World,
    precision: Precision,
    kernels: Kernels = TORCH,
    *,
    teacher: bool,
    pixels: tuple[str, str] | None = None,
    say: Say = silent,
) -> TrainingData:
    """The training batches, in the dtype and layout that their readers take.

    teacher  whether a teacher reads the images
    pixels   those that `data.loader` "auto" must decode, and whose they are; None: Pillow's
    say      prints a sentence before numba compiles, which takes a minute
    """
    _announce_compilation(recipe, say)
    dtype, layout = image_dtype(recipe, precision, teacher=teacher), image_layout(recipe, kernels, teacher=teacher)
    return TrainingData(recipe, train_set, world, dtype, layout, pixels=pixels)


def open_evaluation_data(
    recipe: Recipe,
    val_set: Dataset,
    world: World,
    precision: Precision,
    kernels: Kernels,
    *,
    images: np.ndarray | None = None,
    like: TrainingData | None = None,
    say: Say = silent,
) -> EvaluationData:
    """Evaluation batches of `images` (None: all). `like`: training data, whose loader and stage they then use."""
    _announce_compilation(recipe, say)
    return EvaluationData(
        recipe,
        val_set,
        world,
        image_dtype(recipe, precision, teacher=False),
        image_layout(recipe, kernels, teacher=False),
        images=images,
        loader=None if like is None else (like.loader.name.removesuffix("-mixed"), "as in training"),
        stage=None if like is None else (like.stage.name, "as in training"),
    )


def _announce_compilation(recipe: Recipe, say: Say) -> None:
    sentence = compile_sentence() if recipe.data.stage != "device" else None
    if sentence is not None:
        say(sentence)


def data_sentences(data: TrainingData) -> list[str]:
    """Which loader and which augmentation stage run, and why."""
    return [
        f"loader {data.loader.name}: {data.loader.reason}",
        f"augmentation on the {data.stage.name}: {data.stage.reason}",
    ]


def build_student(
    recipe: Recipe, num_classes: int, kernels: Kernels, world: World, class_names: list[str] | None = None
) -> tuple[DeiT | ConvnetStudent, list[str]]:
    """The student with its initial weights, from `run.seed` or `model.init`; messages about the loading."""
    torch.manual_seed(recipe.run.seed)
    model = moved(build_network(recipe.model, num_classes, kernels), world.device)
    messages: list[str] = []
    if recipe.model.init is not None:
        messages = load_weights(model, recipe.model.init, class_names=class_names)
    if isinstance(model, ConvnetStudent) and model.left:
        shown, more = "; ".join(model.left[:4]), len(model.left) - 4
        messages.append(
            f"these modules of {recipe.model.arch} stay with PyTorch: {shown}"
            + (f"; and {more} more" if more > 0 else "")
        )
    return model, messages


@dataclass(frozen=True)
class Teaching:
    """What the student learns from besides the true labels: a teacher, its stored labels, or neither."""

    teacher: Teacher | None = None
    labels: LabelCache | None = None

    @property
    def fingerprint(self) -> str | None:
        """The fingerprint of the teacher's weights, also where only its labels are here."""
        if self.labels is not None:
            return self.labels.described.teacher
        return None if self.teacher is None else self.teacher.fingerprint


def open_teaching(recipe: Recipe, sets: DataSets, data: TrainingData, world: World) -> Teaching:
    """The teacher or its stored labels, as the recipe asks.

    Raises UserError for a teacher with other classes, and for labels of other pixels, classes or another teacher.
    """
    if recipe.objective.distillation == "none":
        return Teaching()
    if recipe.teacher.labels is None:
        return Teaching(teacher=open_teacher(recipe, sets, world))
    return Teaching(labels=_open_labels(recipe, recipe.teacher.labels, sets.num_classes, data, world))


def open_teacher(recipe: Recipe, sets: DataSets, world: World) -> Teacher:
    """The teacher on the run's device. Raises UserError where its classes are not the training set's."""
    teacher = _load_teacher(recipe, sets.num_classes)
    check_class_names(
        str(sets.train.path), sets.train.class_names, f"the teacher {teacher.source}", teacher.class_names
    )
    return moved(teacher, world.device)


def _load_teacher(recipe: Recipe, num_classes: int) -> Teacher:
    augment = recipe.augment
    teacher = Teacher(recipe.teacher, augment.mean, augment.std, recipe.model.img_size, num_classes)
    teacher.accept_sizes(recipe.parts().sizes)
    return teacher


def _open_labels(recipe: Recipe, folder: Path, num_classes: int, data: TrainingData, world: World) -> LabelCache:
    labels, kind, cfg = LabelCache(folder), recipe.objective.distillation, recipe.teacher
    labels.check(pixel_key(recipe, data))
    described = labels.described
    if (described.kind, described.num_classes) != (kind, num_classes):
        raise UserError(
            f"{folder} holds {described.kind} labels of {described.num_classes} classes, but the run distils {kind} "
            f"with {num_classes}: make new ones with fastdeit-label"
        )
    if (cfg.checkpoint is not None or cfg.name == LITE0) and world.main:
        teacher = _load_teacher(recipe, num_classes)
        if teacher.fingerprint != described.teacher:
            raise UserError(
                f"{folder} holds labels of teacher {described.teacher_name}, not of {teacher.source}: leave "
                f"out --teacher.name and --teacher.checkpoint, or make new labels with fastdeit-label"
            )
    return labels

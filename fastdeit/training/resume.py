"""What a checkpoint holds, and how a run continues from one."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastdeit import checkpoint
from fastdeit.checkpoint_file import DamagedError, ForeignError
from fastdeit.config import Recipe, upgraded
from fastdeit.data import TrainingData
from fastdeit.effects import draws_dropout, has_effect
from fastdeit.model.kernel_choice import Kernels
from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.machine import machine_error
from fastdeit.training.best import forget_best
from fastdeit.training.resume_checks import (
    check_log,
    check_position,
    check_rounding,
    check_state,
    damage_remedy,
    stored_kernels,
)
from fastdeit.training.rounding import rounding, rounding_changes
from fastdeit.training.run_record import began_from
from fastdeit.training.state import START, RunState
from fastdeit.training.step import TrainingStep

# A run may resume with other values of these fields: they do not change what a step computes, or `effective` names
# the part that does.
FREE = {
    "run": {
        "output", "resume", "resume_changed", "device", "precision", "compile", "cuda_graphs", "profile", "eval_every",
        "eval_batch", "checkpoint_every", "checkpoint_minutes", "checkpoint_patience", "keep_checkpoints",
        "best_metric", "on_divergence", "divergence_band", "log_every", "tensorboard", "wandb", "progress",
        "timeout_minutes",
    },
    "data": {"train", "val", "cache_dir", "loader", "stage", "hw_decoder_load", "threads", "prefetch", "on_error"},
    "model": {"init", "kernels", "grad_checkpointing"},
    # Its fingerprint is compared instead.
    "teacher": {"checkpoint", "labels", "name", "img_size", "mean", "std"},
}  # fmt: skip

_PIXELS = "data.loader (pixels)"


def effective(training: TrainingStep, data: TrainingData, teacher: str | None) -> dict[str, Any]:
    """What a step depends on beyond the recipe: what "auto" became, the data, the teacher's fingerprint."""
    recipe, pixels = training.recipe, data.loader.pixels
    return {
        "data.train": data.loader.dataset.content_hash,
        _PIXELS: pixels,
        "run.precision": training.precision.name,
        "run.compile": training.compiled,
        "model.kernels": training.kernels.name,
        "teacher.checkpoint": teacher,
        "model.init (given or not)": recipe.model.init is not None,
        "repeats": data.repeats,
        "mixing group size": data.order.group_size,
        "steps per epoch": data.steps,
        **({"data.hw_decoder_load": recipe.data.hw_decoder_load} if pixels == "nvjpeg" else {}),
        # Earlier versions drew each sample on its own, even when skipping, and stored nothing here.
        # Likewise, they drew dropout for each process's share.
        **({"draw of dropout": "by position"} if draws_dropout(recipe) else {}),
        **({"draw of stochastic depth": "a fixed number in each mixing group"} if training.dropped is not None else {}),
    }


def snapshot(
    state: RunState,
    training: TrainingStep,
    effective: dict[str, Any],
    class_names: list[str] | None,
    log: dict[str, Any],
) -> dict[str, Any]:
    """What a checkpoint holds: everything that the next step depends on, and the `log`'s sums so far.

    `model` and `ema` are state dicts in timm's names; `epoch`, `step`, `counted_from` and `skipped` are those of
    `RunState`, and `rewinds` its `diverged` and `rewinds`. `kernels` is the choice of kernels, with the version of the
    table that made it; `rounding` comes from the function of that name. `class_names`, `arch`, `num_classes`,
    `img_size`, `mean` and `std` describe the network to a run that takes it as its teacher.
    """
    recipe = training.recipe
    return {
        "format": checkpoint.FORMAT,
        **training.state(),
        "recipe": recipe.to_dict(),
        **state.position(),
        "counted_from": state.counted_from,
        "skipped": sorted(state.skipped),
        "rewinds": [state.diverged, state.rewinds],
        "effective": effective,
        "kernels": training.kernels.event(),
        "rounding": rounding(training.world, effective[_PIXELS]),
        "log": log,
        "class_names": class_names,
        "arch": recipe.model.arch,
        "num_classes": training.num_classes,
        "img_size": recipe.model.img_size,
        "mean": list(recipe.augment.mean),
        "std": list(recipe.augment.std),
    }


@dataclass(frozen=True)
class Kept:
    """What "auto" takes from the checkpoint that a run continues from, so that the bits stay the same.

    pixels   whose pixels the loader must decode, and a name for the checkpoint; None: the loader is not "auto"
    kernels  the choice of kernels; None: they are not "auto", or the checkpoint is too old to hold the choice
    """

    pixels: tuple[str, str] | None = None
    kernels: Kernels | None = None


def checkpoint_choices(recipe: Recipe, folder: Path) -> Kept:
    """The choices of the checkpoint that a run continues from; none for a fresh start."""
    path = _path(recipe, folder / "checkpoints")
    if path is None or "auto" not in (recipe.data.loader, recipe.model.kernels):
        return Kept()
    stored, whose = _read(path), f"the checkpoint {path}"
    pixels = stored["effective"].get(_PIXELS)
    if pixels is None and recipe.data.loader == "auto":
        raise UserError(
            f"{path} does not say whose pixels it was trained with: give --data.loader, or start from its weights with "
            f"--model.init"
        )
    kernels = stored_kernels(stored, path)
    return Kept(
        (str(pixels), whose) if recipe.data.loader == "auto" else None,
        kernels and replace(kernels, reason=f"as in {whose}", note="") if recipe.model.kernels == "auto" else None,
    )


def _read(path: Path) -> dict[str, Any]:
    """The state at `path`; if it is damaged, the error names an older checkpoint that is whole."""
    try:
        return checkpoint.load(path)
    except (DamagedError, ForeignError) as error:  # a bit of the file's own tables may have flipped too
        beside = checkpoint.found(path.parent)
        older = [other for other in beside if other.name < path.name] if path in beside else beside
        whole = next((other for other in older if checkpoint.is_whole(other)), None)
        raise UserError(f"{error}. {damage_remedy(path, older, whole)}") from error


def set_damaged_aside(recipe: Recipe, folder: Path) -> list[str]:
    """Rename damaged checkpoints that are newer than the newest whole one, so that "auto" resumes from that one.

    Returns a sentence for each. If none is whole, nothing is renamed, and resuming raises the error later. Call it on
    the main process before any process looks for checkpoints. Raises MachineError if a file cannot be renamed.
    """
    if not _goes_on(recipe, folder / "checkpoints"):
        return []
    damaged: dict[Path, str] = {}
    for path in checkpoint.found(folder / "checkpoints"):
        try:
            fault = checkpoint.damage(path)
        except (OSError, UserError):  # nobody knows whether it is damaged: reading it raises the error
            return []
        if fault is None:
            said = [_set_aside(each, why, path) for each, why in damaged.items()]
            checkpoint.point_to_newest(path.parent)
            return said
        damaged[path] = fault
    return []


def _set_aside(path: Path, fault: str, older: Path) -> str:
    aside = path.with_name(f"{path.name}.damaged")
    while aside.exists():
        aside = aside.with_name(f"{aside.name}.damaged")
    try:
        path.rename(aside)
    except OSError as error:
        raise machine_error(error, f"{path} is damaged, and cannot be renamed to {aside.name}") from error
    lost = checkpoint.steps_of(path) - checkpoint.steps_of(older)
    return f"{fault}. It was renamed {aside.name}, and the run goes on from {older.name}, {lost} steps earlier"


@dataclass(frozen=True)
class Resumed:
    """A checkpoint that a run continues from.

    path       of its file
    changed    a phrase for each thing that changed since
    rounding   a phrase for each difference in device, threads or versions; with any, the last bits may differ
    log        the log's sums at that step; None if an older version wrote the checkpoint
    """

    path: Path
    changed: list[str]
    rounding: list[str]
    log: dict[str, Any] | None

    @property
    def processes(self) -> int | None:
        """The number of processes of the run that wrote it; None if an older version did."""
        return None if self.log is None else len(self.log["sums"])


def restore(state: RunState, training: TrainingStep, effective: dict[str, Any]) -> Resumed | None:
    """Load the checkpoint that the run continues from; returns None for a fresh start.

    `run.resume` "auto" takes the newest checkpoint of the run's own folder, if any; "none" starts afresh and refuses
    a folder that holds checkpoints; anything else is a path. A run that began from a path of another folder and is
    started again, by torchrun or by the same command, takes the newest of its own. The main process reads it for all,
    so other machines need not see the folder. Raises UserError if the checkpoint belongs to another recipe or other
    data, naming the field, unless `run.resume_changed`; and if the folder holds later checkpoints than the one asked
    for.
    """
    run, folder, world = training.recipe.run, state.checkpoints, training.world
    stored = path = None
    if world.main:
        path = _path(training.recipe, folder)
        stored = _read_for(path, folder, run.resume)
    path, stored = world.from_main(path), world.share(stored)
    if path is None or stored is None:
        return None
    changed = _differences(stored, training.recipe, effective)
    if changed and not run.resume_changed:
        raise UserError(
            f"{path} was written with {changed[0]}: resume with the same value; accept the change, which makes it "
            f"another run, with --run.resume_changed True; or start afresh with another --run.output"
        )
    steps = training.steps_per_epoch
    check_position(stored, path, epochs=run.epochs, steps_per_epoch=steps, changed=run.resume_changed)
    resumed = _load(stored, path, state, training, changed)
    if stored["effective"]["steps per epoch"] != steps:
        state.counted_from = [state.epoch, state.step, state.global_step]
    return resumed


def _read_for(path: Path | None, folder: Path, how: str) -> dict[str, Any] | None:
    """The state at `path`, which a run with its checkpoints in `folder` continues from."""
    checkpoints = checkpoint.found(folder)
    if how == "none" and checkpoints:
        raise UserError(
            f"{folder} holds checkpoints: resume them with --run.resume auto, or choose another --run.output"
        )
    if path is None:
        return None
    stored = _read(path)
    if checkpoints and checkpoints[0] > checkpoint.step_path(folder, stored["global_step"]):
        raise UserError(
            f"{folder} holds checkpoints later than {path}: delete them to go back, continue from them with "
            f"--run.resume auto, or choose another --run.output"
        )
    return stored


def _path(recipe: Recipe, folder: Path) -> Path | None:
    """The checkpoint that a run with its own checkpoints in `folder` continues from."""
    how, checkpoints = recipe.run.resume, checkpoint.found(folder)
    if how == "none":
        return None
    if _goes_on(recipe, folder) and (checkpoints or how == "auto"):
        return checkpoints[0] if checkpoints else None
    return Path(how)


def _goes_on(recipe: Recipe, folder: Path) -> bool:
    """Whether the run continues from the newest of its own checkpoints in `folder`, if it has one."""
    how = recipe.run.resume
    if how in ("auto", "none"):
        return how == "auto"
    elsewhere = Path(how).resolve().parent != folder.resolve()  # in its own folder, a path asks to go back
    return elsewhere and began_from(folder.parent, how)


def go_back(state: RunState, training: TrainingStep, before: int) -> Resumed:
    """Load the newest of the run's own checkpoints that is older than step `before` (global, from 1).

    Later checkpoints are deleted, because they hold steps that are now left out, and a killed run would resume from
    them. Steps that the run has already left out stay left out. Raises UserError if no checkpoint is old enough. Call
    it on all processes.
    """
    stored = path = None
    if training.world.main:
        found = checkpoint.found(state.checkpoints)
        later = [each for each in found if checkpoint.steps_of(each) >= before]
        if len(later) == len(found):
            raise UserError(
                f"no checkpoint in {state.checkpoints} is older than step {before}: keep more (run.keep_checkpoints)"
            )
        path = found[len(later)]
        stored = _read(path)
        forget_best(state.checkpoints, later)
        for each in later:
            each.unlink()
        checkpoint.point_to_newest(state.checkpoints)
    path, stored = training.world.from_main(path), training.world.share(stored)
    assert path is not None
    return _load(stored, path, state, training, [])


def _load(stored: dict[str, Any], path: Path, state: RunState, training: TrainingStep, changed: list[str]) -> Resumed:
    check_state(stored, path, training)
    log, before = check_log(stored, path), check_rounding(stored, path)
    training.load(stored)
    state.epoch, state.step, state.global_step = (stored[name] for name in ("epoch", "step", "global_step"))
    state.counted_from = stored.get("counted_from", list(START))
    state.skipped.update(stored.get("skipped", []))
    if not state.rewinds and not changed:  # a run that goes back now counts on; another recipe begins to count anew
        state.diverged, state.rewinds = stored.get("rewinds", (0, 0))
    return Resumed(
        path, changed, rounding_changes(before, rounding(training.world, stored["effective"].get(_PIXELS))), log
    )


def _differences(stored: dict[str, Any], recipe: Recipe, effective: dict[str, Any]) -> list[str]:
    """A phrase for each thing that differs between the checkpoint `stored` and the run that resumes it."""
    out = []
    before, now = upgraded(stored["recipe"]), recipe.to_dict()
    unset = Recipe(name="").to_dict()  # a field that is newer than the checkpoint had its default's meaning
    for section, values in now.items():
        old = before.get(section)
        if not isinstance(values, dict) or not isinstance(old, dict):
            continue
        out += [
            f"{section}.{name} = {old.get(name, unset[section][name])!s:.80}, this run has {value}"
            for name, value in values.items()
            if name not in FREE.get(section, ())
            and old.get(name, unset[section][name]) != value
            and has_effect(recipe, f"{section}.{name}")
        ]
    held = stored["effective"]
    out += [
        f"another {name} ({held.get(name)!s:.80}, this run has {value})"
        for name, value in effective.items()
        if held.get(name) != value
    ]
    return out

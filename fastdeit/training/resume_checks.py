"""Check that this run can have written a checkpoint, before anything of the run changes.

A file with correct checksums may still have been edited, or belong to another network.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fastdeit.checkpoint import MOST_STEPS, NOT_OURS
from fastdeit.model.attention_backend import BACKENDS
from fastdeit.model.kernel_choice import OPS, Kernels
from fastdeit.pipelines.errors import UserError
from fastdeit.training.rounding import Rounding
from fastdeit.training.state import START
from fastdeit.training.step import TrainingStep

_SCALER = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}


def check_position(
    state: dict[str, Any], path: Path, *, epochs: int, steps_per_epoch: int, changed: bool = False
) -> None:
    """Raises UserError unless the next step that `state` names is a step of this run, or its end.

    state    from `checkpoint.load`; `counted_from` is explained at `RunState`
    changed  whether a checkpoint without `counted_from` (of an older version) may come from a run that was resumed with
             another number of steps per epoch
    """
    epoch, step, global_step = state["epoch"], state["step"], state["global_step"]
    if step >= steps_per_epoch:
        raise UserError(
            f"{path}: its next step is {step} (from 0) of an epoch, but this run's epochs have {steps_per_epoch}: "
            "resume from a checkpoint at the end of an epoch"
        )
    if epoch > epochs or (epoch == epochs and step):
        raise UserError(
            f"{path}: its next step is in epoch {epoch} (from 0), but this run has {epochs} epochs: set run.epochs"
        )
    start = state.get("counted_from", list(START))
    if (
        not isinstance(start, list)
        or len(start) != 3
        or not all(type(n) is int and 0 <= n <= MOST_STEPS for n in start)
    ):
        raise UserError(f"{path}: its field 'counted_from' is not an epoch, step and global step; {NOT_OURS}")
    steps = state["effective"].get("steps per epoch")
    if type(steps) is not int or not 1 <= steps <= MOST_STEPS:
        raise UserError(f"{path}: its field 'effective' says {steps!r:.40} steps per epoch; {NOT_OURS}")
    passed = start[2] + (epoch - start[0]) * steps + step - start[1]
    if global_step != passed and not (changed and "counted_from" not in state):
        raise UserError(
            f"{path}: its field 'global_step' is {global_step}, but epoch {epoch}, step {step} are {passed} steps from "
            f"the start; {NOT_OURS}"
        )


def check_state(state: dict[str, Any], path: Path, training: TrainingStep) -> None:
    """Raises UserError, naming the file and the field, unless `training` can continue from `state`."""
    own = training.model.state_dict()
    _check_tensors(path, "model", state["model"], own)
    for name in ("ema", "scaler"):
        if name not in state:
            raise UserError(f"{path}: its field '{name}' is missing; {NOT_OURS}")
    stored_kernels(state, path)
    skipped = state.get("skipped", [])
    if not isinstance(skipped, list) or not all(type(step) is int for step in skipped):
        raise UserError(f"{path}: its field 'skipped' is not a list of steps; {NOT_OURS}")
    rewinds = state.get("rewinds", [0, 0])
    if not (isinstance(rewinds, list) and len(rewinds) == 2 and all(type(n) is int and n >= 0 for n in rewinds)):
        raise UserError(f"{path}: its field 'rewinds' is not a step and a number; {NOT_OURS}")
    recipe = state["recipe"].get("ema")
    averaged = isinstance(recipe, dict) and recipe.get("enabled") is True
    if state["ema"] is not None or (averaged and training.ema is not None):
        _check_tensors(path, "ema", state["ema"], own)
    stored, optim = state["recipe"].get("optim"), training.recipe.optim
    name = stored.get("name") if isinstance(stored, dict) else optim.name
    if name != optim.name:
        raise UserError(
            f"{path}: was trained with optim.name {str(name)[:40]}, but this run has {optim.name}, "
            f"which keeps another state: start from its weights with --model.init and another --run.output"
        )
    now = optim.layer_decay
    before = stored.get("layer_decay", 1.0) if isinstance(stored, dict) else now
    if (before == 1) != (now == 1):
        raise UserError(
            f"{path}: was trained with optim.layer_decay {before}, but this run has {now}, so the optimizer's "
            f"parameter groups differ: start from its weights with --model.init and another --run.output"
        )
    _check_optimizer(path, state["optimizer"], training, state["global_step"])
    if state["scaler"] is not None:
        _check_scaler(path, state["scaler"])


def check_rounding(state: dict[str, Any], path: Path) -> Rounding:
    """Device, threads and versions in a checkpoint; empty if an older version wrote it.

    Raises UserError if the field is malformed.
    """
    stored = state.get("rounding", {})

    def is_short(value: Any) -> bool:
        return isinstance(value, str) and len(value) <= 200

    if not isinstance(stored, dict) or not all(
        is_short(name) and (is_short(value) or value is None or (type(value) is int and 0 <= value < 1 << 20))
        for name, value in stored.items()
    ):
        raise UserError(f"{path}: its field 'rounding' does not hold names and numbers; {NOT_OURS}")
    return stored


def check_log(state: dict[str, Any], path: Path) -> dict[str, Any] | None:
    """The log's sums in a checkpoint; None if an older version wrote it. Raises UserError if the field is malformed."""
    if "log" not in state:
        return None

    def numbers(values: Any, kind: type, count: int | None = None) -> bool:
        fits = isinstance(values, list) and (count is None or len(values) == count)
        return fits and all(type(value) is kind for value in values)

    log = state["log"]
    try:
        fine = (
            type(log["steps"]) is int
            and 0 <= log["steps"] <= MOST_STEPS
            and all(isinstance(log[name], list) and log[name] for name in ("sums", "bands"))
            and all(numbers(each, float, 3) for name in ("sums", "bands") for each in log[name])
            and numbers(log["fallbacks"], int)
            and isinstance(log["replaced"], list)
            and all(numbers(pair, int, 2) for pair in log["replaced"])
        )
    except (KeyError, TypeError):
        fine = False
    if not fine:
        raise UserError(f"{path}: its field 'log' does not hold sums of losses and indices of images; {NOT_OURS}")
    return log


def _check_tensors(path: Path, field: str, stored: Any, own: Mapping[str, Tensor]) -> None:
    if not isinstance(stored, dict):
        raise UserError(f"{path}: its field '{field}' is a {type(stored).__name__}, not a state dict; {NOT_OURS}")
    for what, names in (("lacks", own.keys() - stored.keys()), ("has an unknown", stored.keys() - own.keys())):
        if names:
            raise UserError(f"{path}: its field '{field}' {what} '{min(map(str, names)):.80}'; {NOT_OURS}")
    for name, tensor in own.items():
        _check_tensor(path, f"{field}.{name}", stored[name], tensor)


def _check_tensor(path: Path, field: str, stored: Any, own: Tensor) -> None:
    if not isinstance(stored, Tensor):
        raise UserError(f"{path}: its field '{field}' is a {type(stored).__name__}, not a tensor; {NOT_OURS}")
    if (stored.shape, stored.dtype) != (own.shape, own.dtype):
        held, wanted = (f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in (stored, own))
        raise UserError(f"{path}: its field '{field}' is {held}, but this run has {wanted}; {NOT_OURS}")


def _check_optimizer(path: Path, stored: dict[str, Any], training: TrainingStep, global_step: int) -> None:
    states, groups = stored.get("state"), stored.get("param_groups")
    if not isinstance(states, dict) or not isinstance(groups, list):
        raise UserError(f"{path}: its field 'optimizer' is not the state of an optimizer; {NOT_OURS}")
    own = training.optimizer.param_groups
    indices = [group.get("params") if isinstance(group, dict) else None for group in groups]
    counted = iter(range(sum(len(group["params"]) for group in own)))
    if indices != [[next(counted) for _ in group["params"]] for group in own]:
        raise UserError(f"{path}: its field 'optimizer.param_groups' lists other parameters; {NOT_OURS}")
    names = {id(parameter): name for name, parameter in training.model.named_parameters()}
    parameters = [parameter for group in own for parameter in group["params"]]
    unknown = states.keys() - set(range(len(parameters)))
    if unknown:
        raise UserError(f"{path}: its field 'optimizer.state' has an unknown {min(map(str, unknown))}; {NOT_OURS}")
    moments = _moments(training)
    if moments is None:
        _check_alike(path, states, own)
        return
    # A timm model may have unused parameters.
    gaps = bool(states) and training.recipe.model.arch != "deit"
    for index, parameter in enumerate(parameters):
        field = f"optimizer.state[{index}] ({names[id(parameter)]})"
        held = states.get(index)
        if held is None and (gaps or not moments or not global_step):
            continue
        if held is None:
            raise UserError(f"{path}: its field '{field}' is missing; {NOT_OURS}")
        _check_moments(path, field, held, parameter, moments, global_step)


def _moments(training: TrainingStep) -> tuple[str, ...] | None:
    """The moments that the optimizer keeps for each parameter, in the parameter's shape; None: only timm knows them."""
    if training.recipe.optim.name == "sgd":
        return ("momentum_buffer",) if training.recipe.optim.momentum else ()
    return ("exp_avg", "exp_avg_sq") if training.recipe.optim.name == "adamw" else None


def _check_alike(path: Path, states: dict[Any, Any], groups: list[dict[str, Any]]) -> None:
    """Raise UserError unless each parameter's state is a dict, and its moments have the parameter's shape."""
    parameters = [parameter for group in groups for parameter in group["params"]]
    for index, held in states.items():
        field = f"optimizer.state[{index}]"
        if not isinstance(held, dict):
            raise UserError(f"{path}: its field '{field}' is a {type(held).__name__}, not a state; {NOT_OURS}")
        shapes = {name: value.shape for name, value in held.items() if isinstance(value, Tensor) and value.ndim}
        for name, shape in shapes.items():
            if "exp_avg" in name and shape != parameters[index].shape:
                raise UserError(
                    f"{path}: its field '{field}.{name}' is {tuple(shape)}, but the parameter is "
                    f"{tuple(parameters[index].shape)}; {NOT_OURS}"
                )


def _check_moments(
    path: Path, field: str, held: Any, parameter: Tensor, moments: tuple[str, ...], global_step: int
) -> None:
    counts = ("step",) if "exp_avg" in moments else ()
    if not isinstance(held, dict) or held.keys() != {*moments, *counts}:
        known = ", ".join(map(str, held))[:80] if isinstance(held, dict) else type(held).__name__
        wanted = ", ".join((*moments, *counts)) or "nothing"
        raise UserError(f"{path}: its field '{field}' holds {known}, but this run's optimizer has {wanted}; {NOT_OURS}")
    for name in moments:
        _check_tensor(path, f"{field}.{name}", held[name], parameter)
    for name in counts:
        count = held[name]
        number = count.item() if isinstance(count, Tensor) and count.numel() == 1 else count
        whole = isinstance(number, (int, float)) and 0 <= number <= global_step and number == int(number)
        if not whole or (isinstance(count, Tensor) and count.ndim):
            shown = "another tensor" if isinstance(number, Tensor) else repr(number)[:40]
            raise UserError(f"{path}: its field '{field}.{name}' is {shown} after {global_step} steps; {NOT_OURS}")


def _check_scaler(path: Path, stored: Any) -> None:
    if stored == {}:  # a scaler that is switched off
        return
    fine = isinstance(stored, dict) and stored.keys() == _SCALER
    fine = fine and all(type(v) in (int, float) and math.isfinite(v) and v >= 0 for v in stored.values())
    if not fine or not stored["scale"]:
        raise UserError(f"{path}: its field 'scaler' is not the state of a loss scale; {NOT_OURS}")


def stored_kernels(state: dict[str, Any], path: Path) -> Kernels | None:
    """The choice of kernels in a checkpoint; None if it stores none. Raises UserError if it is not a valid choice."""
    stored = state.get("kernels")
    if stored is None:
        return None
    try:
        kernels = Kernels(**{**stored, "ops": frozenset(stored["ops"])})
        known = kernels.ops | kernels.left.keys() <= OPS.keys() and kernels.attention in (None, *BACKENDS)
        if known and all(isinstance(why, str) for why in kernels.left.values()):
            return kernels
    except (TypeError, KeyError, AttributeError):
        pass
    raise UserError(f"{path}: its field 'kernels' is not a choice that this version knows; {NOT_OURS}")


def damage_remedy(path: Path, older: list[Path], whole: Path | None) -> str:
    """What to do about the damaged checkpoint `path`, given the older ones and the newest whole one of them."""
    if whole is not None:
        return f"{whole} is whole: move {path.name} to another folder, and the run resumes from there"
    if older:
        return f"None of the {len(older)} older checkpoints is whole either: start afresh with another --run.output"
    return "There is no older checkpoint: start afresh with another --run.output"

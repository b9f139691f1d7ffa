"""Checkpoints: written atomically, and read without running any code in them."""

import argparse
import contextlib
import os
import pickle
import re
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from fastdeit.checkpoint_file import DamagedError, ForeignError, check_file, check_values
from fastdeit.inputs import check_checkpoint
from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.formats.files import atomic_write, open_regular
from fastdeit.pipelines.machine import MachineError, machine_error

FORMAT = 1
LAST = "last.pt"  # link to the newest checkpoint in a folder
_FIELDS = {
    "model": dict,
    "optimizer": dict,
    "recipe": dict,
    "effective": dict,
    "epoch": int,
    "step": int,
    "global_step": int,
}
MOST_STEPS = 999_999_999  # names have nine digits
NOT_OURS = "the file was changed after it was written, so use another, or start from its weights with --model.init"
_GLOBAL = re.compile(r"GLOBAL (\S+) ")  # in PyTorch's message about a class that it refuses
_NAME = re.compile(r"checkpoint-(\d{9})\.pt")


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` to a temporary file, sync it, and rename it to `path`.

    A process killed at any moment leaves the old file or the new one, and at most a `.tmp` beside it. Raises
    MachineError if the file cannot be written, for example on a full disk.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file, _os_error():
            torch.save(state, file)
    except OSError as error:
        cannot = machine_error(error, f"{path}: cannot be written")
        raise MachineError(f"{cannot}; the checkpoints before it are untouched") from error


@contextlib.contextmanager
def _os_error() -> Iterator[None]:
    """Raise the OSError that PyTorch's archive writer hides behind a RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from error
        raise


def read_checkpoint(path: Path | str) -> dict[str, Any]:
    """The contents of a checkpoint file, on the CPU: a state dict, or a dict that holds one.

    Reads `.safetensors` and PyTorch's format. The only object it accepts is the `argparse.Namespace` that the released
    training script stores. It first compares the checksums of all records, and warns if the format has none. Raises
    UserError naming the file if it is missing, DamagedError if it is damaged, ForeignError if it holds anything but
    tensors and plain containers, and MachineError if the machine cannot read it.
    """
    path = Path(path)
    check_checkpoint(path)
    try:
        with open(open_regular(path), "rb") as file:
            stored = _read(file, path)
    except UserError:
        raise
    except Exception as error:
        raise why_unreadable(path, error) from error
    if not isinstance(stored, dict):
        raise UserError(f"{path} holds a {type(stored).__name__}, not a state dict: save model.state_dict()")
    check_values(stored, path)
    return stored


def _read(file: BinaryIO, path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        warnings.warn(f"{path}: .safetensors has no checksums, so damage to its weights goes unnoticed", stacklevel=3)
        return dict(load_file(path))
    unchecked = check_file(file, path)
    if unchecked is not None:
        warnings.warn(unchecked, stacklevel=3)
    file.seek(0)
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(file, map_location="cpu", weights_only=True)


def save_safetensors(path: Path, state: dict[str, torch.Tensor]) -> None:
    """Write a state dict as `.safetensors`, for other programs; no two tensors may share memory."""
    from safetensors.torch import save_file

    save_file(state, path, metadata={"format": "pt"})


def why_unreadable(path: Path, error: Exception) -> UserError:
    """The error for a checkpoint that could not be read because of `error`."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno):
        return machine_error(error, f"{path}: cannot be read")
    if isinstance(error, pickle.UnpicklingError):
        refused = _GLOBAL.search(str(error))
        held = f"holds an object of {refused[1]}, but only tensors and plain containers are" if refused else "was not"
        return ForeignError(
            f"{path} {held} loaded: it is not a checkpoint, or must be saved again as a state dict or .safetensors"
        )
    # A damaged file can fail anywhere in the reader.
    return DamagedError(f"{path} is damaged or not a checkpoint: fetch it again")


def is_whole(path: Path) -> bool:
    """Whether a checkpoint has checksums and all of them match its bytes."""
    try:
        with open(open_regular(path), "rb") as file:
            return check_file(file, path) is None
    except (OSError, ValueError, UserError):
        return False


def damage(path: Path) -> str | None:
    """How a checkpoint is damaged; None if its checksums match, or if it has none.

    A file that holds what no checkpoint needs is not damaged. Raises OSError or UserError if the machine cannot read
    the file.
    """
    try:
        with open(open_regular(path), "rb") as file:
            check_file(file, path)
    except ForeignError:
        return None
    except (DamagedError, ValueError) as error:
        return str(error)
    return None


def load(path: Path) -> dict[str, Any]:
    """The state that `save` wrote. Raises UserError naming the file, and the field, if it is anything else."""
    state = read_checkpoint(path)
    if state.get("format") != FORMAT:
        raise UserError(f"{path} is not a fastdeit training checkpoint; to start from its weights use --model.init")
    for name, kind in _FIELDS.items():
        # In Python a bool is an int.
        if not isinstance(state.get(name), kind) or isinstance(state.get(name), bool):
            held = "is missing" if name not in state else f"is a {type(state[name]).__name__}"
            raise UserError(f"{path}: its field '{name}' {held}, not a {kind.__name__}; {NOT_OURS}")
    for name in ("epoch", "step", "global_step"):
        if not 0 <= state[name] <= MOST_STEPS:
            raise UserError(f"{path}: its field '{name}' is {state[name]}, outside 0 to {MOST_STEPS}; {NOT_OURS}")
    return state


def step_path(folder: Path, global_step: int) -> Path:
    """File of the checkpoint taken after `global_step` steps."""
    return folder / f"checkpoint-{global_step:09d}.pt"


def steps_of(path: Path) -> int:
    """The number of steps in the name of a checkpoint from `found`."""
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def found(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, newest first. Raises MachineError if the folder cannot be read."""
    try:
        return sorted((p for p in folder.iterdir() if _NAME.fullmatch(p.name)), reverse=True)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise machine_error(error, f"{folder}: cannot be read") from error


def point(folder: Path, name: str, path: Path | None) -> None:
    """Point the link `name` in `folder` at the checkpoint `path` there; None removes the link.

    The link is for people only: fastdeit does not depend on it, so an OSError is ignored. A file or link of that name
    that does not come from here is left alone.
    """
    link, temporary = folder / name, folder / f"{name}.tmp"
    with contextlib.suppress(OSError):  # some file systems have no links
        ours = link.is_symlink() and _NAME.fullmatch(os.readlink(link))
        if path is None:
            if ours:
                link.unlink()
        elif ours or not os.path.lexists(link):
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(path.name)
            os.replace(temporary, link)


def point_to_newest(folder: Path) -> None:
    """Point the link `last.pt` in `folder` at its newest checkpoint."""
    with contextlib.suppress(MachineError):
        point(folder, LAST, next(iter(found(folder)), None))


def prune(folder: Path, keep: int, kept_names: Collection[str] = ()) -> None:
    """Delete all but the newest `keep` checkpoints and `kept_names`, and the temporary files of interrupted writes."""
    for path in found(folder)[max(keep, 1) :]:
        if path.name not in kept_names:
            path.unlink()
    for leftover in folder.glob("checkpoint-*.pt.tmp"):
        leftover.unlink()

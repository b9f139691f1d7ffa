"""Checkpoints: written whole or not at all, read without running what they hold."""

from __future__ import annotations

import argparse
import contextlib
import os
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fastdeit.pipelines.errors import UserError, os_sentence
from fastdeit.pipelines.files import sync_folder
from fastdeit.pipelines.regular import check_regular, misfetched

FORMAT = 1
_FIELDS = {
    "model": dict,
    "optimizer": dict,
    "recipe": dict,
    "effective": dict,
    "epoch": int,
    "step": int,
    "global_step": int,
}
_GLOBAL = re.compile(r"GLOBAL (\S+) ")  # of PyTorch's message about a class that it does not admit
_NAME = re.compile(r"checkpoint-(\d{9})\.pt")


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` to `path` through a temporary file: synced, then renamed.

    A process killed at any moment leaves either the old file or the new one, and at most a `.tmp` beside it.
    Raises UserError naming the file where it cannot be written, as on a full disk.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file, _os_error():
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
    except OSError as error:
        error.filename = error.filename or path
        raise UserError(f"{os_sentence(error) or error}; the checkpoints before it are untouched") from error


@contextlib.contextmanager
def _os_error() -> Iterator[None]:
    """Raise the OSError that PyTorch's writer of archives hides behind its own RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from error
        raise


def read_checkpoint(path: Path | str) -> dict[str, Any]:
    """What a checkpoint file holds, on the CPU: a state dict, or a dict that has one among other things.

    `.safetensors` and PyTorch's own format. Of objects, only the `argparse.Namespace` that the released training
    script stores is admitted. Raises UserError naming the file where there is none, where it is damaged, or where
    it holds anything else than tensors and plain containers.
    """
    path = Path(path)
    check_file(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        with torch.serialization.safe_globals([argparse.Namespace]):
            stored = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = _GLOBAL.search(str(error))
        held = f"holds an object of {refused[1]}, and only tensors and plain containers are" if refused else "was not"
        raise UserError(
            f"{path} {held} loaded: it is no checkpoint, or one to save again as a state dict or .safetensors"
        ) from error
    except Exception as error:  # a damaged file can fail anywhere in the reader
        raise UserError(f"{path} is damaged or no checkpoint: fetch it again") from error
    if not isinstance(stored, dict):
        raise UserError(f"{path} holds a {type(stored).__name__}, not a state dict: save model.state_dict()")
    return stored


def check_file(path: Path) -> None:
    """Raise UserError where there is no file that could be a checkpoint, without reading it."""
    try:
        check_regular(path)
        reason = misfetched(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such checkpoint file: check the path") from error
    except OSError as error:
        raise UserError(os_sentence(error)) from error
    if reason is not None:
        raise UserError(f"{path}: {reason}")


def load(path: Path) -> dict[str, Any]:
    """The state that `save` wrote. Raises UserError naming the file where it is anything else."""
    state = read_checkpoint(path)
    wrong = [name for name, kind in _FIELDS.items() if not isinstance(state.get(name), kind)]
    if state.get("format") != FORMAT or wrong:
        raise UserError(f"{path} is not a fastdeit training checkpoint; to start from its weights use --model.init")
    return state


def step_path(folder: Path, global_step: int) -> Path:
    """File of the checkpoint taken after `global_step` steps."""
    return folder / f"checkpoint-{global_step:09d}.pt"


def found(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, newest first."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if _NAME.fullmatch(p.name)), reverse=True)


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and what an interrupted write left behind."""
    for path in found(folder)[max(keep, 1) :]:
        path.unlink()
    for leftover in folder.glob("checkpoint-*.pt.tmp"):
        leftover.unlink()

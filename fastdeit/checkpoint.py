"""Checkpoints: written whole or not at all, read without running what they hold."""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path
from typing import Any

import torch

from fastdeit.cli import UserError

FORMAT = 1
_NAME = re.compile(r"checkpoint-(\d{9})\.pt")


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` to `path` through a temporary file: synced, then renamed.

    A process killed at any moment leaves either the old file or the new one, and at most a `.tmp` beside it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load(path: Path) -> dict[str, Any]:
    """The state that `save` wrote, on the CPU. Raises UserError naming the file and what to do.

    The file is untrusted: only tensors and plain containers are unpickled (`weights_only=True`).
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such checkpoint") from error
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds more than tensors and plain containers, or is no checkpoint; it was not loaded. "
            f"Use a checkpoint that fastdeit wrote. ({str(error).splitlines()[0]})"
        ) from error
    except Exception as error:  # a damaged file can fail anywhere in the reader
        raise UserError(f"{path} is damaged or no checkpoint ({error}): delete it and resume from another") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
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

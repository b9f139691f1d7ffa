"""Writes a run's checkpoints in a thread, from a copy of the state, while training goes on."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdeit import checkpoint
from fastdeit.pipelines.machine import MachineError
from fastdeit.sections import RunConfig
from fastdeit.training.best import best_names
from fastdeit.training.logs import RunLog

_PATIENT = 2.0  # seconds to wait without a message


class _Write(threading.Thread):
    """A checkpoint that this thread writes.

    path      of the file
    position  of the run, as the log names it
    snapshot  a function that returns the state
    stall     seconds that training waited, for the previous checkpoint and the copy
    seconds   that writing took
    error     why the file could not be written
    """

    def __init__(self, path: Path, position: dict[str, int], snapshot: Callable[[], Any]) -> None:
        super().__init__(name="checkpoint", daemon=True)  # a program that must end at once does not wait for it
        self.path, self.position, self._snapshot = path, position, snapshot
        self.stall = self.seconds = 0.0
        self.error: BaseException | None = None

    def run(self) -> None:
        began = time.monotonic()
        try:
            checkpoint.save(self.path, self._snapshot())
        except BaseException as error:  # `CheckpointWriter.wait` raises it again, in the training loop
            self.error = error
        self.seconds = time.monotonic() - began


class CheckpointWriter:
    """The checkpoints of a run, on its main process.

    `save` copies the state and returns; a thread writes the copy. If the previous checkpoint is still being written,
    `save` waits for it. `poll`, called after each step, logs what the thread has done. PyTorch's writer releases
    Python's lock (the GIL), so the thread hardly slows the loop that launches steps.

    If a checkpoint cannot be written, the log warns, training goes on, and the next checkpoint is another attempt. If
    this fails for `run.checkpoint_patience` minutes, it is an error.
    """

    def __init__(self, folder: Path, run: RunConfig, log: RunLog) -> None:
        self._folder, self._run, self._log = folder, run, log
        self._active: _Write | None = None
        self._written: dict[str, int] | None = None  # the position of the last checkpoint
        self._failing_since: float | None = None

    def save(self, position: dict[str, int], state: Callable[[], dict[str, Any]]) -> None:
        """Copy the `state` of the run and begin to write it, unless this position is written already.

        Raises the disk's error if the previous checkpoint failed and `run.checkpoint_patience` is over.
        """
        began = time.monotonic()
        self.wait()
        if self._written == position:
            return
        path = checkpoint.step_path(self._folder, position["global_step"])
        write = _Write(path, position, snapshot=copied(state()))
        write.stall = time.monotonic() - began
        self._active = write
        write.start()

    def poll(self) -> None:
        """Log the checkpoint that was being written, if it is done. Raises what `wait` raises."""
        if self._active is not None and not self._active.is_alive():
            self.wait()

    def wait(self, *, must: bool = False) -> None:
        """Wait until nothing is being written.

        Raises the disk's error if the checkpoint `must` be written, or if none could be written for
        `run.checkpoint_patience` minutes.
        """
        write = self._active
        if write is None:
            return
        write.join()
        self._active = None
        if write.error is not None:
            self._failed(write.error, must)
            return
        self._written, self._failing_since = write.position, None
        times = {"seconds": round(write.seconds, 3), "stall_seconds": round(write.stall, 3)}
        self._log.event("checkpoint", path=str(write.path), **write.position, **times)
        try:
            checkpoint.prune(self._folder, self._run.keep_checkpoints, best_names(self._folder))
        except OSError as error:
            self._log.warn(f"old checkpoints cannot be deleted ({error}): they take up space in {self._folder}")
        checkpoint.point_to_newest(self._folder)

    def forget(self) -> None:
        """Wait for the checkpoint being written; then let `save` write that position again, since the run goes back."""
        self.wait()
        self._written = None

    def gone(self) -> Path | None:
        """The path of the last checkpoint if somebody has removed it, else None."""
        if self._written is None or self._active is not None:
            return None
        path = checkpoint.step_path(self._folder, self._written["global_step"])
        return None if path.exists() else path

    def close(self) -> None:
        """Wait for the checkpoint that is being written; call it when the run ends, for whatever reason."""
        if self._active is None:
            return
        self._active.join(_PATIENT)
        if self._active.is_alive():
            self._log.say(f"waiting for {self._active.path} to be written")
        try:
            self.wait()
        except (MachineError, OSError) as error:
            self._log.warn(str(error))

    def latest(self, position: dict[str, int]) -> Path | None:
        """The checkpoint of `position`, once it is written; None if it could not be written."""
        self.wait()
        path = checkpoint.step_path(self._folder, position["global_step"])
        return path if path in checkpoint.found(self._folder) else None

    def _failed(self, error: BaseException, must: bool) -> None:
        self._failing_since = self._failing_since or time.monotonic()
        minutes, patience = (time.monotonic() - self._failing_since) / 60, self._run.checkpoint_patience
        if must or minutes >= patience or not isinstance(error, MachineError | OSError):
            raise error
        self._log.warn(
            f"{error}. Training goes on without a checkpoint, for {minutes:.0f} minutes so far. It tries again when "
            f"the next one is due, and ends if this fails for {patience:g} minutes (run.checkpoint_patience)"
        )


def copied(state: dict[str, Any]) -> Callable[[], Any]:
    """A function that returns `state` on the host, with copies of its tensors: training may change the originals.

    GPU tensors are first copied on the GPU, which takes about a millisecond. The returned function, called in another
    thread, moves these copies to the host on its own stream. If the GPU's memory is full, the tensors are copied to the
    host at once.
    """
    device = next((tensor.device for tensor in _tensors(state) if tensor.is_cuda), None)
    if device is None:
        held = _mapped(state, Tensor.clone)
        return lambda: held
    try:
        held = _mapped(state, Tensor.clone)
    except torch.OutOfMemoryError:
        held = _mapped(state, lambda tensor: tensor.cpu() if tensor.is_cuda else tensor.clone())
        return lambda: held
    ready = torch.cuda.Event()
    ready.record()

    def to_host() -> Any:
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            stream.wait_event(ready)
            out = _mapped(held, _pinned)
        stream.synchronize()
        return out

    return to_host


def _pinned(tensor: Tensor) -> Tensor:
    if not tensor.is_cuda:
        return tensor
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with `change` applied to every tensor in its dicts and lists."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        out = copy.copy(value)  # a state dict also carries the versions of its modules
        out.update((name, _mapped(each, change)) for name, each in value.items())
        return out
    if isinstance(value, list):
        return [_mapped(each, change) for each in value]
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _tensors(each)

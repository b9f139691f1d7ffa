"""The run's log: JSON lines, TensorBoard, and a progress bar.

Each line of `log.jsonl` is one object with `event` and `time` (seconds since the epoch, UTC). Events and their
fields (losses are means over the global batch since the last such line, over all processes):

start       recipe, fastdeit, torch, world, device, precision, compiled, cuda_graphs, optimizer, loader,
            steps_per_epoch, parameters
resume      path, epoch, step, global_step, changed (fields that differ from the checkpoint's, as text)
train       epoch, step, global_step, loss, loss_base, loss_distill, lr, images_per_second, data_wait (share of
            the time spent waiting for data), eta_seconds
eval        epoch, global_step, weights ("model" or "ema"), images, and for each of class, distillation,
            fused_probabilities, fused_logits that the model has: top1, top5 (percent), loss
fallbacks   epoch, count (over all processes), images (dataset indices of the main process that the loader's decoder
            refused and PIL read)
replaced    epoch, count (over all processes), images (pairs of dataset indices of the main process: one that does not
            decode, and the one that was in its place)
checkpoint  path, epoch, step, global_step
profile     global_step, steps, milliseconds (a step, by part)
nonfinite   epoch, step, global_step, loss, reproduction, indices
end         epoch, global_step, seconds
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from fastdeit.pipelines.errors import naming
from fastdeit.pipelines.regular import check_regular


class RunLog:
    """Writes the events of a run; on processes other than the main one every call does nothing."""

    def __init__(self, folder: Path, *, active: bool, tensorboard: bool, progress: bool) -> None:
        self._folder, self._active, self._tensorboard = folder, active, tensorboard
        self._file: TextIO | None = None
        self._board: Any = None
        self._progress, self._bar = progress and active, None

    def event(self, event: str, **fields: Any) -> None:
        """One line of the log; numbers of train and eval events go to TensorBoard as well."""
        if not self._active:
            return
        # Opened by the first event: a run that is refused leaves no trace.
        file = self._file = self._file or self._open()
        with naming(file.name):
            file.write(json.dumps({"event": event, "time": round(time.time(), 3), **fields}) + "\n")
        if self._board is not None and event in ("train", "eval"):
            prefix = event if event == "train" else f"eval_{fields['weights']}"
            for name, value in _numbers(fields):
                self._board.add_scalar(f"{prefix}/{name}", value, fields["global_step"])

    def _open(self) -> TextIO:
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self._folder / "tensorboard"))
        return _open_whole(self._folder / "log.jsonl")

    def say(self, text: str) -> None:
        """A sentence for the person at the terminal."""
        if self._active:
            tqdm.write(text)

    def start_epoch(self, epoch: int, epochs: int, steps: int, first_step: int) -> None:
        if self._progress:
            self._bar = tqdm(
                total=steps,
                initial=first_step,
                desc=f"epoch {epoch + 1}/{epochs}",
                unit="step",
                dynamic_ncols=True,
                leave=False,
                disable=None,  # no bar where nobody looks: into a file or a pipe
            )

    def advance(self) -> None:
        """One step done."""
        if self._bar is not None:
            self._bar.update()

    def show(self, shown: dict[str, str]) -> None:
        """What stands behind the bar from its next move on."""
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)

    def end_epoch(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def close(self) -> None:
        self.end_epoch()
        if self._board is not None:
            self._board.close()
        if self._file is not None:
            file, self._file = self._file, None
            with naming(file.name):
                file.close()


def _open_whole(path: Path) -> TextIO:
    """`path` for appending, after a last line that a kill cut short is taken off."""
    if path.exists():
        check_regular(path)
        whole = path.read_bytes().rfind(b"\n") + 1
        os.truncate(path, whole)
    return path.open("a", buffering=1)


def duration(seconds: float) -> str:
    """`1d 02h`, `3h 04m`, `5m 06s`."""
    seconds = int(seconds)
    days, hours, minutes = seconds // 86400, seconds // 3600 % 24, seconds // 60 % 60
    if days:
        return f"{days}d {hours:02d}h"
    return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {seconds % 60:02d}s"


def _numbers(fields: dict[str, Any]) -> list[tuple[str, float]]:
    out: list[tuple[str, float]] = []
    for name, value in fields.items():
        if isinstance(value, dict):
            out.extend((f"{name}/{inner}", number) for inner, number in _numbers(value))
        elif isinstance(value, int | float) and name not in ("epoch", "step", "global_step"):
            out.append((name, value))
    return out

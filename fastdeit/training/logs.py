"""The run's log: JSON lines, TensorBoard, and sentences for the terminal.

Each line of `log.jsonl` is one object with `event` and `time` (seconds since 1970, UTC). Losses are means over all
processes and all steps since the last such line. A resumed run moves the figures of the steps that it does again to
`log-redone.jsonl`. Events and their fields:

start       run (the id in `run.json`), recipe, fastdeit, torch, world, device, precision, compiled, cuda_graphs,
            kernels, optimizer, loader, stage, steps_per_epoch, parameters, peak_lr (after scaling with the batch),
            forecast_seconds (of the whole run, or null)
warning     text
resume      path, epoch, step, global_step, changed (fields that differ from the checkpoint's, as text),
            rounding (differences of device, threads and versions, as text)
train       (every `run.log_every` steps, and at the end of each epoch) epoch, step, global_step, loss, loss_base,
            loss_distill, lr, images_per_second, data_wait (share of the time spent waiting for data), eta_seconds
eval        epoch, global_step, weights ("model" or "ema"), images, and for each of class, distillation,
            fused_probabilities, fused_logits that the model has: top1, top5, ece (percent), loss; if not 0, fallbacks
            (how many images PIL read) and replaced (how many held-out images were replaced by others)
fallbacks   epoch, count, images (dataset indices that the loader's decoder refused and PIL read)
replaced    epoch, count, images (pairs of dataset indices: one that does not decode, and the one in its place)
checkpoint  path, epoch, step, global_step, seconds (to write it), stall_seconds (that training waited)
best        checkpoint (the best so far), metric, weights, head, score, global_step
pace        epoch, top1, expected (of a published run of the recipe, at this epoch), least (below it, a warning)
gpus        epoch, processes: for each, by rank, memory_gib (the most that PyTorch allocated), temperature and watts
            (the highest readings), joules (used in the epoch), slowed (why the driver lowered the clocks)
waits       epoch, processes: for each, by rank, share (of the epoch's time that it waited for data), seconds, busy
            (share of its cores' time in use), read (MB/s from disks, or null), host, files (its file system)
profile     global_step, steps, milliseconds (a step, by part)
nonfinite   epoch, step, global_step, loss, reproduction, indices
rewind      path (the checkpoint that the run goes back to), diverged (the step whose loss was bad), skipped (the steps
            left out), both numbered as `global_step` in train lines; epoch, step, global_step (where the run continues)
stopped     signal, epoch, step, global_step
end         epoch, global_step, seconds
"""

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from fastdeit.pipelines.errors import printable
from fastdeit.pipelines.formats.files import atomic_write, check_regular, is_at
from fastdeit.pipelines.parsing import parse_json
from fastdeit.streams import new_faults
from fastdeit.training.progress import Progress


class RunLog:
    """Writes the events of a run; does nothing on processes other than the main one.

    A full disk or a closed pipe must not end a run: a failed write is reported once, wherever writing still works, and
    each event tries the log file again. The first event creates the files, so a refused run leaves none.
    """

    def __init__(self, folder: Path, *, active: bool, tensorboard: bool, progress: bool, global_batch: int = 1) -> None:
        self._active, self._path, self._file, self._board = active, folder / "log.jsonl", None, None
        self._tensorboard = tensorboard
        self.progress = Progress(self.say if active else _nothing, bar=progress and active, global_batch=global_batch)
        self._lost = 0  # events that the file lacks
        self._first_step: int | None = None

    def event(self, event: str, **fields: Any) -> None:
        """One line of the log; numbers of train and eval events go to TensorBoard as well."""
        if not self._active:
            return
        self._write(event, fields)
        self._open_board()
        if self._board is not None and event in ("train", "eval"):
            prefix = event if event == "train" else f"eval_{fields['weights']}"
            try:
                for name, value in _numbers(fields):
                    self._board.add_scalar(f"{prefix}/{name}", value, fields["global_step"])
            except OSError as error:
                self._drop_board(error)
        for fault in new_faults():
            self._write("warning", {"text": fault})

    def go_back(self, epoch: int, global_step: int, *, evaluates: bool) -> None:
        """Move the figures that the run makes again to `log-redone.jsonl`.

        A run that was killed, or goes back, has logged steps after the checkpoint that it continues from. With
        these moved, the log has each step once. TensorBoard hides its own duplicates.

        epoch, global_step  where the run continues
        evaluates           whether it evaluates that checkpoint again
        """
        self._first_step = global_step + 1
        self._reopen()
        if not self._active or not self._path.exists():
            return

        def again(line: bytes) -> bool:
            try:
                event = parse_json(line)
                kind, step = event["event"], event.get("global_step", -1)
                if kind in ("fallbacks", "replaced"):
                    return event["epoch"] >= epoch
                return (kind in ("train", "profile") and step > global_step) or (
                    kind == "eval" and step >= global_step + (not evaluates)
                )
            except (ValueError, KeyError, TypeError):  # not ours
                return False

        try:
            check_regular(self._path)
            lines = self._path.read_bytes().splitlines(keepends=True)
            redone: list[bytes] = []
            kept: list[bytes] = []
            for line in lines:
                (redone if again(line) else kept).append(line)
            if redone:
                moved = self._path.with_name("log-redone.jsonl")
                if moved.exists():
                    check_regular(moved)
                with moved.open("ab") as file:
                    file.writelines(redone)
                with atomic_write(self._path) as file:
                    file.writelines(kept)
        except OSError as error:
            self.say(f"warning: {self._path} cannot be rewritten ({error}): it holds some steps twice")

    def warn(self, text: str) -> None:
        """A sentence that the user should act on, on the terminal and in the file."""
        self.event("warning", text=text)
        self.say(f"warning: {text}")

    def _open_board(self) -> None:
        if not self._tensorboard:
            return
        self._tensorboard = False
        from torch.utils.tensorboard import SummaryWriter

        try:
            # Hides the points of steps that a killed run has logged and this one does again.
            self._board = SummaryWriter(str(self._path.parent / "tensorboard"), purge_step=self._first_step)
        except OSError as error:
            self._drop_board(error)

    def say(self, text: str) -> None:
        """Print a sentence on the terminal."""
        if not self._active:
            return
        try:
            tqdm.write(printable(text))
        except (OSError, ValueError) as error:
            self._write("warning", {"text": f"stdout cannot be written ({error}): '{text}' was not printed"})

    def close(self) -> None:
        self.progress.close()
        self._close_board()
        for fault in new_faults() if self._active and self._file is not None else ():
            self._write("warning", {"text": fault})
        if self._file is not None:
            self._close_file()
        self._active = False

    def _write(self, event: str, fields: dict[str, Any]) -> None:
        try:
            gone = self._file is not None and not is_at(self._file, self._path)
            if gone:
                self._reopen()
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = _open_whole(self._path)
                if self._lost:
                    self._line("warning", {"text": f"{self._lost} events are missing here: {self._why}"})
                    self._lost = 0
            if gone:
                text = f"{self._path} was removed or replaced during the run: a new file begins here"
                self._line("warning", {"text": text})
                self.say(f"warning: {text}")
            self._line(event, fields)
        except OSError as error:
            self._close_file()
            self._lost, self._why = self._lost + 1, str(error)
            if self._lost == 1:
                self.say(
                    f"warning: {self._path} cannot be written ({error}): training goes on, but the file lacks events"
                )

    def _line(self, event: str, fields: dict[str, Any]) -> None:
        assert self._file is not None
        self._file.write(json.dumps({"event": event, "time": round(time.time(), 3), **fields}) + "\n")

    def _reopen(self) -> None:
        """Close the files, so that the next event opens the files that are at their paths then."""
        self._close_file()
        if self._board is not None:
            with contextlib.suppress(OSError):
                self._board.close()
            self._board, self._tensorboard = None, True

    def _close_file(self) -> None:
        with contextlib.suppress(OSError):  # events that it still buffers are counted as lost
            if self._file is not None:
                self._file.close()
        self._file = None

    def _close_board(self) -> None:
        try:
            if self._board is not None:
                self._board.close()
        except OSError as error:
            self._drop_board(error)

    def _drop_board(self, error: OSError) -> None:
        board, self._board = self._board, None
        with contextlib.suppress(OSError):
            if board is not None:
                board.close()
        self.warn(f"TensorBoard's files cannot be written ({error}): training goes on without them")


def _nothing(text: str) -> None:
    """Prints nothing."""


def _open_whole(path: Path) -> TextIO:
    """Open `path` for appending, after removing a last line that a kill cut short."""
    if path.exists():
        check_regular(path)
        whole = path.read_bytes().rfind(b"\n") + 1
        os.truncate(path, whole)
    return path.open("a", buffering=1)


def _numbers(fields: dict[str, Any]) -> list[tuple[str, float]]:
    out: list[tuple[str, float]] = []
    for name, value in fields.items():
        if isinstance(value, dict):
            out.extend((f"{name}/{inner}", number) for inner, number in _numbers(value))
        elif isinstance(value, int | float) and name not in ("epoch", "step", "global_step"):
            out.append((name, value))
    return out

"""Signals that ask a training run to stop."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any, NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
REQUEUE = 75  # exit status of a run that was told to stop and resumes if started again (EX_TEMPFAIL)
AGAIN = 1.0  # seconds after which another signal counts as a second one; torchrun repeats a terminal's Ctrl-C


class StopSignals:
    """Listen for Ctrl-C, a terminal that closes, and SIGTERM and SIGUSR1, which schedulers send before they kill a job.

    While steps run (`stepping`), the first signal asks for a stop after the step and is stored in `asked`; a second one
    ends the program at once. At any other time, the first signal ends the program at once. Nothing is lost then, since
    training has not begun or a checkpoint has been written. The exit status is `REQUEUE`, or 130 for Ctrl-C.

    A signal that the parent process ignores (`nohup`) stays ignored. Outside the main thread, which alone handles
    signals, entering it does nothing.
    """

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self.stepping = False
        self.leaving = False  # the checkpoint is written and the program ends: nothing more to ask for
        self._since = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in SIGNALS if threading.current_thread() is threading.main_thread() else ():
            if signal.getsignal(number) not in (signal.SIG_IGN, None):  # None: set by C code, which we cannot set again
                self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def status(self) -> int:
        """The exit status of a run that stops now."""
        return 130 if self.asked is signal.SIGINT else REQUEUE

    def _take(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.leaving:
            return
        if self.asked is None:
            self.asked, self._since = signal.Signals(number), now
            if self.stepping:
                _print(f"{self.asked.name}: stopping after this step, with a checkpoint; a second signal stops at once")
                return
        elif self.stepping and now - self._since < AGAIN:
            return
        self.asked = signal.Signals(number)
        if self.asked is signal.SIGINT:
            before = self._before[signal.SIGINT]
            if callable(before):
                before(number, frame)
            raise KeyboardInterrupt
        _print(f"{self.asked.name}: stopped; the same command resumes from the last checkpoint, if there is one")
        sys.exit(REQUEUE)


def end_at_once(reason: str) -> NoReturn:
    """End this process because another is lost. It does not wait for the main thread, which may be blocked for ever."""
    _print(lost_sentence(reason))
    os._exit(REQUEUE)


def lost_sentence(reason: str) -> str:
    """The sentence for a process that ends because another is lost."""
    return f"error: {reason}. This process ends too; the same command resumes from the last checkpoint"


def _print(text: str) -> None:
    # A signal may arrive inside another write to sys.stderr. Ctrl-C may have ended the program that reads it.
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode())

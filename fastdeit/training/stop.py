"""Decides for all processes whether to go back, to stop (on a signal) or to save (by the clock) after a step."""

from __future__ import annotations

import sys
import time
from typing import Literal, NoReturn

import torch

from fastdeit.distributed import World
from fastdeit.signals import REQUEUE, StopSignals
from fastdeit.training.meter import PendingNumbers

VOTE_EVERY = 4  # steps between two votes of several processes


class Stop:
    """Whether a run goes back, stops or saves now: if one process must, all do so after the same step.

    Call `due` on each process after each step. Several processes vote every `VOTE_EVERY` steps and read the result one
    step later, so that the host does not wait for a GPU.

    minutes  between two checkpoints, counted from the last call of `saved`; 0: never save by the clock
    """

    def __init__(self, world: World, signals: StopSignals | None, minutes: float = 0.0) -> None:
        self._world, self._signals, self._minutes = world, signals, minutes
        self._vote: PendingNumbers | None = None
        self._saved = time.monotonic()
        self._soon = False

    def due(self, global_step: int, *, diverged: bool = False) -> Literal["rewind", "stop", "save"] | None:
        """What is due after `global_step` steps; None: nothing. `diverged`: this process must go back."""
        if self._world.size == 1:
            return _first(diverged, self._asked(), self._is_old())
        if self._vote is not None:
            votes, self._vote = self._vote.tolist(), None
            if any(votes):
                return _first(*votes)
        if global_step % VOTE_EVERY == 0:
            self._vote = self._count(diverged)
        return None

    def at_once(self) -> bool:
        """Whether all processes stop now. It waits for votes: call it between epochs, where that costs nothing."""
        self._vote = None
        return bool(self._count().tolist()[1])

    def forget(self) -> None:
        """Drop the vote in progress; all processes call this after the same step."""
        self._vote = None

    def saved(self) -> None:
        """Count the minutes to the next checkpoint from now."""
        self._saved, self._soon = time.monotonic(), False

    def save_soon(self) -> None:
        """Have all processes save after one of the next steps."""
        self._soon = True

    def leaving(self) -> None:
        """Ignore signals from now on: torchrun sends one to each process once the first has ended."""
        if self._signals is not None:
            self._signals.leaving = True

    def leave(self) -> NoReturn:
        """End the program; call it once the checkpoint is written."""
        sys.exit(self._signals.status if self._signals is not None and self._asked() else REQUEUE)

    @property
    def reason(self) -> str:
        """The signal's name, for the log."""
        if self._signals is not None and self._signals.asked is not None:
            return self._signals.asked.name
        return "a signal to another process"

    def stepping(self, value: bool) -> None:
        """Set whether a signal waits for the end of the step."""
        if self._signals is not None:
            self._signals.stepping = value

    def _asked(self) -> bool:
        return self._signals is not None and self._signals.asked is not None

    def _is_old(self) -> bool:
        return self._soon or 0 < self._minutes <= (time.monotonic() - self._saved) / 60

    def _count(self, diverged: bool = False) -> PendingNumbers:
        votes = torch.zeros(3, device=self._world.device)
        for i, vote in enumerate((diverged, self._asked(), self._is_old())):
            votes[i].fill_(float(vote))
        return PendingNumbers(self._world.sum(votes))


def _first(rewind: float, stop: float, save: float) -> Literal["rewind", "stop", "save"] | None:
    return "rewind" if rewind else "stop" if stop else "save" if save else None

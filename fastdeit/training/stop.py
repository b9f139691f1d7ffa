"""A stop of several processes after the same step, with a checkpoint."""

from __future__ import annotations

import sys
from typing import NoReturn

import torch

from fastdeit.distributed import World
from fastdeit.signals import REQUEUE, StopSignals
from fastdeit.training.meter import PendingNumbers

VOTE_EVERY = 4  # steps between two votes of several processes


class Stop:
    """Whether the processes of a run stop now: all after the same step, if one of them was asked to.

    Call `now` on each process after each step. Several processes vote every `VOTE_EVERY` steps, and read the result a
    step later, so that the host does not wait for a GPU.
    """

    def __init__(self, world: World, signals: StopSignals | None) -> None:
        self._world, self._signals = world, signals
        self._vote: PendingNumbers | None = None

    def now(self, global_step: int) -> bool:
        """After `global_step` steps."""
        if self._world.size == 1:
            return self._asked()
        if self._vote is not None:
            (votes,), self._vote = self._vote.tolist(), None
            if votes:
                return True
        if global_step % VOTE_EVERY == 0:
            self._vote = self._count()
        return False

    def at_once(self) -> bool:
        """The same between two epochs, where waiting costs nothing."""
        self._vote = None
        return self._asked() if self._world.size == 1 else bool(self._count().tolist()[0])

    def leave(self) -> NoReturn:
        """End the program; call it after the checkpoint."""
        sys.exit(self._signals.status if self._asked() and self._signals is not None else REQUEUE)

    @property
    def reason(self) -> str:
        """The signal's name, for the log."""
        if self._signals is not None and self._signals.asked is not None:
            return self._signals.asked.name
        return "a signal to another process"

    def stepping(self, value: bool) -> None:
        """Whether a signal must wait for the end of a step."""
        if self._signals is not None:
            self._signals.stepping = value

    def _asked(self) -> bool:
        return self._signals is not None and self._signals.asked is not None

    def _count(self) -> PendingNumbers:
        return PendingNumbers(self._world.sum(torch.full((1,), float(self._asked()), device=self._world.device)))

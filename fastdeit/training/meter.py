"""The figures of the log's lines: losses, images per second, share of time waiting for data, images read by PIL."""

import time
from dataclasses import dataclass
from typing import Any

import torch

from fastdeit.data import TrainBatch
from fastdeit.distributed import World
from fastdeit.training.objective import LossParts


class PendingNumbers:
    """Numbers on the device that are copied to the host in the background, once they are computed."""

    def __init__(self, numbers: torch.Tensor) -> None:
        self._numbers, self._arrived = numbers, None
        if numbers.is_cuda:
            self._numbers = torch.empty_like(numbers, device="cpu", pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def tolist(self) -> list[float]:
        """Wait for the numbers, but not for work queued after them, and return them."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._numbers.tolist()


@dataclass(frozen=True)
class Window:
    """Consecutive steps: mean losses (loss, base, distill), images per second, share of time waiting for data."""

    losses: PendingNumbers
    images_per_second: float
    data_wait: float


class Meter:
    """Sums the losses on the device and times the steps, from one reading to the next.

    `state` and `load` carry the sums over a resume, so that the next line has the losses of an uninterrupted run.

    steps  since the last reading
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._sums = torch.zeros(3, dtype=torch.float64, device=world.device)
        self.steps, self._timed, self._elapsed, self._waited = 0, 0, 0.0, 0.0
        self._since, self._wait_since = 0.0, 0.0

    def start(self, wait_seconds: float) -> None:
        """Start the clock; `wait_seconds` is the prefetcher's total time waiting for data so far."""
        self._since, self._wait_since = time.monotonic(), wait_seconds

    def stop(self, wait_seconds: float) -> None:
        """Stop the clock between two epochs."""
        now = time.monotonic()
        self._elapsed += now - self._since
        self._waited += wait_seconds - self._wait_since
        self._since, self._wait_since = now, wait_seconds

    def add(self, parts: LossParts) -> None:
        self._sums += torch.stack(list(parts)).double()
        self.steps += 1
        self._timed += 1

    def read(self, wait_seconds: float, global_batch: int) -> Window:
        """Means over all processes and all steps since the last reading; starts the next window."""
        self.stop(wait_seconds)
        mean = self._world.sum(self._sums.clone()) / (self.steps * self._world.size)
        elapsed = max(self._elapsed, 1e-9)
        rate, waited = self._timed * global_batch / elapsed, min(1.0, self._waited / elapsed)
        self._sums.zero_()
        self.steps, self._timed, self._elapsed, self._waited = 0, 0, 0.0, 0.0
        return Window(PendingNumbers(mean), rate, waited)

    def state(self) -> dict[str, Any]:
        """The window so far: `steps`, and the `sums` of each process. Call it on all processes."""
        return {"steps": self.steps, "sums": self._world.gathered(self._sums.tolist())}

    def load(self, state: dict[str, Any]) -> None:
        """Continue the window of `state`, which may come from a different number of processes."""
        sums, size = state["sums"], self._world.size
        if len(sums) != size:
            mean = [sum(each) / len(sums) for each in zip(*sums, strict=True)]
            sums = [mean] * size
        self.steps = state["steps"]
        self._sums.copy_(torch.tensor(sums[self._world.rank], dtype=torch.float64))


class EpochImages:
    """The images of an epoch that its loader's decoder left to PIL, and those that did not decode.

    `state` and `load` carry them over a resume.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._fallbacks: set[int] = set()
        self._replaced: set[tuple[int, int]] = set()

    def add(self, batch: TrainBatch) -> None:
        self._fallbacks.update(batch.fallbacks)
        self._replaced.update(batch.replaced)

    def clear(self) -> None:
        """Begin the next epoch."""
        self._fallbacks.clear()
        self._replaced.clear()

    def state(self) -> dict[str, Any]:
        """`fallbacks` and `replaced` of all processes, as in `TrainBatch`, in order. Call it on all processes."""
        some = torch.tensor(float(bool(self._fallbacks or self._replaced)), device=self._world.device)
        if not self._world.sum(some):  # the usual case
            return {"fallbacks": [], "replaced": []}
        each = self._world.gathered((self._fallbacks, self._replaced))
        fallbacks, replaced = (set[Any]().union(*sets) for sets in zip(*each, strict=True))
        return {"fallbacks": sorted(fallbacks), "replaced": [list(pair) for pair in sorted(replaced)]}

    def load(self, state: dict[str, Any]) -> None:
        """Continue the epoch of `state`."""
        self._fallbacks = set(state["fallbacks"])
        self._replaced = {(bad, used) for bad, used in state["replaced"]}

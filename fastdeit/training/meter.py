"""The figures of the log's training lines: mean losses, images per second, share of time waiting for data."""

import time
from dataclasses import dataclass

import torch

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
    """Sums the losses on the device and times the steps, from one reading to the next."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._sums = torch.zeros(3, dtype=torch.float64, device=world.device)
        self._steps, self._elapsed, self._waited = 0, 0.0, 0.0
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
        self._steps += 1

    def read(self, wait_seconds: float, global_batch: int) -> Window:
        """Means over all processes and all steps since the last reading; starts the next window."""
        self.stop(wait_seconds)
        mean = self._world.sum(self._sums.clone()) / (self._steps * self._world.size)
        elapsed = max(self._elapsed, 1e-9)
        rate, waited = self._steps * global_batch / elapsed, min(1.0, self._waited / elapsed)
        self._sums.zero_()
        self._steps, self._elapsed, self._waited = 0, 0.0, 0.0
        return Window(PendingNumbers(mean), rate, waited)

"""How long each process waits for data in an epoch, and what may hold its data up."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from fastdeit.distributed import World
from fastdeit.pipelines.loaders.prefetch import usable_cores
from fastdeit.pipelines.machine import file_system

_SHARE, _SECONDS = 0.2, 10.0  # of an epoch, both, from which on a process is named
_BUSY = 0.8  # share of the cores' time from which on they are the limit


@dataclass(frozen=True)
class Wait:
    """A process in an epoch.

    share    of the epoch's time that it waited for data
    seconds  that it waited
    busy     share of its cores' time that its threads used
    read     MB/s that it read from disks, not from the page cache; None if the system does not say
    host     its machine
    files    type and source of the file system that holds its training set; None if unknown
    """

    share: float
    seconds: float
    busy: float
    read: float | None
    host: str
    files: str | None = None


class DataWait:
    """Measures the epochs of this process; `path` is the training set."""

    def __init__(self, world: World, path: Path) -> None:
        self._world, self._path = world, path
        self._named: set[int] = set()
        self._first = True
        self._since = self._now(0.0)

    def start(self, waited: float) -> None:
        """Begin an epoch; `waited` is the prefetcher's total of seconds so far."""
        self._since = self._now(waited)

    def arrived(self, waited: float) -> None:
        """Note that a batch has arrived.

        Before the first one, numba compiles and the loader opens its files, so the measurement begins after it.
        """
        if self._first:
            self._first = False
            self.start(waited)

    def gathered(self, waited: float) -> list[Wait]:
        """The waits of all processes since `start`. Call it on all processes."""
        (clock, cpu, wait, read), (clock0, cpu0, wait0, read0) = self._now(waited), self._since
        elapsed, used, seconds = max(clock - clock0, 1e-9), cpu - cpu0, wait - wait0
        rate = None if read is None or read0 is None else (read - read0) / elapsed / 1e6
        cores = max(1.0, usable_cores() / self._world.local_size)
        busy = min(1.0, used / elapsed / cores)
        mine = Wait(min(1.0, seconds / elapsed), seconds, busy, rate, socket.gethostname(), file_system(self._path))
        return self._world.gathered(mine)

    def warnings(self, waits: list[Wait]) -> list[str]:
        """A sentence for each process that waited long, once a run."""
        out = []
        for rank, wait in enumerate(waits):
            if rank in self._named or wait.share < _SHARE or wait.seconds < _SECONDS:
                continue
            self._named.add(rank)
            read = "" if wait.read is None else f" and read {wait.read:.0f} MB/s from disk"
            where = f"{self._path} is on {wait.files or 'an unknown file system'} there"
            remedy = (
                "more cores, or smaller images (fastdeit-convert --max-side), would help"
                if wait.busy >= _BUSY
                else "a faster disk would help, such as a local one for --data.cache_dir"
            )
            out.append(
                f"process {rank} ({wait.host}) waited for data during {100 * wait.share:.0f}% of the epoch, and all "
                f"others with it. It kept its cores {100 * wait.busy:.0f}% busy{read}; {where}: {remedy}"
            )
        return out

    def _now(self, waited: float) -> tuple[float, float, float, float | None]:
        """Clock, CPU time, seconds waited, bytes read from disks."""
        cpu = os.times()
        return time.monotonic(), cpu.user + cpu.system, waited, _bytes_read()


def event(waits: list[Wait]) -> list[dict[str, object]]:
    """The waits for the log's file."""
    return [
        {name: round(value, 4) if isinstance(value, float) else value for name, value in asdict(wait).items()}
        for wait in waits
    ]


def _bytes_read() -> float | None:
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    return next((float(line.split()[1]) for line in lines if line.startswith("read_bytes:")), None)

"""Measure and store a figure: timed windows, and a record with machine, versions, commit and command."""

import json
import os
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from fastdeit.pipelines.errors import naming
from fastdeit.pipelines.loaders.prefetch import usable_cores
from fastdeit.training.run_record import source_commit, version

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "torchvision", "timm", "numpy", "numba", "pillow", "triton", "ffcv")
PEERS = ("nvidia-dali-cuda120", "nvidia-dali-cuda130", "webdataset", "spdl")  # of the loader benchmark


def first_line(error: BaseException) -> str:
    """The first line of an error's message, with its type unless it is a RuntimeError."""
    text = next(iter(str(error).splitlines()), "")
    return text if text and type(error) is RuntimeError else f"{type(error).__name__}: {text}".rstrip(": ")


@dataclass(frozen=True)
class Timing:
    """Rates of the timed windows, units per second."""

    rates: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rates)

    @property
    def spread(self) -> float:
        """Largest minus smallest rate, as a share of the median."""
        return (max(self.rates) - min(self.rates)) / self.median


def timed_window(
    step: Callable[[], int],
    seconds: float,
    synchronize: Callable[[], object] | None = None,
    *,
    most: int | None = None,
) -> float:
    """Units per second of one window: call `step`, which returns the units it did, until the time is over.

    synchronize  waits for the device if `step` only queues work there; called before the first and the last clock read
    most         units after which the window ends early
    """
    if synchronize is not None:
        synchronize()
    start = time.perf_counter()
    units = step()
    while time.perf_counter() - start < seconds and (most is None or units < most):
        units += step()
    if synchronize is not None:
        synchronize()
    return units / (time.perf_counter() - start)


def environment(packages: Iterable[str] = PACKAGES) -> dict[str, Any]:
    """Date, command, commit, hardware and versions of this process, as JSON takes them.

    A missing package, GPU or commit is None.
    """
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]]),
        "commit": source_commit(Path(__file__)),
        "cpu": _first_match(Path("/proc/cpuinfo"), r"model name\s*:\s*(.+)") or platform.processor() or None,
        "cores": usable_cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": _gpu(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
    }


def append(path: Path, record: dict[str, Any]) -> None:
    """Append `record` to `path` as a line of JSON; creates the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record, sort_keys=True) + "\n")


def _gpu() -> dict[str, Any] | None:
    if not torch.cuda.is_available():
        return None
    device = torch.cuda.get_device_properties(0)
    return {
        "name": device.name,
        "count": torch.cuda.device_count(),
        "memory_gib": round(device.total_memory / 2**30, 1),
        "driver": _first_match(Path("/proc/driver/nvidia/version"), r"Kernel Module.*?\s(\d+\.[\d.]+)"),
        "cuda": torch.version.cuda,
    }


def _first_match(path: Path, pattern: str) -> str | None:
    if not path.exists():
        return None
    match = re.search(pattern, path.read_text(encoding="utf-8", errors="replace"))
    return match[1].strip() if match else None

"""`python -m tests.soak`: check that an hour of epochs leaks no memory, file descriptors or threads.

Every epoch opens the data set, loads and augments all its batches as in a training run, without a model, and closes
everything again. The run passes if, after its first third,

- memory at the ends of epochs, with everything closed, does not grow by more than 1 MiB per 1000 batches (Theil and
  Sen's slope through the means of at most 100 blocks; the test fails if its whole 95% interval is above the limit);
- the mean memory of the last third is at most 5% above that of the second third;
- every epoch ends with the same number of descriptors and threads.

Memory is the resident set size of the process and its descendants. Unlike the proportional set size it does not depend
on what other programs share, and it includes files that stay mapped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from tqdm import tqdm

from benchmarks.loaders.contender_process import members
from benchmarks.photos import prepare_photos
from benchmarks.record import PACKAGES, PEERS, RESULTS, append, environment
from fastdeit.cli import parse, run
from fastdeit.config import Recipe
from fastdeit.data import TrainBatch, TrainingData
from fastdeit.distributed import World
from fastdeit.inputs import open_dataset
from fastdeit.pipelines.conversion.convert import convert
from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.loaders.prefetch import usable_cores
from fastdeit.recipes import deit_small
from tests.helpers.runs import changed

MAX_SLOPE = 1.0  # MiB per 1000 batches
MAX_GROWTH = 0.05
_BLOCKS, _BLOCK_EPOCHS = 100, 4  # maximum number of blocks, minimum number of epochs in one
_FEWEST_EPOCHS = 12  # needed after the warm-up third to estimate a slope


@dataclass(frozen=True, kw_only=True)
class Options:
    """Watch epochs of loading and augmenting for leaks; exit status 1 if something grows."""

    minutes: float = 60.0
    epochs: int = 1  # the least number, however long they take
    photos: Path = Path("runs/photos")  # JPEG files as an ImageFolder tree; cut from Debian's wallpapers if not there
    data: Path | None = None  # a .beton file or a folder of shards in place of the photographs
    loader: str = "turbo"  # a name that data.loader takes
    repeats: int = 3
    batch: int = 128
    threads: int = 0  # 0: all usable cores
    img_size: int = 224
    sample_seconds: float = 1.0
    plot: Path | None = None  # draw the samples into this file (.svg, .png); needs matplotlib
    results: Path = RESULTS / "soak.jsonl"


@dataclass(frozen=True)
class Sample:
    """Resources of the process and its descendants; at an `epoch_end` everything of the epoch is closed."""

    seconds: float
    batches: int
    memory_mib: float
    descriptors: int
    threads: int
    epoch_end: bool


class Watch:
    """Sample this process periodically in a thread, and at the ends of epochs on request.

    batches  so far; the caller counts them
    """

    def __init__(self, interval: float) -> None:
        self.batches = 0
        self.samples: list[Sample] = []
        self._interval, self._start = interval, time.monotonic()
        self._stop, self._looking = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._run, name="soak-watch", daemon=True)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def look(self, *, epoch_end: bool = False) -> None:
        memory = descriptors = threads = 0
        # One at a time, because sampling itself uses a descriptor.
        with self._looking:
            for member in members(os.getpid()):
                with contextlib.suppress(psutil.NoSuchProcess):
                    memory += member.memory_info().rss
                    descriptors += member.num_fds()
                    threads += member.num_threads()
            self.samples.append(Sample(self.seconds, self.batches, memory / 2**20, descriptors, threads, epoch_end))

    def settle(self) -> None:
        """Wait at most a second for joined threads to disappear: the kernel counts them a moment longer."""
        before = next((sample.threads for sample in reversed(self.samples) if sample.epoch_end), sys.maxsize)
        process, deadline = psutil.Process(), time.monotonic() + 1
        while process.num_threads() > before and time.monotonic() < deadline:
            time.sleep(0.002)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            self.look()


def soak(options: Options, data: Path, consume: Callable[[TrainBatch], object] | None = None) -> list[Sample]:
    """Run over the data set at `data` until both the time and the epochs are up; returns the samples.

    consume  called with every batch
    """
    alone = World(0, 1, 1, torch.device("cpu"))
    total = 60 * options.minutes
    gc.collect()
    gc.freeze()  # imported objects: collecting them at every epoch's end would take longer than a short epoch
    with Watch(options.sample_seconds) as watch, tqdm(total=round(total), unit="s", desc="soak", disable=None) as bar:
        for epoch in range(sys.maxsize):
            dataset = open_dataset(data)
            loading = TrainingData(_recipe(options, epochs=epoch + 1), dataset, alone)
            with loading.batches(epoch) as batches:
                for batch in batches:
                    watch.batches += 1
                    if consume is not None:
                        consume(batch)
                    del batch
            loading.close()
            dataset.close()
            del dataset, loading, batches
            gc.collect()
            watch.settle()
            watch.look(epoch_end=True)
            bar.update(min(round(watch.seconds), bar.total) - bar.n)
            if watch.seconds >= total and epoch + 1 >= options.epochs:
                break
    gc.unfreeze()
    return watch.samples


def _recipe(options: Options, epochs: int) -> Recipe:
    data = {"loader": options.loader, "threads": options.threads, "repeats": options.repeats}
    run = {"global_batch": options.batch, "epochs": epochs}
    return changed(deit_small(), model={"img_size": options.img_size}, data=data, run=run).resolved()


@dataclass(frozen=True)
class Verdict:
    """The result of a soak; it passed if there are no reasons.

    slope     MiB per 1000 batches at the ends of epochs, and its 95% interval
    growth    relative growth of the mean memory from the second third to the last
    descriptors, threads  minimum and maximum at the ends of epochs
    """

    slope: float
    interval: tuple[float, float]
    growth: float
    descriptors: tuple[int, int]
    threads: tuple[int, int]
    reasons: tuple[str, ...]


def judge(samples: Sequence[Sample], *, max_slope: float = MAX_SLOPE, max_growth: float = MAX_GROWTH) -> Verdict:
    """Judge the samples after the warm-up third. Raises UserError if too few epochs ended after it."""
    last = max(sample.seconds for sample in samples)
    second = [s for s in samples if last / 3 <= s.seconds < 2 * last / 3]
    third = [s for s in samples if s.seconds >= 2 * last / 3]
    ends = [s for s in [*second, *third] if s.epoch_end]
    if len(ends) < _FEWEST_EPOCHS:
        raise UserError(
            f"{len(ends)} epochs ended after the first third of the time, and {_FEWEST_EPOCHS} are needed to see a "
            "slope: give more --minutes or fewer images"
        )
    slope, low, high = robust_slope(
        _block_means([s.batches / 1000 for s in ends]), _block_means([s.memory_mib for s in ends])
    )
    before, after = (_mean_memory(part) for part in (second, third))
    growth = after / before - 1
    reasons = []
    if low > max_slope:
        reasons.append(
            f"memory at the ends of epochs grows by {slope:.2f} MiB per 1000 batches (95%: {low:.2f} to {high:.2f}); "
            f"{max_slope:g} is allowed"
        )
    if growth > max_growth:
        reasons.append(
            f"memory grew by {growth:.1%}, from {before:.0f} to {after:.0f} MiB; {max_growth:.0%} is allowed"
        )
    counts = {}
    for name in ("descriptors", "threads"):
        values = [getattr(sample, name) for sample in ends]
        counts[name] = min(values), max(values)
        if min(values) != max(values):
            reasons.append(f"{name} at the ends of epochs went from {values[0]} to {values[-1]}, at most {max(values)}")
    return Verdict(slope, (low, high), growth, **counts, reasons=tuple(reasons))


def robust_slope(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Theil and Sen's slope of the points (N,), and its 95% interval (Sen, 1968)."""
    n = len(x)
    first, second = np.triu_indices(n, 1)
    slopes = np.sort((y[second] - y[first]) / (x[second] - x[first]))
    half = 1.96 * math.sqrt(n * (n - 1) * (2 * n + 5) / 18) / 2
    lower = max(round(len(slopes) / 2 - half) - 1, 0)
    upper = min(round(len(slopes) / 2 + half), len(slopes) - 1)
    return float(np.median(slopes)), float(slopes[lower]), float(slopes[upper])


def _block_means(values: Sequence[float]) -> np.ndarray:
    # Means: when an allocator sometimes keeps a buffer, a median jumps by its whole size.
    blocks = min(_BLOCKS, len(values) // _BLOCK_EPOCHS)
    return np.array([block.mean() for block in np.array_split(np.asarray(values), blocks)])


def _mean_memory(samples: Sequence[Sample]) -> float:
    # Memory is low at the end of an epoch, and short epochs end often: use those samples only if there are no others.
    running = [s.memory_mib for s in samples if not s.epoch_end]
    return float(np.mean(running or [s.memory_mib for s in samples]))


def plot(samples: Sequence[Sample], verdict: Verdict, path: Path) -> None:
    """Draw memory, and below it descriptors and threads, over time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.4), layout="constrained")
    memory, counts = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    ends = [s for s in samples if s.epoch_end]
    running = [s for s in samples if not s.epoch_end]
    last = max(s.seconds for s in samples) / 60
    memory.plot(*_over_minutes(running, "memory_mib"), color="#1f6fb4", lw=1, label="while it loads")
    memory.plot(*_over_minutes(ends, "memory_mib"), ".", ms=3, color="#d9822b", label="ends of epochs")
    memory.set(ylabel="memory, MiB", ylim=(0, 1.08 * max(s.memory_mib for s in samples)))
    memory.set_title(
        f"{'flat' if not verdict.reasons else 'NOT flat'}: {verdict.slope:+.2f} MiB per 1000 batches "
        f"({verdict.interval[0]:+.2f} to {verdict.interval[1]:+.2f}), {verdict.growth:+.1%}",
        fontsize=10,
    )
    counts.plot(*_over_minutes(ends, "descriptors"), color="#2f8f4e", label="file descriptors, ends of epochs")
    counts.plot(*_over_minutes(ends, "threads"), color="#7a4fa3", label="threads, ends of epochs")
    counts.set(xlabel="minutes", ylim=(0, 1.15 * max(max(s.descriptors, s.threads) for s in ends)))
    for axis in (memory, counts):
        axis.axvspan(0, last / 3, color="#eeeeee", zorder=0)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8, loc="lower right")
    memory.text(last / 6, 0.03, "warm-up", transform=memory.get_xaxis_transform(), ha="center", color="#888888")
    figure.savefig(path, dpi=120)


def _over_minutes(samples: Sequence[Sample], name: str) -> tuple[list[float], list[float]]:
    return [s.seconds / 60 for s in samples], [getattr(s, name) for s in samples]


@contextlib.contextmanager
def _prepared(options: Options) -> Iterator[Path]:
    """The data set to use."""
    if options.data is not None:
        yield options.data
        return
    prepare_photos(options.photos)
    with tempfile.TemporaryDirectory() as folder:
        beton = Path(folder) / "photos.beton"
        convert(str(options.photos), beton, progress=False)
        yield beton


def measure(options: Options) -> bool:
    """Soak, judge, append to the results, print and draw; return whether it passed."""
    machine = environment((*PACKAGES, *PEERS))
    with _prepared(options) as data:
        samples = soak(options, data)
    verdict = judge(samples)
    record = {
        "benchmark": "soak",
        "environment": machine,
        "minutes": options.minutes,
        "loader": options.loader,
        "repeats": options.repeats,
        "batch": options.batch,
        "threads": options.threads or usable_cores(),
        "batches": samples[-1].batches,
        "epochs": sum(sample.epoch_end for sample in samples),
        "peak_memory_mib": round(max(sample.memory_mib for sample in samples), 1),
        "passed": not verdict.reasons,
        "verdict": dataclasses.asdict(verdict),
    }
    append(options.results, record)
    print(report(record), flush=True)
    if options.plot is not None:
        plot(samples, verdict, options.plot)
    return not verdict.reasons


def report(record: dict[str, Any]) -> str:
    """A record for the terminal: the figures, and the reasons if it failed."""
    verdict = record["verdict"]
    counts = [f"{name} {min(verdict[name])} to {max(verdict[name])}" for name in ("descriptors", "threads")]
    low, high = verdict["interval"]
    lines = [
        f"{record['loader']}, {record['minutes']:g} minutes: {record['batches']} batches of {record['batch']} in "
        f"{record['epochs']} epochs; memory at most {record['peak_memory_mib']:.0f} MiB, {verdict['slope']:+.2f} MiB "
        f"per 1000 batches (95%: {low:+.2f} to {high:+.2f}), {verdict['growth']:+.1%}; " + ", ".join(counts),
        *(f"failed: {reason}" for reason in verdict["reasons"]),
    ]
    return "\n".join(lines if verdict["reasons"] else [*lines, "passed"])


def main(argv: Sequence[str] | None = None) -> None:
    """The command; exit status 1 if something grew."""
    if not run(lambda: measure(parse(Options, "python -m tests.soak", argv))):
        sys.exit(1)

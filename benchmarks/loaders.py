"""`python -m benchmarks loaders`: training batches per second of the complete recipe, from JPEG files on a CPU.

Ours and timm's side by side in one run: every side is a process group of its own, the windows alternate between
them, and a side whose turn it is not is stopped, so that it neither works ahead nor takes anything from the others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import tyro

from benchmarks.loader_sides import SIDES, Setting
from benchmarks.photos import make_photos
from benchmarks.record import RESULTS, Timing, append, environment
from fastdeit.cli import UserError, run
from fastdeit.pipelines.convert import convert
from fastdeit.pipelines.pool import usable_cores

_START_SECONDS = 300.0  # imports, compilation and the first batches
_SAMPLE_SECONDS = 0.5  # between looks at the memory
_PEER = "timm"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Loaders with the complete recipe, timm's beside ours in the same run."""

    photos: Path = Path("runs/photos")  # JPEG files as an ImageFolder tree; cut from Debian's wallpapers if not there
    batch: int = 256
    threads: int = 0  # of each side, decoding threads or worker processes; 0: all usable cores
    windows: int = 5  # timed windows of each side
    window_seconds: float = 10.0
    sides: tuple[str, ...] = tuple(SIDES)  # whom to measure; x3: with repeated augmentation
    results: Path = RESULTS / "loaders.jsonl"


class SideError(Exception):
    """A side that ended, or did not answer in time; with the end of what it printed."""


@dataclass
class Side:
    """A competitor in its own process group, running only while it is measured."""

    setting: Setting
    process: subprocess.Popen[str]
    printed: Path
    remarks: tuple[str, ...] = ()
    rates: list[float] = field(default_factory=list)  # images per second, one a window
    images: int = 0  # in the windows and before each of them
    cpu_before: float = 0.0
    cpu_seconds: float = 0.0  # for those images
    peak_memory_mib: float = 0.0

    @classmethod
    def start(cls, setting: Setting, folder: Path) -> Side:
        """Start it, wait until it is warm, and stop it. Raises SideError."""
        printed = folder / f"{setting.name}.txt"
        with open(printed, "w", encoding="utf-8") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.loader_sides", json.dumps(dataclasses.asdict(setting))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=Path(__file__).parents[1],
                start_new_session=True,
            )
        side = cls(setting, process, printed)
        try:
            side.remarks = tuple(side._answer(_START_SECONDS)["remarks"])
        except BaseException:
            side.kill()
            raise
        os.killpg(process.pid, signal.SIGSTOP)
        side.cpu_before = _cpu_seconds(process.pid)
        return side

    def run_window(self, seconds: float) -> None:
        """Let it run for one window. Raises SideError."""
        assert self.process.stdin is not None
        os.killpg(self.process.pid, signal.SIGCONT)
        try:
            self.process.stdin.write(json.dumps({"seconds": seconds}) + "\n")
            self.process.stdin.flush()
            answer = self._answer(_START_SECONDS + 10 * seconds)
        except BrokenPipeError as error:
            raise self._error("it ended") from error
        os.killpg(self.process.pid, signal.SIGSTOP)
        self.rates.append(answer["rate"])
        self.images = answer["images"]
        self.cpu_seconds = _cpu_seconds(self.process.pid) - self.cpu_before

    def kill(self) -> None:
        """End it and every process it started, whatever state they are in."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()

    def _answer(self, seconds: float) -> dict[str, Any]:
        assert self.process.stdout is not None
        for _ in range(round(seconds / _SAMPLE_SECONDS)):
            if select.select([self.process.stdout], [], [], _SAMPLE_SECONDS)[0]:
                if line := self.process.stdout.readline():
                    return json.loads(line)
                raise self._error("it ended")
            self.peak_memory_mib = max(self.peak_memory_mib, _memory_mib(self.process.pid))
        raise self._error(f"no answer in {seconds:.0f} s")

    def _error(self, what: str) -> SideError:
        lines = self.printed.read_text(encoding="utf-8").strip().splitlines()
        return SideError(f"{what}: {lines[-1] if lines else 'it printed nothing'}")

    def figures(self) -> dict[str, Any]:
        timing = Timing(tuple(self.rates))
        return {
            "images_per_second": timing.median,
            "spread": timing.spread,
            "windows": self.rates,
            "cpu_ms_per_image": 1000 * self.cpu_seconds / self.images,
            "peak_memory_mib": round(self.peak_memory_mib, 1),
            "remarks": self.remarks,
        }


def _members(pid: int) -> list[psutil.Process]:
    """A process and all that it started."""
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def _memory_mib(pid: int) -> float:
    """Memory of a process and its children; pages they share count once over all who share them."""
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        for member in _members(pid):
            with contextlib.suppress(psutil.NoSuchProcess):
                total += member.memory_full_info().pss
    return total / 2**20


def _cpu_seconds(pid: int) -> float:
    """Time that a process and its children have spent on cores, in the kernel too."""
    return sum(times.user + times.system for times in (member.cpu_times() for member in _members(pid)))


def measure(options: Options) -> dict[str, Any]:
    """The record of a run: rates and peak memory of every side. A side that fails is left out and named.

    Raises UserError for a side that does not exist and for a folder without photographs.
    """
    if unknown := [name for name in options.sides if name not in SIDES]:
        raise UserError(f"--sides {' '.join(unknown)}: there are only {', '.join(SIDES)}")
    photos = prepare_photos(options.photos)
    sizes = [path.stat().st_size for path in photos]
    record: dict[str, Any] = {
        "benchmark": "loaders",
        "environment": environment(),
        "load_before": os.getloadavg()[0],
        "batch": options.batch,
        "threads": options.threads or usable_cores(),
        "images": len(photos),
        "mean_bytes": round(sum(sizes) / len(sizes)),
        "memory": "largest sum over a side's processes of the proportional set size, looked at twice a second",
    }
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        beton = folder / "photos.beton"
        convert(str(options.photos), beton, progress=False)
        with _started(options, record["threads"], beton, failed) as sides:
            for window in range(options.windows):
                # Every other round runs backwards, so that no side always follows the same one.
                for side in list(sides.values())[:: -1 if window % 2 else 1]:
                    try:
                        side.run_window(options.window_seconds)
                    except SideError as error:
                        failed[side.setting.name] = str(error)
                        sides.pop(side.setting.name).kill()
            return {**record, "failed": failed, "sides": {name: side.figures() for name, side in sides.items()}}


@contextlib.contextmanager
def _started(options: Options, threads: int, beton: Path, failed: dict[str, str]) -> Iterator[dict[str, Side]]:
    """The sides, warm and stopped; killed in the end. One that does not start is named in `failed`."""
    sides: dict[str, Side] = {}
    try:
        for name in options.sides:
            setting = Setting(name, str(options.photos.resolve()), str(beton), options.batch, threads)
            try:
                sides[name] = Side.start(setting, beton.parent)
            except SideError as error:
                failed[name] = str(error)
        yield sides
    finally:
        for side in sides.values():
            side.kill()


def prepare_photos(folder: Path) -> list[Path]:
    """The JPEG files in `folder`, cut first where it does not exist. Raises UserError where it holds none."""
    if not folder.exists():
        print(f"{folder}: cutting photographs, once, for some minutes", flush=True)
        make_photos(folder)
    photos = sorted(folder.glob("*/*.jpg"))
    if not photos:
        raise UserError(f"--photos {folder}: no JPEG files in its class folders; name another, or one to be made")
    return photos


def report(record: dict[str, Any]) -> str:
    """The record as a table."""
    lines = [
        f"batch {record['batch']}, {record['threads']} threads or workers, {record['images']} JPEGs of "
        f"{record['mean_bytes'] / 1000:.0f} kB, load {record['load_before']:.1f} before",
        f"{'':20}{'im/s':>8}{'spread':>8}{'CPU ms':>8}{'MiB':>8}{'/ timm':>8}",
    ]
    peer = record["sides"].get(_PEER)
    for name, figures in record["sides"].items():
        rate = figures["images_per_second"]
        ratio = f"{rate / peer['images_per_second']:.2f}" if peer else ""
        lines.append(
            f"{name:20}{rate:8.0f}{figures['spread']:8.0%}{figures['cpu_ms_per_image']:8.2f}"
            f"{figures['peak_memory_mib']:8.0f}{ratio:>8}"
        )
    lines += [f"{name}: failed: {reason}" for name, reason in record["failed"].items()]
    lines += [f"{name}: {remark}" for name, figures in record["sides"].items() for remark in figures["remarks"]]
    return "\n".join(lines)


def loaders(options: Options) -> bool:
    """Measure, print, and append to the results; whether every side could be timed."""
    record = measure(options)
    append(options.results, record)
    print(report(record), flush=True)
    return not record["failed"]


def main(argv: Sequence[str] | None = None) -> None:
    """The command; exit status 1 where a side could not be timed."""
    options = tyro.cli(Options, args=argv, prog="python -m benchmarks loaders")
    if not run(lambda: loaders(options)):
        sys.exit(1)

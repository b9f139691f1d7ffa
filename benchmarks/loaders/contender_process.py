"""A contender of the loader benchmark, seen from its parent: a process group that runs only while it is measured."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.loaders.peers.stream import Missing, Setting
from benchmarks.record import Timing
from fastdeit.pipelines.parsing import parse_json

_START_SECONDS = 300.0  # imports, compilation and the first batches
_SAMPLE_SECONDS = 0.5  # between looks at the memory


class ContenderError(Exception):
    """A contender ended or did not answer in time; the message has the last line that it printed."""


@dataclass
class ContenderProcess:
    """A contender in its own process group, stopped except while it is measured."""

    setting: Setting
    process: subprocess.Popen[str]
    log: Path
    remarks: tuple[str, ...] = ()
    rates: list[float] = field(default_factory=list)  # images per second, one per window
    resident: list[float] = field(default_factory=list)  # share of the bytes still cached, one per cold window
    images: int = 0  # in and between the windows
    cpu_before: float = 0.0
    cpu_seconds: float = 0.0  # for those images
    peak_memory_mib: float = 0.0

    @classmethod
    def start(cls, setting: Setting, folder: Path) -> ContenderProcess:
        """Start it, wait until it is warm, and stop it. Raises ContenderError, or Missing if it is not installed."""
        log = folder / f"{setting.name}.txt"
        with open(log, "w", encoding="utf-8") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.loaders.contenders", json.dumps(dataclasses.asdict(setting))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=Path(__file__).parents[2],
                env=_environment(setting.name, folder),
                start_new_session=True,
            )
        contender = cls(setting, process, log)
        try:
            answer = contender._answer(_START_SECONDS)
            if "missing" in answer:
                raise Missing(answer["missing"])
            contender.remarks = tuple(answer["remarks"])
        except BaseException:
            contender.kill()
            raise
        os.killpg(process.pid, signal.SIGSTOP)
        contender.cpu_before = _cpu_seconds(process.pid)
        return contender

    def run_window(self, seconds: float, *, cold: bool = False) -> None:
        """Let it run for one window, starting with an empty page cache if `cold`. Raises ContenderError."""
        assert self.process.stdin is not None
        os.killpg(self.process.pid, signal.SIGCONT)
        try:
            self.process.stdin.write(json.dumps({"seconds": seconds, "cold": cold}) + "\n")
            self.process.stdin.flush()
            answer = self._answer(_START_SECONDS + 10 * seconds)
        except BrokenPipeError as error:
            raise self._error("it ended") from error
        os.killpg(self.process.pid, signal.SIGSTOP)
        self.rates.append(answer["rate"])
        self.images = answer["images"]
        if answer["resident"] is not None:
            self.resident.append(answer["resident"])
        self.cpu_seconds = _cpu_seconds(self.process.pid) - self.cpu_before

    def kill(self) -> None:
        """Kill it and every process it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()

    def _answer(self, seconds: float) -> dict[str, Any]:
        assert self.process.stdout is not None
        for _ in range(round(seconds / _SAMPLE_SECONDS)):
            if select.select([self.process.stdout], [], [], _SAMPLE_SECONDS)[0]:
                if line := self.process.stdout.readline():
                    return parse_json(line)
                raise self._error("it ended")
            self.peak_memory_mib = max(self.peak_memory_mib, memory_mib(self.process.pid))
        raise self._error(f"no answer in {seconds:.0f} s")

    def _error(self, reason: str) -> ContenderError:
        lines = self.log.read_text(encoding="utf-8").strip().splitlines()
        return ContenderError(f"{reason}: {lines[-1] if lines else 'it printed nothing'}")

    def figures(self) -> dict[str, Any]:
        timing = Timing(tuple(self.rates))
        remarks = [*self.remarks]
        if self.resident:
            remarks.append(f"up to {max(self.resident):.1%} of the stored bytes stayed in the page cache")
        return {
            "images_per_second": timing.median,
            "spread": timing.spread,
            "windows": self.rates,
            "cpu_ms_per_image": 1000 * self.cpu_seconds / self.images,
            "peak_memory_mib": round(self.peak_memory_mib, 1),
            "remarks": remarks,
        }


def _environment(name: str, folder: Path) -> dict[str, str] | None:
    """DALI leaves temporary files behind when it is killed; others have sockets there, whose paths must be short."""
    return {**os.environ, "TMPDIR": str(folder)} if "dali" in name else None


def members(pid: int) -> list[psutil.Process]:
    """A process and all its descendants."""
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def memory_mib(pid: int) -> float:
    """Memory of a process and its descendants, each page divided among the processes that share it."""
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        for member in members(pid):
            with contextlib.suppress(psutil.NoSuchProcess):
                total += member.memory_full_info().pss
    return total / 2**20


def _cpu_seconds(pid: int) -> float:
    """CPU time of a process and its descendants, user and system."""
    return sum(times.user + times.system for times in (member.cpu_times() for member in members(pid)))

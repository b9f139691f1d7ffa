"""`python -m benchmarks gpu`: every check and figure that needs a GPU, in one command of eight minutes.

The order is: throughput of our model and timm's, the tests of the kernels (attention in bf16 first), the other tests
marked `gpu`, the kernels and every alternative, and the whole loader. Each part has a share of the time and passes on
the rest; `--part throughput` gives one part all of it. Every record is written at once. Nothing needs to be installed:
a checkout, PyTorch, Triton, timm, torchvision and numba are enough. The tests also need pytest, and run in parallel
with pytest-xdist; the loader also needs tyro, photographs (see `loaders`) and, for its GPU decoder, DALI.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Timer
from typing import Any

import torch

from benchmarks import tables
from benchmarks.kernels import benchmark as kernels
from benchmarks.record import RESULTS, environment
from benchmarks.render import Table
from benchmarks.throughput import benchmark as throughput
from fastdeit.cli import run
from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.loaders.prefetch import usable_cores

ROOT = Path(__file__).parents[1]
# Modules of the peers, and their names in the summary.
PEERS = {"flash_attn": "flash-attn", "liger_kernel": "liger-kernel", "apex": "apex", "kornia": "kornia"}
PEERS |= {"nvidia.dali": "nvidia-dali", "pytest": "pytest: without it no test ran"}
# The parts in order, and their shares of the time.
PARTS = {"throughput": 0.45, "tests": 0.2, "kernels": 0.2, "loaders": 0.15}
TESTED = ("kernels", "pipelines", "fastdeit")  # folders of tests; the benchmarks' own tests need no GPU
WORKERS = 12  # test processes that share the GPU
LATE = 0.06  # share of the time reserved for a case that began in time
GRACE = 10.0  # seconds between interrupting and killing a process
LOADERS = ("fastdeit-dali-x3-gpu", "fastdeit-turbo-x3-gpu", "fastdeit-torch-x3-gpu")


@dataclass(frozen=True)
class Step:
    """The result of a part of the run.

    status  "passed", "failed", "cut" if its time was over before anything failed, or "missing"
    """

    name: str
    status: str
    seconds: float
    message: str = ""


def test_runs(tests: Path) -> dict[str, list[str | Path]]:
    """pytest's arguments of each test run: first the kernels, whose tests all use the GPU."""
    kernel_tests = sorted((tests / "kernels").glob("test_*.py"), key=lambda path: (path.stem != "test_attention", path))
    marked = [
        path
        for folder in TESTED[1:]
        for path in sorted((tests / folder).rglob("test_*.py"))
        if "pytest.mark.gpu" in path.read_text()
    ]
    return {"tests of the kernels": [*kernel_tests], "other tests marked gpu": ["-m", "gpu", *marked]}


def run_tests(name: str, arguments: Sequence[str | Path], seconds: float, root: Path = ROOT) -> Step:
    """Run pytest in its own process, for at most `seconds`; show its output."""
    if importlib.util.find_spec("pytest") is None:
        return Step(name, "missing", 0.0, "pip install pytest")
    parallel = ["-n", str(min(WORKERS, usable_cores()))] if _is_installed("xdist") else []
    command = ["pytest", "-q", "--continue-on-collection-errors", "-p", "no:cacheprovider", *parallel]
    command += map(str, arguments)
    begin = time.perf_counter()
    message, code, cut = _follow(command, seconds, root)
    return Step(name, pytest_status(message, code, cut), time.perf_counter() - begin, message)


def run_loaders(results: Path, seconds: float, root: Path = ROOT) -> Step:
    """Time whole loaders in its own process, for at most `seconds`; show its output."""
    if not _is_installed("tyro"):
        return Step("loaders", "missing", 0.0, "pip install tyro")
    command = ["benchmarks", "loaders", "--quick", "--batch", "256", "--repeats", "3", "--results", str(results)]
    begin = time.perf_counter()
    message, code, cut = _follow([*command, "--sides", *LOADERS], seconds, root, errors=subprocess.STDOUT)
    # Exit status 2: a requirement is missing, and `message` names it.
    status = "passed" if code == 0 else "cut" if cut else "missing" if code == 2 else "failed"
    return Step("loaders", status, time.perf_counter() - begin, message)


def _follow(module: Sequence[str], seconds: float, root: Path, errors: int | None = None) -> tuple[str, int, bool]:
    """Run a module in its own process; returns its last line, its exit status, and whether its time was over.

    errors  destination of standard error; None: ours
    """
    command = [sys.executable, "-u", "-m", *module]  # unbuffered: a killed process has printed all its output
    lines: list[str] = []
    with subprocess.Popen(
        command, cwd=root, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        # An interrupted process still prints its summary; one that hangs is killed, with its children.
        interrupt = Timer(seconds, lambda: _signal(process, signal.SIGINT))
        kill = Timer(seconds + GRACE, lambda: _signal(process, signal.SIGKILL))
        try:
            interrupt.start()
            kill.start()
            for line in process.stdout:
                print(line, end="", flush=True)
                lines += [line.strip()] if line.strip() else []
            code = process.wait()
            cut = interrupt.finished.is_set()
        finally:
            interrupt.cancel()
            kill.cancel()
            _signal(process, signal.SIGKILL)
    return lines[-1].strip("= ") if lines else f"exit status {code}", code, cut


def pytest_status(message: str, code: int, cut: bool) -> str:
    """The status of a test run, from its last line, its exit status, and whether it was interrupted; see `Step`."""
    if "failed" in message or "error" in message or (code != 0 and not cut):
        return "failed"
    return "cut" if cut else "passed"


def _signal(process: subprocess.Popen[str], number: signal.Signals) -> None:
    """Send a signal to a process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def run_benchmark(name: str, results: Path, budget: float, seconds: float, root: Path = ROOT) -> Step:
    """Time kernels or models in its own process, for at most `seconds`; show its output.

    A kernel that writes out of bounds makes the GPU unusable for its process, and one that does not end blocks it.

    budget  seconds after which no new case begins
    """
    command = ["benchmarks", "gpu", "--in-process", name, "--budget", str(budget), "--results", str(results)]
    begin = time.perf_counter()
    message, code, cut = _follow(command, seconds, root, errors=subprocess.STDOUT)
    status = "passed" if code == 0 else "cut" if cut else "failed"
    reasons = {0: "", 1: f"something of ours was refused or failed: {message}"}
    reason = "its time was over" if cut and code else reasons.get(code, f"exit status {code}: {message}")
    return Step(name, status, time.perf_counter() - begin, reason)


def benchmark(name: str, results: Path, budget: float) -> bool:
    """The process of `run_benchmark`; returns whether none of ours was refused or failed."""
    if name == "kernels":
        return kernels.run_benchmark(kernels.Options(results=results / "kernels.jsonl", budget=budget))
    options = throughput.Options(
        models=("base", "small", "tiny"),
        mode=("train",),
        quick=True,
        results=results / "throughput.jsonl",
        budget=budget,
    )
    return throughput.run_benchmark(options)


def summary(steps: Sequence[Step], records: Sequence[dict[str, Any]], machine: dict[str, Any]) -> str:
    """The run as Markdown: machine, steps, missing peers, targets, tables."""
    name = machine["gpu"]["name"] if machine["gpu"] else machine["cpu"]
    rows = [(step.name, step.status, f"{step.seconds:.0f}", step.message) for step in steps]
    table = Table(title="", columns=("step", "status", "s", ""), align="llrl", rows=rows)
    lines = [f"# GPU run, {name}, {machine['date'][:16].replace('T', ' ')} UTC", "", table.markdown()]
    absent = [package for module, package in PEERS.items() if not _is_installed(module)]
    lines += ["", f"Not installed: {', '.join(absent)}." if absent else "Every peer is installed.", ""]
    targets = [target for record in records for target in record.get("targets", [])]
    if targets:
        reached = sum(target["reached"] for target in targets)
        lines += [f"{reached} of {len(targets)} targets reached.", ""]
    lines.append(tables.markdown(records) if records else "Nothing was timed.")
    return "\n".join(lines) + "\n"


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package
        return False


def run_parts(minutes: float, results: Path, parts: Sequence[str] = tuple(PARTS), device: str | None = None) -> bool:
    """Run some of `PARTS` and write `gpu.md` to the folder `results`; return whether none failed.

    device  None: a GPU; raises UserError if there is none
    """
    if device is None and not torch.cuda.is_available():
        raise UserError("PyTorch sees no GPU: the kernels run under Triton's interpreter in `pytest` instead")
    begin, machine, seconds = time.perf_counter(), environment(), 60 * minutes
    files = {name: results / f"{name}.jsonl" for name in ("kernels", "loaders", "throughput")}
    before = {name: len(tables.read(path)) for name, path in files.items()}
    steps: list[Step] = []

    def add(step: Step) -> None:
        steps.append(step)
        records = [record for name, path in files.items() for record in tables.read(path)[before[name] :]]
        results.mkdir(parents=True, exist_ok=True)
        (results / "gpu.md").write_text(summary(steps, records, machine))

    chosen = [name for name in PARTS if name in parts]
    for name in chosen:
        # The chosen parts share the time of the others in proportion.
        share = sum(PARTS[n] for n in chosen[: chosen.index(name) + 1]) / sum(PARTS[n] for n in chosen)

        def left(share: float = share) -> float:
            return max(1.0, share * seconds - (time.perf_counter() - begin))

        if name == "tests":
            runs = test_runs(ROOT / "tests")
            for i, (which, arguments) in enumerate(runs.items(), 1):
                add(run_tests(which, arguments, left() * i / len(runs)))
        elif name == "loaders":
            add(run_loaders(files["loaders"], left()))
        else:
            budget = max(1.0, left() - LATE * seconds)
            add(run_benchmark(name, results, budget, budget + LATE * seconds))
    print((results / "gpu.md").read_text())
    return all(step.status != "failed" for step in steps)


def main(argv: Sequence[str] | None = None) -> None:
    """The command; exit status 1 if a test or a kernel failed."""
    # argparse, because tyro need not be installed.
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description="Every check that needs a GPU.")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything (8)")
    help_text = "folder of kernels.jsonl, loaders.jsonl and throughput.jsonl, appended to, and gpu.md, rewritten"
    parser.add_argument("--results", type=Path, default=RESULTS, help=help_text)
    parser.add_argument("--part", choices=tuple(PARTS), nargs="+", default=tuple(PARTS), help="only these (all)")
    parser.add_argument("--in-process", choices=("kernels", "throughput"), help=argparse.SUPPRESS)
    parser.add_argument("--budget", type=float, default=0.0, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.in_process is not None:
        complete = run(lambda: benchmark(options.in_process, options.results, options.budget))
    else:
        complete = run(lambda: run_parts(options.minutes, options.results, options.part))
    if not complete:
        sys.exit(1)

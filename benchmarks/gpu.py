"""`python -m benchmarks gpu`: every check and figure that needs a GPU, as one plan of independent parts.

The parts, most important first: throughput of our model and timm's, with the kernels of our step; the tests of the
kernels (attention in bf16 first) and the other tests marked `gpu`; the kernels and every alternative; the augmentation
and the whole loader; the operations that PyTorch runs faster, for `model.kernels auto`, and the search for faster
launches. Each part has a limit of less than nine minutes and its own results, which are written as they are taken.
`--part kernels` runs one part alone. Nothing needs to be installed: a checkout, PyTorch, Triton, timm, torchvision and
numba are enough. The tests also need pytest, and run in parallel with pytest-xdist; the loader also needs tyro,
photographs (see `loaders`) and, for its GPU decoder, DALI.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Timer
from typing import Any

import torch

from benchmarks import tables
from benchmarks.kernels import benchmark as kernels
from benchmarks.kernels import choose, tune
from benchmarks.record import RESULTS, environment
from benchmarks.render import Table
from benchmarks.throughput import benchmark as throughput
from fastdeit.cli import run
from fastdeit.model import kernel_table
from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.loaders.prefetch import usable_cores

ROOT = Path(__file__).parents[1]
# Modules of the peers, and their names in the summary.
PEERS = {"flash_attn": "flash-attn", "flash_attn_interface": "flash-attn 3", "flash_attn.cute": "flash-attn 4"}
PEERS |= {"liger_kernel": "liger-kernel", "apex": "apex", "kornia": "kornia"}
PEERS |= {"nvidia.dali": "nvidia-dali", "pytest": "pytest (for the tests)", "tyro": "tyro (for the loaders)"}
# The parts in order of worth, and the seconds that each may take.
PARTS = {"throughput": 330.0, "tests": 480.0, "kernels": 510.0, "augmentation": 330.0, "tune": 510.0}
FILES = ("throughput", "profiles", "kernels", "loaders", "tune")  # of results
TESTED = ("kernels", "pipelines", "fastdeit")  # folders of tests; the benchmarks' own tests need no GPU
WORKERS = 12  # test processes that share the GPU
LATE = 25.0  # seconds reserved for a case that began in time
LEAST = 30.0  # a part with fewer seconds left does not begin
GRACE = 10.0  # seconds between interrupting and killing a process
LOADERS = ("fastdeit-dali-x3-gpu", "fastdeit-turbo-x3-gpu", "fastdeit-torch-x3-gpu")


@dataclass(frozen=True)
class Step:
    """The result of a part of the run.

    status  "passed", "failed", "cut" if its time was over before anything failed, "missing" if something is not
            installed, or "left out" if no time was left
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
    """Time kernels, models or launches in its own process, for at most `seconds`; show its output.

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
    if name == "throughput":
        options = throughput.Options(
            models=("base", "small", "tiny"),
            mode=("train",),
            quick=True,
            profile=True,
            results=results / "throughput.jsonl",
            budget=budget,
        )
        return throughput.run_benchmark(options)
    if name == "tune":
        begin, path = time.perf_counter(), results / "tune.jsonl"
        table = kernel_table.PATH if results == RESULTS else results / kernel_table.PATH.name
        complete = choose.choose(choose.Options(table=table, results=path, budget=budget / 2))
        left = max(1.0, budget - (time.perf_counter() - begin))
        return tune.tune_launches(tune.Options(results=path, budget=left)) and complete
    complete, begin = True, time.perf_counter()
    for options in _augmentation(results) if name == "augment" else _kernels(results):
        left = budget - (time.perf_counter() - begin)
        if left > 0:
            complete &= kernels.run_benchmark(dataclasses.replace(options, budget=left))
    return complete


def _augmentation(results: Path) -> list[kernels.Options]:
    return [kernels.Options(ops=("augment",), results=results / "kernels.jsonl")]


def _kernels(results: Path) -> list[kernels.Options]:
    """The kernels' cases in order of worth.

    Attention differs between odd and even numbers of tokens, since backends pad; the other operations hardly do.
    """
    path = results / "kernels.jsonl"
    rest = ("bias_gelu", "add_layer_norm", "layer_norm", "assemble_tokens", "distillation_loss")
    return [
        kernels.Options(ops=("attention",), models=("base",), tokens=(197, 198, 577, 578), results=path),
        kernels.Options(ops=rest, models=("base",), tokens=(198, 578), results=path),
        kernels.Options(ops=("attention",), models=("small", "tiny"), tokens=(197, 198, 577, 578), results=path),
        kernels.Options(ops=rest[:-1], models=("small", "tiny"), tokens=(198, 578), results=path),
    ]


def summary(steps: Sequence[Step], records: Sequence[dict[str, Any]], machine: dict[str, Any]) -> str:
    """The run as Markdown: machine, steps, missing peers, targets, tables."""
    name = machine["gpu"]["name"] if machine["gpu"] else machine["cpu"]
    rows = [(step.name, step.status, f"{step.seconds:.0f}", step.message) for step in steps]
    table = Table(title="", columns=("step", "status", "s", ""), align="llrl", rows=rows)
    lines = [f"# GPU run, {name}, {machine['date'][:16].replace('T', ' ')} UTC", "", table.markdown()]
    lines += ["", not_installed(), ""]
    targets = [target for record in records for target in record.get("targets", [])]
    if targets:
        reached = sum(target["reached"] for target in targets)
        lines += [f"{reached} of {len(targets)} targets reached.", ""]
    tuned = [f"- {tune.report(record)}" for record in records if record.get("benchmark") == "tune"]
    chosen = [record for record in records if record.get("benchmark") == "choose"]
    tuned = [*([choose.report(chosen).markdown(), ""] if chosen else []), *tuned]
    tabled = [record for record in records if record.get("benchmark") in tables.CONFIGURATION]
    lines += [*tuned, tables.markdown(tabled)] if tabled else tuned or ["Nothing was timed."]
    return "\n".join(lines) + "\n"


def not_installed() -> str:
    """A sentence that names the peers and tools that are missing."""
    absent = [package for module, package in PEERS.items() if not _is_installed(module)]
    return f"Not installed: {', '.join(absent)}." if absent else "Every peer is installed."


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package
        return False


def run_parts(
    results: Path, parts: Sequence[str] = tuple(PARTS), minutes: float = 0.0, device: str | None = None
) -> bool:
    """Run some of `PARTS`, each within its limit; return whether none failed.

    Each part appends its records to the folder `results` and writes `gpu-PART.md` there.

    minutes  for all of them together, the first ones first, and for a single one instead of its limit; 0: no such limit
    device   None: a GPU; raises UserError if there is none
    """
    if device is None and not torch.cuda.is_available():
        raise UserError("PyTorch sees no GPU: the kernels run under Triton's interpreter in `pytest` instead")
    begin, machine = time.perf_counter(), environment()
    print(not_installed(), flush=True)
    results.mkdir(parents=True, exist_ok=True)
    chosen = [name for name in PARTS if name in parts]
    complete = True
    for name in chosen:
        seconds = PARTS[name]
        if minutes:
            left = 60 * minutes - (time.perf_counter() - begin)
            seconds = left if len(chosen) == 1 else min(seconds, left)
        before = {file: len(tables.read(results / f"{file}.jsonl")) for file in FILES}
        steps: list[Step] = []
        for step in _run_part(name, results, seconds):
            steps.append(step)
            added = [record for file in FILES for record in tables.read(results / f"{file}.jsonl")[before[file] :]]
            (results / f"gpu-{name}.md").write_text(summary(steps, added, machine))
        print((results / f"gpu-{name}.md").read_text(), flush=True)
        complete &= all(step.status != "failed" for step in steps)
    return complete


def _run_part(name: str, results: Path, seconds: float) -> Iterator[Step]:
    """Yield the results of a part that may take so many seconds."""
    begin = time.perf_counter()

    def left() -> float:
        return seconds - (time.perf_counter() - begin)

    def timed(benchmark: str, most: float) -> Step:
        return run_benchmark(benchmark, results, max(1.0, most - LATE), most)

    if seconds < LEAST:
        yield Step(name, "left out", 0.0, "no time was left")
    elif name == "tests":
        runs = test_runs(ROOT / "tests")
        for i, (which, arguments) in enumerate(runs.items()):
            yield run_tests(which, arguments, left() / (len(runs) - i))
    elif name == "augmentation":
        yield timed("augment", left() / 3)
        yield run_loaders(results / "loaders.jsonl", left())
    else:
        yield timed(name, left())


def main(argv: Sequence[str] | None = None) -> None:
    """The command; exit status 1 if a test or a kernel failed."""
    # argparse, because tyro need not be installed.
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description="Every check that needs a GPU.")
    parser.add_argument("--part", choices=tuple(PARTS), nargs="+", default=tuple(PARTS), help="only these (all)")
    help_text = "for all parts, the first ones first; for a single part instead of its own limit (no limit)"
    parser.add_argument("--minutes", type=float, default=0.0, help=help_text)
    help_text = "folder of the records, appended to, and of gpu-PART.md, rewritten"
    parser.add_argument("--results", type=Path, default=RESULTS, help=help_text)
    names = ("throughput", "kernels", "augment", "tune")
    parser.add_argument("--in-process", choices=names, help=argparse.SUPPRESS)
    parser.add_argument("--budget", type=float, default=0.0, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.in_process is not None:
        complete = run(lambda: benchmark(options.in_process, options.results, options.budget))
    else:
        complete = run(lambda: run_parts(options.results, options.part, options.minutes))
    if not complete:
        sys.exit(1)

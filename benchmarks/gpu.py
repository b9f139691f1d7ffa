"""`python -m benchmarks gpu`: every check and figure that needs a GPU, in one command of eight minutes.

In this order: throughput beside timm's, the tests of the kernels (attention in bf16 first), the other tests marked
`gpu`, the kernels beside every alternative, and the whole loader. Each part has a share of the time and passes on what
it leaves of it; `--part throughput` runs one part with all of it. Every record is written as soon as it is taken.
Nothing needs to be installed: a checkout, PyTorch, Triton, timm, torchvision and numba are enough. The tests also need
pytest, and run in parallel with pytest-xdist; the loader also needs tyro, photographs (see `loaders`) and, for its
GPU decoder, DALI.
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
from benchmarks.kernels import main as kernels
from benchmarks.record import RESULTS, environment
from benchmarks.throughput import main as throughput
from fastdeit.cli import run
from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.loaders.prefetch import usable_cores

ROOT = Path(__file__).parents[1]
# Modules of the peers, and what their absence means.
PEERS = {"flash_attn": "flash-attn", "liger_kernel": "liger-kernel", "apex": "apex", "kornia": "kornia"}
PEERS |= {"nvidia.dali": "nvidia-dali", "pytest": "pytest: without it no test ran"}
# The parts in their order, and each one's share of the time.
PARTS = {"throughput": 0.45, "tests": 0.2, "kernels": 0.2, "loaders": 0.15}
TESTED = ("kernels", "pipelines", "fastdeit")  # folders of tests; those of the benchmarks themselves need no GPU
WORKERS = 12  # processes that share the GPU among tests
LATE = 0.06  # of all the time, kept for a case that was begun in time
GRACE = 10.0  # seconds from the interrupt of a process to its end
LOADER_SIDES = ("fastdeit-dali-x3-gpu", "fastdeit-turbo-x3-gpu", "fastdeit-torch-x3-gpu")


@dataclass(frozen=True)
class Step:
    """What became of a part of the run.

    ended  "passed", "failed", "cut" where its time was over before anything failed, or "missing"
    """

    name: str
    ended: str
    seconds: float
    told: str = ""


def test_runs(tests: Path) -> dict[str, list[str | Path]]:
    """pytest's arguments of each test run: first the kernels, all of whose tests run on the GPU for real."""
    of_kernels = sorted((tests / "kernels").glob("test_*.py"), key=lambda path: (path.stem != "test_attention", path))
    marked = [
        path
        for folder in TESTED[1:]
        for path in sorted((tests / folder).rglob("test_*.py"))
        if "pytest.mark.gpu" in path.read_text()
    ]
    return {"tests of the kernels": [*of_kernels], "other tests marked gpu": ["-m", "gpu", *marked]}


def run_tests(name: str, arguments: Sequence[str | Path], seconds: float, root: Path = ROOT) -> Step:
    """Run pytest in a process of its own, for so many seconds at most; what it prints is shown."""
    if importlib.util.find_spec("pytest") is None:
        return Step(name, "missing", 0.0, "pip install pytest")
    parallel = ["-n", str(min(WORKERS, usable_cores()))] if _is_there("xdist") else []
    command = ["pytest", "-q", "--continue-on-collection-errors", "-p", "no:cacheprovider", *parallel]
    command += map(str, arguments)
    begin = time.perf_counter()
    told, code, cut = _follow(command, seconds, root)
    return Step(name, how_it_ended(told, code, cut), time.perf_counter() - begin, told)


def run_loaders(results: Path, seconds: float, root: Path = ROOT) -> Step:
    """Time whole loaders in a process of its own, for so many seconds at most; what it prints is shown."""
    if not _is_there("tyro"):
        return Step("loaders", "missing", 0.0, "pip install tyro")
    command = ["benchmarks", "loaders", "--quick", "--batch", "256", "--repeats", "3", "--results", str(results)]
    begin = time.perf_counter()
    told, code, cut = _follow([*command, "--sides", *LOADER_SIDES], seconds, root, errors=subprocess.STDOUT)
    # 2: what they need is not there, which `told` says.
    ended = "passed" if code == 0 else "cut" if cut else "missing" if code == 2 else "failed"
    return Step("loaders", ended, time.perf_counter() - begin, told)


def _follow(module: Sequence[str], seconds: float, root: Path, errors: int | None = None) -> tuple[str, int, bool]:
    """Run a module in a process of its own; its last line, its exit status, and whether its time was over before.

    errors  where they go; None: to ours
    """
    command = [sys.executable, "-u", "-m", *module]  # what is killed has said what it knew
    lines: list[str] = []
    with subprocess.Popen(
        command, cwd=root, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        # Its summary still comes after an interrupt; what hangs even then is killed, with what it started.
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


def how_it_ended(told: str, code: int, cut: bool) -> str:
    """Of a test run, by its last line, its exit status, and whether it was interrupted; see `Step.ended`."""
    if "failed" in told or "error" in told or (code != 0 and not cut):
        return "failed"
    return "cut" if cut else "passed"


def _signal(process: subprocess.Popen[str], number: signal.Signals) -> None:
    """Send a signal to a process and to all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def run_benchmark(name: str, results: Path, budget: float, seconds: float, root: Path = ROOT) -> Step:
    """Time kernels or models in a process of its own, for so many seconds at most; what it prints is shown.

    A kernel that writes where it must not leaves a process without its GPU, and one that does not end holds it.

    budget  seconds after which nothing new is begun
    """
    command = ["benchmarks", "gpu", "--in-process", name, "--budget", str(budget), "--results", str(results)]
    begin = time.perf_counter()
    told, code, cut = _follow(command, seconds, root, errors=subprocess.STDOUT)
    ended = "passed" if code == 0 else "cut" if cut else "failed"
    why = {0: "", 1: f"something of ours was refused or failed: {told}"}.get(code, f"exit status {code}: {told}")
    return Step(name, ended, time.perf_counter() - begin, "its time was over" if ended == "cut" else why)


def benchmark(name: str, results: Path, budget: float) -> bool:
    """What `run_benchmark` runs; whether none of ours was refused or failed."""
    if name == "kernels":
        return kernels.kernels(kernels.Options(results=results / "kernels.jsonl", budget=budget))
    options = throughput.Options(
        models=("base", "small", "tiny"),
        mode=("train",),
        quick=True,
        results=results / "throughput.jsonl",
        budget=budget,
    )
    return throughput.throughput(options)


def summary(steps: Sequence[Step], records: Sequence[dict[str, Any]], where: dict[str, Any]) -> str:
    """The run as Markdown: machine, steps, peers that were not there, targets, tables."""
    machine = where["gpu"]["name"] if where["gpu"] else where["cpu"]
    lines = [f"# GPU run, {machine}, {where['date'][:16].replace('T', ' ')} UTC", ""]
    lines += ["| step | ended | s | |", "|---|---|---:|---|"]
    lines += [f"| {step.name} | {step.ended} | {step.seconds:.0f} | {step.told} |" for step in steps]
    absent = [what for module, what in PEERS.items() if not _is_there(module)]
    lines += ["", f"Not there: {', '.join(absent)}." if absent else "Every peer was there.", ""]
    judged = [verdict for record in records for verdict in record.get("targets", [])]
    if judged:
        reached = sum(verdict["reached"] for verdict in judged)
        lines += [f"{reached} of {len(judged)} targets reached.", ""]
    lines.append(tables.markdown(records) if records else "Nothing was timed.")
    return "\n".join(lines) + "\n"


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


def gpu(minutes: float, results: Path, parts: Sequence[str] = tuple(PARTS), device: str | None = None) -> bool:
    """Run some of `PARTS` and write `gpu.md` beside the results; whether all went well.

    results  a folder
    device   None: a GPU; raises UserError where there is none
    """
    if device is None and not torch.cuda.is_available():
        raise UserError("PyTorch sees no GPU: the kernels run under Triton's interpreter in `pytest` instead")
    begin, where, seconds = time.perf_counter(), environment(), 60 * minutes
    files = {name: results / f"{name}.jsonl" for name in ("kernels", "loaders", "throughput")}
    before = {name: len(tables.read(path)) for name, path in files.items()}
    steps: list[Step] = []

    def note(step: Step) -> None:
        steps.append(step)
        records = [record for name, path in files.items() for record in tables.read(path)[before[name] :]]
        results.mkdir(parents=True, exist_ok=True)
        (results / "gpu.md").write_text(summary(steps, records, where))

    chosen = [name for name in PARTS if name in parts]
    for name in chosen:
        # What is left out of the parts, those that run share in proportion.
        share = sum(PARTS[n] for n in chosen[: chosen.index(name) + 1]) / sum(PARTS[n] for n in chosen)

        def left(share: float = share) -> float:
            return max(1.0, share * seconds - (time.perf_counter() - begin))

        if name == "tests":
            runs = test_runs(ROOT / "tests")
            for place, (which, arguments) in enumerate(runs.items(), 1):
                note(run_tests(which, arguments, left() * place / len(runs)))
        elif name == "loaders":
            note(run_loaders(files["loaders"], left()))
        else:
            budget = max(1.0, left() - LATE * seconds)
            note(run_benchmark(name, results, budget, budget + LATE * seconds))
    print((results / "gpu.md").read_text())
    return all(step.ended != "failed" for step in steps)


def main(argv: Sequence[str] | None = None) -> None:
    """The command; exit status 1 where a test or a kernel failed."""
    # argparse, since tyro need not be there.
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description="Every check that needs a GPU.")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything (8)")
    told = "folder of kernels.jsonl, loaders.jsonl and throughput.jsonl, which are added to, and gpu.md, written anew"
    parser.add_argument("--results", type=Path, default=RESULTS, help=told)
    parser.add_argument("--part", choices=tuple(PARTS), nargs="+", default=tuple(PARTS), help="only these (all)")
    parser.add_argument("--in-process", choices=("kernels", "throughput"), help=argparse.SUPPRESS)
    parser.add_argument("--budget", type=float, default=0.0, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.in_process is not None:
        complete = run(lambda: benchmark(options.in_process, options.results, options.budget))
    else:
        complete = run(lambda: gpu(options.minutes, options.results, options.part))
    if not complete:
        sys.exit(1)

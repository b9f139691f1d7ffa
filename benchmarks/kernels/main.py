"""`python -m benchmarks kernels`: every kernel beside its alternatives, forward and backward, with the roof."""

from __future__ import annotations

import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.kernels import augment
from benchmarks.kernels.operations import OPS, SHAPES, Function, Shape, Work, disagreement, outputs
from benchmarks.kernels.tables import plot, report, verdicts
from benchmarks.record import RESULTS, append, environment, first_line
from fastdeit.cli import parse, run
from fastdeit.pipelines.errors import UserError

Op = Literal[
    "attention", "augment", "assemble_tokens", "layer_norm", "add_layer_norm", "bias_gelu", "distillation_loss"
]
CHECKED = 4  # samples that are checked before anything is timed
# Seconds that are guessed before the first case is over: most of them are compilers'.
COMPILED_SECONDS, OURS_SECONDS, OTHER_SECONDS, AUGMENT_SECONDS = 20.0, 4.0, 0.5, 40.0


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time of every kernel on random data in bf16, the alternatives beside it in the same run; needs a GPU."""

    ops: tuple[Op, ...] = get_args(Op)
    models: tuple[Literal["tiny", "small", "base"], ...] = ("tiny", "small", "base")
    tokens: tuple[Literal[198, 578], ...] = (198, 578)  # 224 and 384 pixels
    batch: int = 256
    repeats: int = 20  # timed calls of a window; the figure is the median of the windows
    windows: int = 5
    window_seconds: float = 0.5  # that a window takes at most, with fewer calls if need be
    compile: bool = True  # PyTorch's own under torch.compile too
    budget: float = 0.0  # seconds; cases that would end later are left out and named, the first are the weightiest
    results: Path = RESULTS / "kernels.jsonl"
    plot: Path | None = None  # also draw what was measured into this file (.svg, .png); needs matplotlib


@dataclass(frozen=True)
class Case:
    """An operation at a shape; the loss and the augmentation have no model's."""

    op: str
    shape: Shape | None

    def __str__(self) -> str:
        return self.op if self.shape is None else f"{self.op} {self.shape.model} N{self.shape.tokens}"

    def guess(self, options: Options) -> float:
        """Seconds."""
        if self.op == "augment":
            return AUGMENT_SECONDS
        others = 5 if self.op == "attention" else 1
        return OURS_SECONDS + others * OTHER_SECONDS + COMPILED_SECONDS * options.compile


@dataclass(frozen=True)
class Clock:
    """How a call is timed: milliseconds in each window of calls, and in each window of a CUDA graph of them.

    The second is None where the call cannot be captured.
    """

    launched: Callable[[Callable[[], Any]], list[float]]
    graphed: Callable[[Callable[[], Any]], list[float] | None]


def cases(options: Options) -> list[Case]:
    """What `options` ask for, the largest model first, so that a run that is cut has every operation once."""
    shapes = [s for s in reversed(SHAPES) if s.model in options.models and s.tokens in options.tokens]
    shapes.sort(key=lambda shape: shape.tokens)
    found: list[Case] = []
    for place, shape in enumerate(shapes):
        for op in options.ops:
            whole = op in ("distillation_loss", "augment")
            if not whole or place == 0:
                found.append(Case(op, None if whole else shape))
    return found


def gpu_clock(repeats: int, windows: int, seconds: float) -> Clock:
    """A clock of device events."""

    def timed(call: Callable[[], Any], calls: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / calls

    def launched(call: Callable[[], Any]) -> list[float]:
        timed(call, 2)
        calls = max(1, min(repeats, int(1e3 * seconds / max(timed(call, 1), 1e-3))))
        return [timed(call, calls) for _ in range(windows)]

    def graphed(call: Callable[[], Any]) -> list[float] | None:
        try:
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                call()
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(repeats):
                    call()
        except RuntimeError:
            torch.cuda.synchronize()
            return None
        timed(graph.replay, 1)
        return [timed(graph.replay, 1) / repeats for _ in range(windows)]

    return Clock(launched, graphed)


def roofs(clock: Clock) -> dict[str, float]:
    """What this GPU reaches: bytes per second of a copy (read and write), FLOP per second of a bf16 GEMM."""
    pair = torch.randn(2, 2**28, device="cuda")
    copy = statistics.median(clock.launched(lambda: pair[0].copy_(pair[1])))
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = statistics.median(clock.launched(lambda: a @ b))
    return {"bytes_per_second": 2 * 2**30 / copy * 1e3, "flops_per_second": 2 * 8192**3 / product * 1e3}


def measure(
    case: Case, options: Options, roof: dict[str, float], device: torch.device, clock: Clock
) -> Iterator[dict[str, Any]]:
    """The records of a case. A side whose check fails is not timed and named in `refused`."""
    torch._dynamo.reset()  # a case must not inherit the recompilations of the one before
    about: dict[str, Any] = {"benchmark": "kernels", "op": case.op, "batch": options.batch, "roof": roof}
    if case.op == "augment":
        job = augment.Job.draw(options.batch, augment.SIZE)
        found = augment.measure(job, device, clock.launched, clock.graphed, roof["bytes_per_second"])
        yield from ({**about, **record} for record in found)
        return
    shape = case.shape or SHAPES[-1]
    if case.shape is not None:
        about |= {"model": shape.model, "tokens": shape.tokens}
    work = OPS[case.op](shape, options.batch, torch.bfloat16 if device.type == "cuda" else torch.float32, device)
    floors = [
        1e3 * max(moved / roof["bytes_per_second"], flops / roof["flops_per_second"])
        for moved, flops in zip(work.bytes, work.flops, strict=True)
    ]
    record: dict[str, Any] = {**about, "absent": work.absent, "refused": {}, "failed": {}, "sides": {}}
    record["floor_ms"] = dict(zip(("forward", "both"), floors, strict=True))
    for name, side in all_sides(work, options.compile).items():
        try:
            reason = disagreement(work, side, CHECKED)
            if reason is not None:
                record["refused"][name] = reason
                continue
            record["sides"][name] = _timed(work, side, clock, floors)
        except Exception as error:
            # A backend of SDPA that cannot take the shape, Triton where a kernel does not fit, an extension that was
            # built for another PyTorch: each says so with an exception of its own, and none ends the other sides.
            record["failed"][name] = first_line(error)
    yield record


def all_sides(work: Work, compiled: bool) -> dict[str, Function]:
    """Ours and every other, PyTorch's own among them."""
    sides = {**work.sides, "eager": work.eager}
    return {**sides, "compiled": torch.compile(work.eager)} if compiled else sides


def _timed(work: Work, side: Function, clock: Clock, floors: list[float]) -> dict[str, Any]:
    def forward() -> None:
        with torch.no_grad():
            side(*work.arguments)

    grads = [torch.randn_like(out) for out in outputs(side, work.arguments)]

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs(side, work.arguments), work.arguments, grads)

    figures: dict[str, Any] = {}
    for name, call, floor in zip(("forward", "both"), (forward, both), floors, strict=True):
        windows, in_graph = clock.launched(call), clock.graphed(call)
        figures[name] = {"ms": statistics.median(windows), "windows": windows}
        if in_graph is not None:
            figures[name] |= {"graph_ms": statistics.median(in_graph), "graph_windows": in_graph}
        # Without launches it is the kernel alone that is compared with the roof.
        figures[name]["share_of_roof"] = floor / figures[name].get("graph_ms", figures[name]["ms"])
    return figures


def kernels(options: Options, device: torch.device | None = None, clock: Clock | None = None) -> bool:
    """Measure, print and store every case; whether none of ours was refused or failed.

    device, clock  None: the GPU, and its events. Raises UserError where there is none
    """
    if device is None and not torch.cuda.is_available():
        raise UserError(
            "the kernels benchmark needs a GPU, and PyTorch sees none; "
            "`python -m tests.compiled` tells what can be known without one"
        )
    if options.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise UserError("--plot needs matplotlib: pip install 'fastdeit[demo]'")
    device = device or torch.device("cuda")
    clock = clock or gpu_clock(options.repeats, options.windows, options.window_seconds)
    begin, complete = time.perf_counter(), True
    left = cases(options)
    guessed = sum(case.guess(options) for case in left)
    limit = f", of which the budget is {options.budget:.0f} s" if 0 < options.budget < guessed else ""
    print(f"{len(left)} cases, about {guessed:.0f} s{limit}; results go to {options.results}", flush=True)
    roof = roofs(clock) if device.type == "cuda" else {"bytes_per_second": 1e10, "flops_per_second": 1e11}
    print(f"roof: {roof['bytes_per_second'] / 1e12:.2f} TB/s, {roof['flops_per_second'] / 1e12:.0f} TFLOP/s")
    where, done, pace = environment(), 0.0, 1.0
    records: list[dict[str, Any]] = []
    bar = tqdm(left, desc="kernels", unit="case", disable=None)
    for place, case in enumerate(bar):
        spent = time.perf_counter() - begin
        if options.budget and place and spent + pace * case.guess(options) > options.budget:
            rest = ", ".join(map(str, left[place:]))
            print(f"left out, since the budget of {options.budget:.0f} s is used up: {rest}", flush=True)
            break
        bar.set_postfix_str(str(case))
        for record in measure(case, options, roof, device, clock):
            record = {**record, "targets": verdicts(record), "environment": where}
            append(options.results, record)
            records.append(record)
            tqdm.write(report(record))
            complete &= "fastdeit" in record["sides"]
        done += case.guess(options)
        # The first case has the compilers' own start in it.
        pace = max(0.2, (time.perf_counter() - begin) / done)
    if options.plot is not None:
        plot(where["gpu"]["name"] if where["gpu"] else str(where["cpu"]), records, options.plot)
    return complete


def main(argv: Sequence[str] | None = None) -> None:
    """The command; exit status 1 where one of our kernels was wrong or could not run."""

    if not run(lambda: kernels(parse(Options, "python -m benchmarks kernels", argv))):
        sys.exit(1)

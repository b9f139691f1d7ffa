"""`python -m benchmarks kernels`: every kernel and its alternatives, forward and backward, with the roof."""

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
from benchmarks.kernels.operations import OPS, SHAPES, Function, Operation, Shape, disagreement, outputs
from benchmarks.kernels.report import plot, record_table, targets
from benchmarks.record import RESULTS, append, environment, first_line
from benchmarks.render import require_matplotlib, target_lines
from fastdeit.cli import parse, run
from fastdeit.pipelines.errors import UserError

Op = Literal[
    "attention", "augment", "assemble_tokens", "layer_norm", "add_layer_norm", "bias_gelu", "distillation_loss"
]
CHECKED = 4  # samples to check before anything is timed
# Estimates until the first case has ended; compilers take most of the time.
COMPILED_SECONDS, OURS_SECONDS, OTHER_SECONDS, AUGMENT_SECONDS = 20.0, 4.0, 0.5, 40.0


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time every kernel and its alternatives on random data in bf16, in the same run; needs a GPU."""

    ops: tuple[Op, ...] = get_args(Op)
    models: tuple[Literal["tiny", "small", "base"], ...] = ("tiny", "small", "base")
    tokens: tuple[Literal[197, 198, 577, 578], ...] = (198, 578)  # 224 and 384 pixels; even: with distillation token
    batch: int = 256
    repeats: int = 20  # timed calls per window; the figure is the median of the windows
    windows: int = 5
    window_seconds: float = 0.5  # limit of a window, which then has fewer calls
    compile: bool = True  # also plain PyTorch under torch.compile
    budget: float = 0.0  # seconds; cases that would end later are skipped and named; the largest models come first
    results: Path = RESULTS / "kernels.jsonl"
    plot: Path | None = None  # also draw the records into this file (.svg, .png); needs matplotlib


@dataclass(frozen=True)
class KernelCase:
    """An operation at a shape; the loss and the augmentation have none."""

    op: str
    shape: Shape | None

    def __str__(self) -> str:
        return self.op if self.shape is None else f"{self.op} {self.shape.model} N{self.shape.tokens}"

    def estimate(self, options: Options) -> float:
        """Expected seconds."""
        if self.op == "augment":
            return AUGMENT_SECONDS
        others = 5 if self.op == "attention" else 1
        return OURS_SECONDS + others * OTHER_SECONDS + COMPILED_SECONDS * options.compile


@dataclass(frozen=True)
class Clock:
    """Timers of a call: milliseconds in each window of calls, and in each window of a CUDA graph of them.

    The second returns None if the call cannot be captured.
    """

    launched: Callable[[Callable[[], Any]], list[float]]
    graphed: Callable[[Callable[[], Any]], list[float] | None]


def cases(options: Options) -> list[KernelCase]:
    """The cases of `options`, the largest model first, so that a run cut short has every operation once."""
    shapes = [s for s in reversed(SHAPES) if s.model in options.models and s.tokens in options.tokens]
    shapes.sort(key=lambda shape: shape.tokens)
    shapeless = ("distillation_loss", "augment")
    return [
        KernelCase(op, None if op in shapeless else shape)
        for i, shape in enumerate(shapes)
        for op in options.ops
        if i == 0 or op not in shapeless
    ]


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
            warm_up = torch.cuda.Stream()
            warm_up.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(warm_up):
                call()
            torch.cuda.current_stream().wait_stream(warm_up)
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
    """Measured peaks of this GPU: bytes per second of a copy (read and write), FLOP per second of a bf16 GEMM."""
    pair = torch.randn(2, 2**28, device="cuda")
    copy = statistics.median(clock.launched(lambda: pair[0].copy_(pair[1])))
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = statistics.median(clock.launched(lambda: a @ b))
    return {"bytes_per_second": 2 * 2**30 / copy * 1e3, "flops_per_second": 2 * 8192**3 / product * 1e3}


def measure(
    case: KernelCase, options: Options, roof: dict[str, float], device: torch.device, clock: Clock
) -> Iterator[dict[str, Any]]:
    """Yield the records of a case. A contender whose check fails is not timed but named in `refused`."""
    torch._dynamo.reset()  # a case must not inherit the recompilations of its predecessor
    common: dict[str, Any] = {"benchmark": "kernels", "op": case.op, "batch": options.batch, "roof": roof}
    if case.op == "augment":
        job = augment.Job.draw(options.batch, augment.SIZE)
        for record in augment.measure(job, device, clock.launched, clock.graphed, roof["bytes_per_second"]):
            yield {**common, **record}
        return
    shape = case.shape or SHAPES[-1]
    if case.shape is not None:
        common |= {"model": shape.model, "tokens": shape.tokens}
    operation = OPS[case.op](shape, options.batch, torch.bfloat16 if device.type == "cuda" else torch.float32, device)
    floors = [
        1e3 * max(moved / roof["bytes_per_second"], flops / roof["flops_per_second"])
        for moved, flops in zip(operation.bytes, operation.flops, strict=True)
    ]
    record: dict[str, Any] = {**common, "absent": operation.absent, "refused": {}, "failed": {}, "sides": {}}
    record["floor_ms"] = dict(zip(("forward", "both"), floors, strict=True))
    contenders = {**operation.contenders, "eager": operation.eager}
    if options.compile:
        contenders["compiled"] = torch.compile(operation.eager, dynamic=False)
    for name, contender in contenders.items():
        try:
            reason = disagreement(operation, contender, CHECKED)
            if reason is not None:
                record["refused"][name] = reason
                continue
            torch._dynamo.reset()  # what was compiled for the few samples of the check must not be timed
            record["sides"][name] = _timed(operation, contender, clock, floors)
        except Exception as error:
            # An SDPA backend that rejects the shape, a kernel that does not fit, an extension built for another
            # PyTorch: each raises its own exception, and none may end the other contenders.
            record["failed"][name] = first_line(error)
    yield record


def _timed(operation: Operation, contender: Function, clock: Clock, floors: list[float]) -> dict[str, Any]:
    arguments = operation.arguments

    def forward() -> None:
        with torch.no_grad():
            contender(*arguments)

    grads = [torch.randn_like(out) for out in outputs(contender, arguments)]

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs(contender, arguments), arguments, grads)

    figures: dict[str, Any] = {}
    for name, call, floor in zip(("forward", "both"), (forward, both), floors, strict=True):
        windows, in_graph = clock.launched(call), clock.graphed(call)
        figures[name] = {"ms": statistics.median(windows), "windows": windows}
        if in_graph is not None:
            figures[name] |= {"graph_ms": statistics.median(in_graph), "graph_windows": in_graph}
        # Compare the kernel alone with the roof, without launches, if a graph could be timed.
        figures[name]["share_of_roof"] = floor / figures[name].get("graph_ms", figures[name]["ms"])
    return figures


def run_benchmark(options: Options, device: torch.device | None = None, clock: Clock | None = None) -> bool:
    """Measure, print and store every case; return whether none of our kernels was refused or failed.

    device, clock  None: the GPU, and its events. Raises UserError if there is none
    """
    if device is None and not torch.cuda.is_available():
        raise UserError(
            "the kernels benchmark needs a GPU, and PyTorch sees none; "
            "`python -m tests.compiled` shows what the compiler reports without one"
        )
    if options.plot is not None:
        require_matplotlib("--plot")
    device = device or torch.device("cuda")
    clock = clock or gpu_clock(options.repeats, options.windows, options.window_seconds)
    begin, complete = time.perf_counter(), True
    todo = cases(options)
    estimate = sum(case.estimate(options) for case in todo)
    limit = f", of which the budget is {options.budget:.0f} s" if 0 < options.budget < estimate else ""
    print(f"{len(todo)} cases, about {estimate:.0f} s{limit}; results go to {options.results}", flush=True)
    roof = roofs(clock) if device.type == "cuda" else {"bytes_per_second": 1e10, "flops_per_second": 1e11}
    print(f"roof: {roof['bytes_per_second'] / 1e12:.2f} TB/s, {roof['flops_per_second'] / 1e12:.0f} TFLOP/s")
    machine, done, pace = environment(), 0.0, 1.0
    records: list[dict[str, Any]] = []
    bar = tqdm(todo, desc="kernels", unit="case", disable=None)
    for i, case in enumerate(bar):
        spent = time.perf_counter() - begin
        if options.budget and i and spent + pace * case.estimate(options) > options.budget:
            rest = ", ".join(map(str, todo[i:]))
            print(f"left out, since the budget of {options.budget:.0f} s is used up: {rest}", flush=True)
            break
        bar.set_postfix_str(str(case))
        for record in measure(case, options, roof, device, clock):
            record = {**record, "targets": targets(record), "environment": machine}
            append(options.results, record)
            records.append(record)
            tqdm.write("\n".join([record_table(record).text(), *target_lines(record["targets"])]))
            complete &= "fastdeit" in record["sides"]
        done += case.estimate(options)
        # The first case includes the start-up of the compilers.
        pace = max(0.2, (time.perf_counter() - begin) / done)
    if options.plot is not None:
        plot(machine["gpu"]["name"] if machine["gpu"] else str(machine["cpu"]), records, options.plot)
    return complete


def main(argv: Sequence[str] | None = None) -> None:
    """The command; exit status 1 if one of our kernels was wrong or could not run."""

    if not run(lambda: run_benchmark(parse(Options, "python -m benchmarks kernels", argv))):
        sys.exit(1)
